"""A network as files of each format."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.export.metadata import KEY, Metadata
from engine.export.runtime import without_telemetry
from engine.export.suppression import suppressed
from models.detector import Detector
from utils.files import write_bytes, write_text

OPSET = 18  # of ONNX: the exporter's own
ROWS = 300  # of an end-to-end network, for each image
SUFFIXES = {"onnx": ".onnx", "openvino": "_openvino_model", "torchscript": ".torchscript"}


class Exportable(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> what Metadata states.

    Boxes and scores are outputs of their own, since their ranges differ, which integers need.
    """

    def __init__(self, model: Detector, *, half: bool) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float16 if half else torch.float32
        if half:
            self.model.to_half()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        boxes, scores = self.model.head.dense(self.model(images.to(self.dtype)))
        return (best_rows(boxes, scores),) if self.model.end_to_end else (boxes, scores)


def best_rows(boxes: Tensor, scores: Tensor) -> Tensor:
    """(B, N, 4), (B, N, classes) -> (B, 300, 6): box, score and class of the best boxes.

    A box has its best class alone.
    """
    score, label = scores.max(-1, keepdim=True)
    rows = torch.cat((boxes, score, label.to(boxes.dtype)), -1)
    rows = F.pad(rows, (0, 0, 0, ROWS))  # a small image may have fewer
    best = rows[..., 4].topk(ROWS, 1).indices
    return rows.gather(1, best[..., None].expand(-1, -1, 6))


def to_onnx(network: Exportable, images: Tensor, metadata: Metadata, base: Path) -> Path:
    """BASE.onnx, by torch.export."""
    path = named(base, "onnx", metadata)
    write_bytes(path, onnx_bytes(network, images, metadata))
    return path


def to_openvino(network: Exportable, images: Tensor, metadata: Metadata, base: Path) -> Path:
    """BASE_openvino_model/BASE.xml and .bin, by OpenVINO's converter, from ONNX."""
    folder = named(base, "openvino", metadata)
    temporary = base.with_name(f".{base.name}.onnx")
    try:
        write_bytes(temporary, onnx_bytes(network, images, metadata))
        save_openvino(read_openvino(temporary), folder, metadata)
    finally:
        temporary.unlink(missing_ok=True)
    return folder


def read_openvino(file: Path) -> Any:
    """An ONNX file as OpenVINO's model."""
    return without_telemetry("openvino").Core().read_model(file)


def save_openvino(model: Any, folder: Path, metadata: Metadata) -> None:
    """The folder of an OpenVINO model, anew."""
    openvino = without_telemetry("openvino")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    file = folder / f"{folder.name.removesuffix('_openvino_model')}.xml"
    openvino.save_model(model, file, compress_to_fp16=False)
    write_text(folder / f"{KEY}.json", metadata.to_text())


def to_torchscript(network: Exportable, images: Tensor, metadata: Metadata, base: Path) -> Path:
    """BASE.torchscript, by tracing."""
    path = named(base, "torchscript", metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about its own format
        traced = torch.jit.trace(network, images, check_trace=False)
        write_bytes(path, traced.save_to_buffer(_extra_files={KEY: metadata.to_text()}))
    return path


WRITERS: dict[str, Callable[[Exportable, Tensor, Metadata, Path], Path]] = {
    "onnx": to_onnx,
    "openvino": to_openvino,
    "torchscript": to_torchscript,
}


@lru_cache(maxsize=1)  # two formats begin with it
def onnx_bytes(network: Exportable, images: Tensor, metadata: Metadata) -> bytes:
    """An ONNX file of an Exportable, traced with `images`; of any size if the metadata has none."""
    # its optimiser warns of every node that it leaves as it is
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["detections"] if network.model.end_to_end else ["boxes", "scores"],
        opset_version=OPSET,
        dynamo=True,
        dynamic_shapes=({**free},) if metadata.size is None else None,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    # the exporter notes source lines and paths of this machine at every node
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    if metadata.suppression is not None:
        model = suppressed(model, metadata.suppression)
    return stated(model, metadata)


def stated(model: Any, metadata: Metadata) -> bytes:
    """An ONNX model as a file with its metadata."""
    import onnx

    onnx.helper.set_model_props(model, {KEY: metadata.to_text()})
    return model.SerializeToString()


def named(base: Path, name: str, metadata: Metadata) -> Path:
    """Where a format is written: BASE.onnx, BASE_int8_openvino_model, ..."""
    int8 = "_int8" * (metadata.precision == "int8")
    return base.with_name(base.name + int8 + SUFFIXES[name])


def megabytes(path: Path) -> float:
    """The size of a file, or of the files in a folder."""
    files = (file for file in (path, *path.glob("*")) if file.is_file())
    return sum(file.stat().st_size for file in files) / 1e6

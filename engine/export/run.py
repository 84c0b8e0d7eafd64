"""What export.py does: one file per format, each compared with PyTorch after it is written."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint import TrainedWith, load_trained
from engine.export.config import ExportConfig
from engine.export.metadata import KEY, Metadata
from engine.export.runtime import open_exported, required, without_telemetry
from engine.export.suppression import suppressed
from models.builder import build_detector
from models.detector import Detector
from models.yaml.parser import load_spec
from utils.config import DEFAULT_SIZE
from utils.environment import use_threads
from utils.errors import UserError
from utils.files import write_bytes, write_text
from utils.nms import NmsConfig, nms
from utils.terminal import say

OPSET = 18  # of ONNX: the exporter's own
CLASSES = 80  # of --cfg
TOLERANCE = 1e-3  # of boxes in pixels over the image's side, and of scores; float16: 20 times


def run(config: ExportConfig) -> list[Path]:
    """Write the files (or folders) that `config` asks for, print where they are. UserError."""
    use_threads(config.threads)
    for name in config.include:
        required(name)
    if config.weights:
        model, trained = load_trained(config.weights, device="cpu", fuse=True)
        base = Path(config.weights).with_suffix("")
    else:
        model = build_detector(load_spec(config.cfg), classes=CLASSES).eval().fuse()
        trained, base = TrainedWith(), Path(Path(config.cfg).stem)
    stride = model.max_stride
    sides = config.imgsz or (trained.image_size or DEFAULT_SIZE,)
    size = sides[0], sides[-1]
    if any(side % stride for side in size):
        raise UserError(f"--img {' '.join(map(str, sides))}: not multiples of {stride}")
    metadata = Metadata(
        names=model.names,
        stride=stride,
        size=None if config.dynamic else size,
        batch=None if config.dynamic else config.batch_size,
        head=type(model.head).__name__,
        data=trained.data,
        suppression=NmsConfig(
            conf=config.conf_thres,
            iou=config.iou_thres,
            max_det=config.max_det,
            multi_label=False,
        )
        if config.nms == "in-graph"
        else None,
    )
    model = model.to(memory_format=torch.contiguous_format)
    # a size of 1 would be taken for a constant
    batch = max(config.batch_size, 2) if config.dynamic else config.batch_size
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    network = Exportable(model, half=config.half).eval().requires_grad_(False)
    paths = []
    for name in config.include:
        start = time.perf_counter()
        path = WRITERS[name](network, images, metadata, base)
        written = sum(file.stat().st_size for file in (path, *path.glob("*")) if file.is_file())
        apart = difference(model, path, images)
        limit = TOLERANCE * (20 if config.half else 1)
        if not apart <= limit:
            raise UserError(
                f"{path}: its outputs differ from PyTorch's by {apart:.2g} (limit {limit:g})"
            )
        say(
            f"{path} ({written / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s);"
            f" outputs differ from PyTorch's by {apart:.1g}"
        )
        paths.append(path)
    return paths


class Exportable(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> boxes (B, N, 4) xyxy pixels, scores (B, N, classes).

    Outputs of their own, since boxes and scores have different ranges, which integers need.
    """

    def __init__(self, model: Detector, *, half: bool) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.float16 if half else torch.float32
        if half:
            self.model.to_half()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.model.head.dense(self.model(images.to(self.dtype)))


@torch.inference_mode()
def difference(model: Detector, path: Path, images: Tensor) -> float:
    """How far a file's outputs are from the model's: scores, and boxes by the image's side.

    The detections of an in-graph suppression are compared with `utils.nms.nms` in PyTorch.
    """
    boxes, scores = model.head.dense(model(images.to(next(model.parameters()).dtype)))
    exported = open_exported(path, torch.device("cpu"))
    found = exported.outputs(images)
    side = max(images.shape[2:])
    if exported.metadata.suppression is None:
        apart = ((boxes - found[0]).abs().max() / side, (scores - found[1]).abs().max())
        return float(torch.stack(apart).max())
    own = kept_rows(boxes, scores, exported.metadata.suppression)
    # two scores that are almost equal may change places, so each box has its nearest one
    box = (found[0][:, :, None, :4] - own[:, None, :, :4]).abs().amax(-1).amin(-1).max() / side
    return max(float(box), float((found[0][..., 4] - own[..., 4]).abs().max()))


def kept_rows(boxes: Tensor, scores: Tensor, config: NmsConfig) -> Tensor:
    """What an in-graph suppression should give, by `utils.nms.nms`: (B, max_det or N, 6)."""
    images, cells = boxes.shape[:2]
    image = torch.arange(images).repeat_interleave(cells)
    kept = nms(image, boxes.flatten(0, 1), scores.flatten(0, 1), config, images=images)
    rows = boxes.new_zeros(images, min(config.max_det, cells), 6)
    for row, item in zip(rows, kept, strict=True):
        row[: len(item)] = torch.cat(
            (item.boxes, item.scores[:, None], item.labels[:, None].float()), 1
        )
    return rows


def to_onnx(network: nn.Module, images: Tensor, metadata: Metadata, base: Path) -> Path:
    """BASE.onnx, by torch.export."""
    path = base.with_suffix(".onnx")
    write_bytes(path, onnx_bytes(network, images, metadata))
    return path


def to_openvino(network: nn.Module, images: Tensor, metadata: Metadata, base: Path) -> Path:
    """BASE_openvino_model/BASE.xml and .bin, by OpenVINO's converter, from ONNX."""
    openvino = without_telemetry("openvino")
    folder = base.with_name(f"{base.name}_openvino_model")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    content = onnx_bytes(network, images, metadata)
    temporary = folder / "model.onnx"
    write_bytes(temporary, content)
    converted = openvino.convert_model(temporary)
    temporary.unlink()
    openvino.save_model(converted, folder / f"{base.name}.xml", compress_to_fp16=False)
    write_text(folder / f"{KEY}.json", metadata.to_text())
    return folder


def to_torchscript(network: nn.Module, images: Tensor, metadata: Metadata, base: Path) -> Path:
    """BASE.torchscript, by tracing."""
    path = base.with_suffix(".torchscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about its own format
        traced = torch.jit.trace(network, images, check_trace=False)
        write_bytes(path, traced.save_to_buffer(_extra_files={KEY: metadata.to_text()}))
    return path


WRITERS: dict[str, Callable[[nn.Module, Tensor, Metadata, Path], Path]] = {
    "onnx": to_onnx,
    "openvino": to_openvino,
    "torchscript": to_torchscript,
}


@lru_cache(maxsize=1)  # two formats begin with it
def onnx_bytes(network: nn.Module, images: Tensor, metadata: Metadata) -> bytes:
    """An ONNX file of an Exportable, traced with `images`; of any size if the metadata has none."""
    import onnx

    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.onnx.export(
        network,
        (images,),
        input_names=["images"],
        output_names=["boxes", "scores"],
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
    onnx.helper.set_model_props(model, {KEY: metadata.to_text()})
    return model.SerializeToString()

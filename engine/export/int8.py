"""INT8: the ranges of all maps from images of the training split, and what that costs in AP."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.index.dataset import DatasetConfig, load_dataset_config, load_split
from data.index.records import DataIndex
from data.loading.loader import LoaderConfig, ValLoader
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from engine.export.config import ExportConfig
from engine.export.formats import (
    Exportable,
    megabytes,
    named,
    onnx_bytes,
    read_openvino,
    save_openvino,
    stated,
)
from engine.export.metadata import Metadata
from engine.export.runtime import Exported, Network, open_exported, run_openvino, without_telemetry
from utils.errors import UserError
from utils.files import write_bytes
from utils.terminal import say

CPU = torch.device("cpu")
IMAGES = 300  # as many of the training split, evenly spaced, unless it has fewer
CONVOLUTIONS = frozenset({"Conv", "Convolution", "GroupConvolution"})


def write_int8(
    config: ExportConfig, network: Exportable, images: Tensor, metadata: Metadata, base: Path
) -> list[Path]:
    """Files in INT8, and what they lose in AP on the val split. UserError over --max-ap-loss."""
    dataset = load_dataset_config(config.data)
    index, size = load_split(dataset, "val"), images.shape[-1]
    calibration = Calibration(dataset, metadata, size)
    conf = max(EvalConfig.conf, metadata.suppression.conf if metadata.suppression else 0)
    content = onnx_bytes(network, images, metadata)
    paths = []
    for name in config.include:
        start = time.perf_counter()
        path, plain = named(base, name, metadata), base.with_name(f".{base.name}-float32.onnx")
        try:
            write_bytes(plain, content)
            same = (
                Exported(metadata, run_openvino(plain), "openvino")
                if name == "openvino"
                else open_exported(plain, CPU)
            )
            exact = precision_at(same, index, size, conf=conf)
            if name == "onnx":
                write_bytes(path, stated(quantized_onnx(content, calibration), metadata))
            else:
                save_openvino(quantized_openvino(read_openvino(plain), calibration), path, metadata)
        finally:
            plain.unlink(missing_ok=True)
        found = precision_at(open_exported(path, CPU), index, size, conf=conf)
        say(
            f"{path} ({megabytes(path):.1f} MB, {time.perf_counter() - start:.1f} s); AP on the val"
            f" split of {config.data}: {found:.4f}, in float32 {exact:.4f} ({found - exact:+.4f})"
        )
        if exact - found > config.max_ap_loss:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise UserError(
                f"{path}: removed, since it loses {exact - found:.4f} AP, more than"
                f" --max-ap-loss {config.max_ap_loss:g}"
            )
        paths.append(path)
    return paths


class Calibration:
    """Batches of the training split, letterboxed as in detection; iterated once or more."""

    def __init__(self, dataset: DatasetConfig, metadata: Metadata, size: int) -> None:
        self._index = load_split(dataset, "train")
        records = self._index.records
        count = min(IMAGES, len(records))
        chosen = tuple(records[i * len(records) // count] for i in range(count))
        self._index = replace(self._index, records=chosen)
        self._batch, self._stride, self._size = metadata.batch or 1, metadata.stride, size
        if count < self._batch:
            raise UserError(f"--int8: the training split has {count} images, --batch is larger")
        self.batches = count // self._batch

    def __iter__(self) -> Iterator[np.ndarray]:
        """(B, 3, H, W) float32 in [0, 1]; what is left over is dropped."""
        for images in _loader(self._index, self._size, self._batch, self._stride):
            if len(images) == self._batch:
                yield images.images.float().div(255).numpy()


def precision_at(network: Network, index: DataIndex, size: int, *, conf: float) -> float:
    """AP of `network` at `size` pixels, with the other settings of val.py."""
    batch = (network.metadata.batch if isinstance(network, Exported) else None) or 8
    loader = _loader(index, size, batch, network.max_stride)
    return evaluate(network, loader, index, config=EvalConfig(conf=conf), device=CPU).map


def quantized_onnx(content: bytes, images: Calibration) -> Any:
    """An ONNX model in INT8 by ONNX Runtime's static quantizer."""
    import onnx

    quantization: Any = without_telemetry("onnxruntime.quantization")
    shape_inference = without_telemetry("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):
        batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory() as folder:  # its functions take and give files
        plain, ready, done = (Path(folder) / f"{name}.onnx" for name in ("plain", "ready", "done"))
        plain.write_bytes(content)
        shape_inference.quant_pre_process(plain, ready, skip_symbolic_shape=True)
        nodes = onnx.load(ready).graph.node
        readers: dict[str, list[Any]] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        quantization.quantize_static(
            ready,
            done,
            Reader(),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_decoding(
                nodes,
                name=lambda node: node.name,
                kind=lambda node: node.op_type,
                following=lambda node: [r for name in node.output for r in readers.get(name, ())],
            ),
            extra_options={"CalibMovingAverage": True},  # one odd image does not widen the ranges
        )
        return onnx.load(done)


def quantized_openvino(model: Any, images: Calibration) -> Any:
    """An OpenVINO model in INT8 by nncf."""
    nncf = without_telemetry("nncf")
    nncf.set_log_level("ERROR")
    decoding = _decoding(
        model.get_ordered_ops(),
        name=lambda op: op.get_friendly_name(),
        kind=lambda op: op.get_type_name(),
        following=lambda op: [
            reader.get_node() for output in op.outputs() for reader in output.get_target_inputs()
        ],
    )
    return nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,  # SiLU's outputs are not symmetric
        subset_size=images.batches,
        ignored_scope=nncf.IgnoredScope(names=decoding, validate=False),
    )


def _decoding(
    nodes: Any,
    *,
    name: Callable[[Any], str],
    kind: Callable[[Any], str],
    following: Callable[[Any], list[Any]],
) -> list[str]:
    """The names of the `nodes` (each before its readers) from the last convolutions on.

    They turn raw maps into boxes, where a step of 1/255 of the image would be many pixels.
    """
    before: set[str] = set()  # a convolution
    after = []
    for node in reversed(nodes):
        if any(kind(item) in CONVOLUTIONS or name(item) in before for item in following(node)):
            before.add(name(node))
        elif kind(node) not in {"Constant", "Parameter", "Result"}:
            after.append(name(node))
    return after


def _loader(index: DataIndex, size: int, batch: int, stride: int) -> ValLoader:
    config = LoaderConfig(image_size=size, batch_size=batch, stride=stride, workers=0, seed=0)
    return ValLoader(index, config)

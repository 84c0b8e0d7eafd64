"""A detector in the runtimes that it is deployed in: exported once, then called on NumPy images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.export.formats import Exportable, onnx_bytes
from engine.export.metadata import Metadata
from engine.export.runtime import required, run_openvino, without_telemetry
from models.detector import Detector
from utils.files import write_bytes

TORCH, ONNXRUNTIME, OPENVINO = "torch", "onnxruntime", "openvino"
NEEDS = {ONNXRUNTIME: "onnx", OPENVINO: "openvino"}  # of `required`, by runtime


def require_runtimes(names: Sequence[str]) -> None:
    """UserError, with the line for pip, where a runtime or its exporter is not installed."""
    for name in names:
        if name != TORCH:
            required(NEEDS[name])


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the runtimes' packages."""
    return {name: metadata.version(name) for name in names}


def exported_step(
    model: Detector, images: Tensor, runtime: str, file: Path
) -> Callable[[], Sequence[Any]]:
    """One call of the network in `runtime`, on the CPU in float32: images to boxes and scores.

    model: fused, on the CPU; images: (B, 3, S, S); file: the ONNX file for these sizes, exported
    where it is not there yet.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        size = (images.shape[2], images.shape[3])
        head = type(model.head).__name__
        about = Metadata(model.names, model.max_stride, size, len(images), head, data="")
        network = Exportable(model, half=False).eval().requires_grad_(False)
        write_bytes(file, onnx_bytes(network, images, about))
    array = images.numpy()
    if runtime == OPENVINO:
        run = run_openvino(file)
        return lambda: run(array)
    onnxruntime = without_telemetry("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": array})

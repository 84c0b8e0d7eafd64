"""Networks by runtime: a Detector in PyTorch, or an exported file in a program made for it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import TrainedWith, load_trained
from engine.export.metadata import KEY, Metadata
from models.detector import Detector
from utils.errors import UserError, cause_of

PACKAGES = {  # what a format needs to be written and run
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torchscript": (),
    "openvino int8": ("nncf",),
}
Run = Callable[[np.ndarray], Sequence[np.ndarray]]


class Network(Protocol):
    """What evaluation and detection need of a network."""

    names: tuple[str, ...]

    @property
    def max_stride(self) -> int:
        """What image sides must be multiples of."""

    @property
    def input_type(self) -> torch.dtype:
        """The type of its images."""

    @property
    def end_to_end(self) -> bool:
        """Whether what it detects needs no suppression."""

    def detect(self, images: Tensor, conf: float) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> what may score over `conf`, as from `Head.decode`."""


class Exported:
    """A Network that a file of export.py holds; runs in float32, on the CPU's memory."""

    input_type = torch.float32

    def __init__(self, metadata: Metadata, run: Run, runtime: str) -> None:
        self.metadata, self.runtime = metadata, f"{runtime} {metadata.precision}"
        self.names, self.max_stride = metadata.names, metadata.stride
        self.end_to_end = metadata.end_to_end
        self._run = run

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) in [0, 1] -> what Metadata states."""
        size, batch = self.metadata.size, self.metadata.batch or len(images)
        if size is not None and tuple(images.shape[2:]) != size:
            raise UserError(
                f"the exported network takes images of {size[0]} x {size[1]} pixels, not"
                f" {images.shape[2]} x {images.shape[3]}: leave --img out, or export with --dynamic"
            )
        parts: list[Sequence[Tensor]] = []
        for some in images.cpu().contiguous().split(batch):
            short = batch - len(some)
            filled = torch.cat((some, some.new_zeros(short, *some.shape[1:]))) if short else some
            found = map(torch.from_numpy, self._run(filled.numpy()))
            parts.append([item[: len(some)] for item in found])
        return tuple(torch.cat(items) for items in zip(*parts, strict=True))

    def detect(self, images: Tensor, conf: float) -> tuple[Tensor, Tensor, Tensor]:
        """As in Network."""
        if self.metadata.suppression is not None or self.end_to_end:
            (rows,) = self.outputs(images)
            image, row = (rows[..., 4] <= conf).logical_not().nonzero(as_tuple=True)
            rows = rows[image, row]
            scores = rows.new_zeros(len(rows), len(self.names))
            scores.scatter_(1, rows[:, 5:].long(), rows[:, 4:5])
            return image, rows[:, :4], scores
        boxes, scores = self.outputs(images)
        low = scores.amax(2) <= conf  # not so for NaN, which must be noticed
        image, row = low.logical_not().nonzero(as_tuple=True)
        return image, boxes[image, row], scores[image, row]


def load_network(
    weights: str | Path,
    *,
    device: torch.device,
    openvino_precision: str = "float32",
    nms: bool = False,
) -> tuple[Network, TrainedWith]:
    """The network of a checkpoint, on `device`, or of an exported file, and its training.

    With `nms`, of two branches the one whose boxes need suppression.  Raises UserError.
    """
    path = Path(weights)
    if not (path.is_dir() or path.suffix in {".onnx", ".xml", ".torchscript"}):
        model, trained = load_trained(weights, device=device, fuse=True, nms=nms)
        return model.requires_grad_(False), trained
    exported = open_exported(path, device, openvino_precision=openvino_precision)
    if nms and exported.end_to_end:
        raise UserError(f"{path}: has the end-to-end branch only; export it with --nms in-graph")
    size = exported.metadata.size
    return exported, TrainedWith(size[0] if size else None, exported.metadata.data)


def to_half(network: Network) -> None:
    """Let a Detector compute in float16; UserError for an exported file."""
    if not isinstance(network, Detector):
        raise UserError(
            "half precision is for checkpoints; for exported files give it to export.py"
        )
    network.to_half()


def runtime_of(network: Network) -> str:
    """What computes a network, with its precision: 'torch float32', 'openvino int8, bf16'."""
    if isinstance(network, Exported):
        return network.runtime
    return f"torch {str(network.input_type).removeprefix('torch.')}"


def open_exported(
    path: Path, device: torch.device, *, openvino_precision: str = "float32"
) -> Exported:
    """A file (or folder) of export.py, ready to run. Raises UserError.

    `openvino_precision` is one of OPENVINO_PRECISIONS.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".onnx":
        required("onnxruntime")
        runtime, opener = "onnxruntime", _onnx
    elif path.suffix == ".torchscript":
        runtime, opener = "torchscript", _torchscript
    else:
        required("openvino")
        runtime, opener = "openvino", partial(_openvino, precision=openvino_precision)
    try:
        text, run = opener(path, device)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be opened: {cause_of(error)}") from error
    exported = Exported(Metadata.from_text(text, path), run, runtime)
    if runtime == "openvino" and openvino_precision != "float32":
        exported.runtime += f", {openvino_precision}"
    return exported


def required(name: str) -> None:
    """Raise UserError, with the line for pip, where a format or package is not installed."""
    missing = [p for p in PACKAGES.get(name, (name,)) if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"{name} needs packages that are missing: pip install {' '.join(missing)}")


def without_telemetry(name: str) -> Any:
    """onnxruntime, openvino or nncf, imported such that it reports nothing to its makers' servers.

    They do so unasked; OpenVINO even from a forked process, which can hang in the linker's lock.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # not importable
    return importlib.import_module(name)


def _onnx(path: Path, device: torch.device) -> tuple[str | None, Run]:
    onnxruntime = without_telemetry("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    available = onnxruntime.get_available_providers()
    providers = [provider for provider in wanted if provider in available]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    return text, lambda images: session.run(None, {"images": images})


def run_openvino(file: Path, *, precision: str = "float32") -> Run:
    """An .xml or .onnx file in OpenVINO, on the CPU, in one of OPENVINO_PRECISIONS."""
    openvino = without_telemetry("openvino")
    hints: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision != "auto":  # its default is bfloat16 where possible, which moves boxes by pixels
        hints["INFERENCE_PRECISION_HINT"] = {"float32": "f32"}.get(precision, precision)
    compiled = openvino.Core().compile_model(file, "CPU", hints)
    # a request of its own, since threads may share a network
    return lambda images: [*compiled.create_infer_request().infer([images]).values()]


def _openvino(path: Path, device: torch.device, *, precision: str) -> tuple[str | None, Run]:
    files = sorted(path.glob("*.xml")) if path.is_dir() else [path]
    if len(files) != 1:
        inside = (
            file for name in ("best.pt", "weights/best.pt") if (file := path / name).is_file()
        )
        hint = "".join(f"; use {file}" for file in inside)  # the folder of a run
        cause = f"no folder of an OpenVINO model: {len(files)} .xml files in it{hint}"
        raise UserError(f"{path}: {cause}")
    stated = files[0].with_name(f"{KEY}.json")
    text = stated.read_text(encoding="utf-8") if stated.is_file() else None
    return text, run_openvino(files[0], precision=precision)


def _torchscript(path: Path, device: torch.device) -> tuple[str | None, Run]:
    kept = {KEY: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about its own format
        module = torch.jit.load(path, map_location=device, _extra_files=kept)
    text = kept[KEY]

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            found = module(torch.from_numpy(images).to(device))
        return [item.cpu().numpy() for item in found]

    return text.decode() if isinstance(text, bytes) else text, run

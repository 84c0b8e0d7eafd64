"""The fastest runtime for a checkpoint on this CPU, by an export that is kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch

from data.index.cache import cache_file
from engine.checkpoint import load_trained
from engine.export.formats import Exportable, onnx_bytes
from engine.export.metadata import FORMAT, Metadata
from engine.export.runtime import (
    Exported,
    Network,
    open_exported,
    required,
    run_openvino,
    runtime_of,
)
from models.detector import Detector
from utils.errors import UserError, cause_of
from utils.files import write_bytes, write_text
from utils.terminal import say, warn

RUNTIMES = ("onnxruntime", "openvino")
CPU = torch.device("cpu")
ROUNDS = 5  # of one image in each runtime; the median counts


def export_file(weights: str | Path, *, end_to_end: bool = False) -> Path:
    """Where the export of a checkpoint is kept; another content or version is another file."""
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:32]
    folder = cache_file("exports", "").parent / "exports"
    form = "-e2e" if end_to_end else ""
    return folder / f"{digest}{form}-{FORMAT}-{torch.__version__}.onnx"


def in_runtime(
    weights: Any, model: Network, runtime: str, size: int, *, openvino_precision: str = "float32"
) -> Network:
    """The checkpoint's network in `runtime` on a CPU; 'auto': in the fastest one at `size` pixels.

    Exports and measures once for each checkpoint; prints a line.  Where that fails with 'auto',
    PyTorch, with a warning.  What is not a checkpoint, or not on a CPU, stays as it is with 'auto'.
    Raises UserError for any other runtime there, and for one that is not installed.
    """
    if runtime not in {"auto", "torch", *RUNTIMES}:
        raise UserError(f"runtime {runtime}: expected auto, torch, {' or '.join(RUNTIMES)}")
    of_file = isinstance(model, Detector) and not isinstance(weights, Detector)
    on_cpu = of_file and next(model.parameters()).device.type == "cpu"  # type: ignore[attr-defined]
    if runtime == "torch" or not on_cpu:
        if runtime in RUNTIMES and not runtime_of(model).startswith(runtime):
            raise UserError(f"--runtime {runtime} is for checkpoints on a CPU (--device cpu)")
        return model
    names = [name for name in RUNTIMES if importlib.util.find_spec(name)]
    if runtime != "auto":
        required(runtime)
        names = [runtime]
    if not names:
        return model
    try:
        required("onnx")
        end_to_end = model.end_to_end
        file = export_file(weights, end_to_end=end_to_end)
        if not file.is_file():
            say(f"{weights}: exporting once for {' and '.join(names)} (--runtime torch does not)")
            plain, _ = load_trained(weights, device=CPU, fuse=True, nms=not end_to_end)
            head = type(plain.head).__name__
            metadata = Metadata(
                plain.names, plain.max_stride, None, None, head, "", end_to_end=end_to_end
            )
            network = Exportable(plain.to(memory_format=torch.contiguous_format), half=False)
            images = torch.rand(2, 3, model.max_stride * 2, model.max_stride * 3)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, onnx_bytes(network.eval().requires_grad_(False), images, metadata))
        networks: dict[str, Network] = {
            name: opened(file, name, openvino_precision) for name in names
        }
    except Exception as error:
        if runtime != "auto":
            raise
        warn(f"warning: {weights}: runs in PyTorch, the export failed: {cause_of(error)}")
        return model
    if runtime != "auto":
        return networks[runtime]
    networks["torch"] = model
    times = _times(file, networks, size, openvino_precision)
    best, *_ = order = sorted(times, key=times.__getitem__)
    listed = ", ".join(f"{name} {times[name]:.0f} ms" for name in order)
    how = f" ({openvino_precision})" * (best == "openvino" and openvino_precision != "float32")
    say(f"{weights}: runs in {best}{how} (an image of {size} pixels: {listed}); --runtime chooses")
    return networks[best]


def opened(file: Path, runtime: str, openvino_precision: str) -> Exported:
    """A kept export in `runtime`."""
    exported = open_exported(file, CPU)
    if runtime == "onnxruntime":
        return exported
    return Exported(exported.metadata, run_openvino(file, precision=openvino_precision), runtime)


@torch.inference_mode()
def _times(
    file: Path, networks: dict[str, Network], size: int, openvino_precision: str
) -> dict[str, float]:
    """Milliseconds for an image in each runtime, in turn; kept next to `file`."""
    key = f"{size}, {torch.get_num_threads()} threads, {openvino_precision}"
    kept_in = file.with_suffix(".json")
    kept: dict[str, dict[str, float]] = {}
    with contextlib.suppress(Exception):
        kept = dict(json.loads(kept_in.read_text(encoding="utf-8")))
        return {name: float(kept[key][name]) for name in networks}
    image = torch.rand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    found: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(ROUNDS + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            network.detect(image, 0.25)
            found[name].append(1000 * (time.perf_counter() - start))
    times = {name: sorted(values[1:])[ROUNDS // 2] for name, values in found.items()}
    write_text(kept_in, json.dumps({**kept, key: times}))
    return times

"""Checkpoints: tensors and plain values, complete or absent, read without running code."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.builder import build_detector
from models.detector import Detector
from models.spec import ModelSpec
from models.weights.restricted import open_pickled
from models.weights.yolov5 import load_all, read_yolov5, to_detector
from utils.config import MAX_PIXELS
from utils.errors import UserError, cause_of
from utils.files import write_bytes

FORMAT = "featherdet-1"
SCALARS = (str, int, float)
LISTED = 8  # names shown of a longer list


def save_checkpoint(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write `payload` (tensors, dicts, lists, tuples, text, numbers, None) to `path`, atomically.

    `format` is added; tensors are stored on the CPU.  Raises TypeError naming the key of another
    kind of value, UserError when writing fails; the previous file then stays as it was.
    """
    buffer = io.BytesIO()
    torch.save(_checked({"format": FORMAT, **payload}, "checkpoint"), buffer)
    write_bytes(Path(path), buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint`; tensors on the CPU, no code is run.

    Raises UserError 'FILE: not a checkpoint: cause'.
    """
    content = _own_content(Path(path))
    if content is None:
        raise UserError(
            f"{path}: not a checkpoint: not written by FeatherDet (no 'format'); a YOLOv5 file can "
            "be given as --weights, but not resumed"
        )
    return content


def _own_content(path: Path) -> dict[str, Any] | None:
    """What FeatherDet wrote to `path`; None for another program's file."""
    with open_pickled(path) as pickled:
        if type(pickled.root) is not dict or "format" not in pickled.root:
            return None
    try:
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not compare checksums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a checkpoint: {cause}") from error
    if damaged is not None:
        raise UserError(f"{path}: not a checkpoint: damaged, the checksum of {damaged} is wrong")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UserError(f"{path}: format {found!r} is not known, expected {FORMAT!r}")
    return content


@dataclass(frozen=True)
class TrainedWith:
    """What a checkpoint tells of its training; nothing where it does not."""

    image_size: int | None = None  # pixels
    data: str = ""  # data set YAML, by path or name


def load_trained(
    weights: str | Path, *, device: torch.device | str, fuse: bool = False, nms: bool = False
) -> tuple[Detector, TrainedWith]:
    """The complete detector of a FeatherDet or YOLOv5 checkpoint, in eval mode, on `device`.

    The weights are channels_last, as the images are, so that no forward pass converts them.
    Every tensor is loaded, or UserError lists what does not fit; weights that are not finite are
    refused.  With `fuse` it is for inference, see `Detector.fuse`; with `nms` of two branches the
    one whose boxes need suppression.
    """
    path = Path(weights)
    content = _own_content(path)
    if content:
        model, options = detector_of(content, path), content.get("config")
    else:
        imported = read_yolov5(path)
        model, options = to_detector(imported), imported.options
    require_finite(model.state_dict(), str(path))
    if fuse:
        model.fuse(nms=nms)
    size, data = (
        options.get(key) if isinstance(options, dict) else None for key in ("imgsz", "data")
    )
    trained = TrainedWith(
        image_size=size if type(size) is int and 0 < size <= MAX_PIXELS else None,
        data=data if isinstance(data, str) else "",
    )
    return model.to(device).to(memory_format=torch.channels_last).eval(), trained


def load_detector(
    weights: str | Path, *, device: torch.device | str, fuse: bool = False
) -> Detector:
    """`load_trained` without the second part."""
    return load_trained(weights, device=device, fuse=fuse)[0]


@dataclass(frozen=True)
class Weights:
    """The tensors of a FeatherDet or YOLOv5 checkpoint, and what its detector is like."""

    state: Mapping[str, Tensor]
    strides: tuple[int, ...]
    layout: tuple[int, ...]  # classes and anchors of the head's outputs, see `Head.layout`
    donor: Detector | None  # of a FeatherDet checkpoint

    def matching(self, model: Detector) -> dict[str, Tensor]:
        """The tensors that have the name and shape of one of the model's.

        The detection convolutions match only with as many classes and anchors, the anchors only
        with the same strides.
        """
        own, prefix = model.state_dict(), f"model.{len(model.layers) - 1}."
        found = {
            name: value
            for name, value in self.state.items()
            if name in own and own[name].shape == value.shape
        }
        if self.layout != model.head.layout:
            found = {name: x for name, x in found.items() if not name.startswith(f"{prefix}m.")}
        if self.strides != model.stride:
            found.pop(f"{prefix}anchors", None)
        return found


def read_weights(weights: str | Path) -> Weights:
    """The weights of a checkpoint; UserError for another file, or non-finite weights."""
    path = Path(weights)
    content = _own_content(path)
    if content:
        donor = detector_of(content, path)
        found = Weights(donor.state_dict(), donor.stride, donor.head.layout, donor)
    else:
        other = read_yolov5(path)
        layout = len(other.names), other.anchors.shape[1]
        found = Weights(other.state_dict, other.strides, layout, None)
    require_finite(found.state, str(path))
    return found


def transfer(model: Detector, weights: str | Path) -> str:
    """Load into `model` what matches of a checkpoint, see `Weights`.

    Returns the counts of tensors, the names of those not loaded, and the settings taken over, as
    text.  Raises UserError as `read_weights` does.
    """
    file = read_weights(weights)
    state, own, matching = file.state, model.state_dict(), file.matching(model)
    model.load_state_dict(matching, strict=False)
    lines = [f"{weights}: {len(matching)} of the model's {len(own)} tensors loaded"]
    for what, names in (
        ("not in the file", [name for name in own if name not in state]),
        ("of another shape", [name for name in own if name in state and name not in matching]),
        ("in the file but not in the model", [name for name in state if name not in own]),
    ):
        if names:
            more = ", ..." if len(names) > LISTED else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:LISTED])}{more}")
    if all(name in matching for name in own if name.startswith("model.0.")):
        lines += [f"  {text}" for text in _take_settings(model, file.donor)]
    return "\n".join(lines)


def _take_settings(model: Detector, donor: Detector | None) -> list[str]:
    """Give `model` the settings its stem's weights were trained with; the changes as text."""
    changed = []
    normalisation = donor.spec.normalisation if donor else None
    if normalisation is not None and normalisation != model.spec.normalisation:
        model.set_normalisation(*normalisation)
        mean, std = (" ".join(f"{value:g}" for value in item) for item in normalisation)
        changed.append(f"input: (image - mean) / std, mean {mean}, std {std}")
    if normalisation is None and model.spec.normalisation is not None:
        changed.append("input: the model's own normalisation stays, these weights had none")
    if donor and donor.backbone_epsilon != model.backbone_epsilon:
        model.set_backbone_epsilon(donor.backbone_epsilon)
        changed.append(f"BatchNorm of the backbone: epsilon {donor.backbone_epsilon:g}")
    return changed


def model_payload(model: Detector) -> dict[str, Any]:
    """What `load_detector` needs of `model`: spec, names and tensors (anchors among them)."""
    spec = without_folders(model.spec.to_dict())
    spec["layers"] = [without_folders(layer) for layer in spec["layers"]]
    return {"spec": spec, "names": list(model.names), "model": dict(model.state_dict())}


def without_folders(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with absolute paths cut to their names: they mean nothing on another machine."""
    return {
        key: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for key, value in values.items()
    }


def strip_checkpoint(path: str | Path) -> None:
    """Remove the training state (optimizer, raw weights) from a finished run's file."""
    save_checkpoint(path, {**load_checkpoint(path), "train_state": None})


def require_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError naming the first tensor with NaN or infinity."""
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise UserError(
                f"{where}: non-finite weights: {bad} of {value.numel()} values of {name} are NaN "
                "or infinite; use an earlier checkpoint"
            )


def detector_of(content: Mapping[str, Any], path: Path) -> Detector:
    """The complete detector of a checkpoint's `content`; UserError naming its `path` otherwise."""
    try:
        names = [str(name) for name in content["names"]]
        spec = ModelSpec.from_dict(content["spec"])
        model = build_detector(spec, classes=len(names), names=names)
        state = {name: value.detach() for name, value in content["model"].items()}
    except Exception as error:
        cause = cause_of(error)
        raise UserError(f"{path}: not a detector's checkpoint, or damaged: {cause}") from error
    load_all(model, state, str(path))
    return model


def _checked(value: Any, key: str) -> Any:
    """A copy in plain containers, tensors detached, on the CPU and without unused storage."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            found = f"{value.layout}, {value.device}"
            raise TypeError(f"{key} is a tensor without plain values ({found})")
        value = value.detach().cpu().as_subclass(Tensor)
        whole = value.untyped_storage().nbytes() == math.prod(value.shape) * value.element_size()
        return value if whole else value.clone()
    if value is None or isinstance(value, bool):
        return value
    for kind in SCALARS:  # torch.__version__ is a subclass of str, numpy.float64 of float
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        for name in value:
            if not (name is None or isinstance(name, SCALARS)):
                found = type(name).__name__
                raise TypeError(f"{key} has a {found} as a key, expected text or a number")
        return {
            _checked(name, key): _checked(item, f"{key}.{name}") for name, item in value.items()
        }
    if type(value) in {list, tuple}:
        return type(value)(_checked(item, f"{key}.{i}") for i, item in enumerate(value))
    raise TypeError(
        f"{key} is a {type(value).__name__}; a checkpoint holds tensors, dicts, lists, tuples, "
        "text, numbers and None only"
    )

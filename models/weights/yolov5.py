"""Genuine YOLOv5 checkpoints: their plain values and tensors, and a Detector built from them.

The format (names of keys, units of the anchors) is described in docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.builder import build_detector
from models.detector import Detector
from models.weights.restricted import Stub, TensorRef, open_pickled
from models.yaml.parser import parse_spec
from utils.errors import UserError

YAML_KEYS = ("nc", "depth_multiple", "width_multiple", "anchors", "activation", "backbone", "head")
MAX_VALUES = 20_000  # of an architecture; nested inside itself it would have no end
MAX_MODULES = 100_000  # likewise
MAX_TEXT = 200  # characters of a class name, or of a text in the architecture
MAX_INT = 1 << 60
LISTED = 8  # names shown of a longer list
ANCHOR_GRID = ".anchor_grid"  # v1 to v5 store the anchors a second time, in pixels
# plain values of torch's modules that decide what they compute
SETTINGS = (
    "kernel_size", "stride", "padding", "dilation", "groups", "eps", "negative_slope",
    "scale_factor", "mode", "ceil_mode", "add",
)  # fmt: skip
LEAVES = tuple(
    f"torch.nn.modules.{kind}."
    for kind in ("activation", "batchnorm", "conv", "pooling", "upsampling")
)


@dataclass(frozen=True)
class Imported:
    """Contents of a YOLOv5 checkpoint, without its code."""

    spec_yaml: dict[str, Any]  # the model file, with the checkpoint's own anchors and activation
    names: tuple[str, ...]
    strides: tuple[int, ...]  # pixels, per level
    anchors: Tensor  # (levels, A, 2) float32, pixels
    state_dict: dict[str, Tensor]  # model.<row>.<part>, floats as float32
    modules: Mapping[str, Stub]  # by path, for their classes and SETTINGS
    options: dict[str, Any]  # scalars among the flags of its training; {} before v7
    source: str  # file name and key, for messages


def read_yolov5(path: str | Path) -> Imported:
    """Read a pickled YOLOv5 detector (zip or raw pickle) without running anything of it.

    The averaged weights (`ema`) are taken where there are any.  Raises UserError naming the global
    of a payload, or what is missing or odd.
    """
    path = Path(path)
    with open_pickled(path) as pickled:  # which adds the path to errors
        key, network = _network(pickled.root)
        modules: dict[str, Stub] = {}
        refs: dict[str, TensorRef] = {}
        _walk("", network, modules, refs)
        rows = [name for name in modules if name.count(".") == 1]
        head = rows[-1] if rows else ""
        kind = modules[head].kind
        if kind != "models.yolo.Detect":
            raise UserError(f"the last row is {kind}, expected models.yolo.Detect (a detector)")
        state = {name: pickled.tensor(ref) for name, ref in refs.items()}
        state = {name: v.float() if v.is_floating_point() else v for name, v in state.items()}
        stride: Any = modules[head].state.get("stride", network.state.get("stride", ()))
        if isinstance(stride, TensorRef):
            stride = pickled.tensor(stride).flatten().tolist()
        strides = tuple(int(value) for value in stride)
        if not strides or min(strides) < 1 or list(strides) != list(stride):
            raise UserError("no usable 'stride' (pixels per cell of each level)")
        anchors = _anchors(state, head, strides)
        return Imported(
            spec_yaml=_yaml(network, anchors, modules),
            names=_names(network),
            strides=strides,
            anchors=anchors,
            state_dict={k: v for k, v in state.items() if not k.endswith(ANCHOR_GRID)},
            modules=modules,
            options=_options(pickled.root),
            source=f"{path.name} ({key})",
        )


def to_detector(imported: Imported) -> Detector:
    """Build the checkpoint's own architecture and load every tensor into it.

    Raises UserError listing the tensors that do not fit, and for modules that differ from the
    file's in what they compute: a partial load is refused.
    """
    where = imported.source
    spec = parse_spec(imported.spec_yaml, where)
    model = build_detector(spec, classes=len(imported.names), names=imported.names)
    load_all(model, imported.state_dict, where)
    if model.stride != imported.strides:
        raise UserError(f"{where}: strides {imported.strides}, but the rows give {model.stride}")
    for name, module in model.named_modules():
        stub = imported.modules.get(name)
        if stub is None:
            continue
        own = type(module).__name__
        if stub.kind.startswith(LEAVES) and stub.kind.rpartition(".")[2] != own:
            raise UserError(f"{where}: {name} is a {stub.kind}, not {own}")
        for key in SETTINGS:
            value = stub.state.get(key)
            mine = getattr(module, key, value)
            if type(value) in {bool, int, float, str, tuple} and _pair(mine) != _pair(value):
                raise UserError(f"{where}: {name} has {key} {_shown(value)}, built with {mine!r}")
    return model


def load_all(model: Detector, state: Mapping[str, Tensor], where: str) -> None:
    """Load `state` into `model`; UserError with a list unless every name and shape fits."""
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unused = [name for name in state if name not in own]
    unfit = [
        f"{name} {_shape(value)} for {_shape(own[name])}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    if missing or unused or unfit:
        fused = missing and all(".bn." in name for name in missing)
        hint = "; a fused model cannot be imported" if fused else ""
        raise UserError(
            f"{where}: the tensors are not this model's: {_listed('missing', missing)}, "
            f"{_listed('unknown', unused)}, {_listed('of another shape', unfit)}{hint}"
        )
    model.load_state_dict(dict(state))


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _listed(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(names)} {what}{f' ({shown})' if names else ''}"


def _network(root: Any) -> tuple[str, Stub]:
    """The network in the file and its key: the averaged one where there is one."""
    entries = {"whole": root}
    if type(root) is dict:
        entries = {key: root.get(key) for key in ("ema", "model")}
    for key, value in entries.items():
        if isinstance(value, Stub):
            if value.kind.startswith("models.yolo."):
                return key, value
            raise UserError(f"{key} is a {value.kind}, expected a models.yolo.Model of YOLOv5")
    found = type(root).__name__
    if type(root) is dict:
        found = ", ".join(str(key)[:40] for key in list(root)[:LISTED])
    raise UserError(f"contains no detector, neither FeatherDet's nor YOLOv5's (found: {found})")


def _walk(name: str, stub: Stub, modules: dict[str, Stub], tensors: dict[str, TensorRef]) -> None:
    """Add the modules of a pickled nn.Module by path, and its tensors by state-dict name."""
    if len(modules) >= MAX_MODULES:
        raise UserError("a network nested too deeply; refused")
    modules[name] = stub
    hidden = stub.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers", "_modules"):
        for part, value in stub.state.get(kind, {}).items():
            fits = value is None or isinstance(value, Stub if kind == "_modules" else TensorRef)
            if not fits or type(part) is not str or len(part) > MAX_TEXT:
                raise UserError(f"not a checkpoint: odd {kind} of a {stub.kind}")
            below = f"{name}.{part}" if name else part
            if isinstance(value, Stub):
                _walk(below, value, modules, tensors)
            elif value is not None and part not in hidden:
                tensors[below] = value


def _anchors(state: Mapping[str, Tensor], head: str, strides: tuple[int, ...]) -> Tensor:
    """(levels, A, 2) pixels, from the buffer in units of the stride."""
    cells = state.get(f"{head}.anchors")
    if cells is None or cells.ndim != 3 or cells.shape[0] != len(strides) or cells.shape[2] != 2:
        raise UserError(f"no usable anchors of shape ({len(strides)}, A, 2) in {head}")
    if not (torch.isfinite(cells).all() and (cells > 0).all()):
        raise UserError(f"{head}.anchors are not all over 0")
    pixels = cells * torch.tensor(strides, dtype=torch.float32).view(-1, 1, 1)
    again = state.get(f"{head}{ANCHOR_GRID}", pixels).flatten()
    if again.shape != (pixels.numel(),) or not again.allclose(pixels.flatten(), rtol=1e-2):
        raise UserError("anchor_grid is not anchors times stride; the units are unclear")
    return pixels


def _names(network: Stub) -> tuple[str, ...]:
    names: Any = network.state.get("names")
    if type(names) is dict:
        names = [names.get(index, names.get(str(index))) for index in range(len(names))]
    texts = type(names) in {list, tuple} and all(type(n) is str and _is_scalar(n) for n in names)
    if not names or not texts:
        raise UserError("no usable class names in the checkpoint")
    count = network.state.get("nc", len(names))
    if count != len(names):
        raise UserError(f"{len(names)} class names, but nc is {_shown(count)}")
    return tuple(names)


def _options(root: Any) -> dict[str, Any]:
    found = root.get("opt") if type(root) is dict else None
    pairs = found.items() if type(found) is dict else ()
    return {key: value for key, value in pairs if type(key) is str and _is_scalar(value)}


def _yaml(network: Stub, anchors: Tensor, modules: Mapping[str, Stub]) -> dict[str, Any]:
    """The model file in the checkpoint, completed by what later changed: anchors, activation."""
    found = network.state.get("yaml")
    if type(found) is not dict:
        raise UserError("no 'yaml' (the architecture as plain values) in the checkpoint")
    if found.get("ch", 3) != 3:
        raise UserError(f"a network for {_shown(found['ch'])} image channels, expected 3")
    left = iter(range(MAX_VALUES))
    data = {key: _plain(found[key], left) for key in YAML_KEYS if found.get(key) is not None}
    data["anchors"] = anchors.flatten(1).tolist()
    if "activation" not in data:
        # before v7 the code's version implied the activation, so the modules have to name it
        kinds = set()
        for name, stub in modules.items():
            act = modules.get(f"{name}.act")
            if stub.kind == "models.common.Conv" and act is not None:
                slope = act.state.get("negative_slope")
                argument = "" if slope is None else f"({_shown(slope)})"
                kinds.add(act.kind.rpartition(".")[2] + argument)
        kinds.discard("Identity")
        if len(kinds) == 1:
            data["activation"] = kinds.pop()
    return data


def _plain(value: Any, left: Iterator[int], depth: int = 8) -> Any:
    """A copy of nested lists and dicts of scalars, of as many values as `left` has."""
    if depth and next(left, None) is not None:
        if _is_scalar(value):
            return value
        if type(value) in {list, tuple}:
            return [_plain(item, left, depth - 1) for item in value]
        if type(value) is dict and all(map(_is_scalar, value)):
            return {str(k): _plain(item, left, depth - 1) for k, item in value.items()}
    raise UserError("the architecture ('yaml') is not a table of plain values; refused")


def _is_scalar(value: Any) -> bool:
    """None or a scalar of bounded length when printed."""
    if type(value) is str:
        return len(value) <= MAX_TEXT
    if type(value) is int:
        return abs(value) < MAX_INT
    return value is None or type(value) in {float, bool}


def _shown(value: Any) -> str:
    items = value[:LISTED] if type(value) is tuple else (value,)
    return repr(value) if all(map(_is_scalar, items)) else f"a {type(value).__name__}"


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, (int, float)) else value

"""Genuine YOLOv5 checkpoints: their plain values and tensors, and a Detector built from them.

Facts of the format (names of keys, units of the anchors) are in docs/checkpoints.md.
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
from models.weights.archive import Pickled, open_pickled
from models.weights.pickled import MAX_KEY, Stub, TensorRef
from models.weights.stubtree import Tree, all_tensors, walk
from models.yaml.parser import parse_spec
from utils.errors import UserError

YAML_KEYS = ("nc", "depth_multiple", "width_multiple", "anchors", "activation", "backbone", "head")
MAX_VALUES = 20_000  # of an architecture; nested inside itself it would have no end
MAX_NAME = 200  # characters
MAX_STRIDE = 4096
MAX_TUPLE = 6  # of one setting, e.g. a kernel's two sides
LISTED = 8  # names shown of a longer list
# plain values of torch's modules that decide what they compute
# fmt: off
DECISIVE = (
    "kernel_size", "stride", "padding", "dilation", "groups", "eps", "negative_slope",
    "scale_factor", "mode", "ceil_mode", "add",
)
# fmt: on
LEAVES = tuple(
    f"torch.nn.modules.{kind}."
    for kind in ("activation", "batchnorm", "conv", "pooling", "upsampling")
)


@dataclass(frozen=True)
class Imported:
    """What a YOLOv5 checkpoint says, and nothing of its code."""

    spec_yaml: dict[str, Any]  # the model file, with the checkpoint's own anchors and activation
    names: tuple[str, ...]
    strides: tuple[int, ...]  # pixels, per level
    anchors: Tensor  # (levels, A, 2) float32, pixels
    state_dict: dict[str, Tensor]  # model.<row>.<part>, floats as float32
    parts: Mapping[str, Mapping[str, Any]]  # per module: its class (`kind`) and decisive values
    ignored: tuple[str, ...]  # tensors of the file that are no part of the network
    source: str  # file name and key, for messages


def read_yolov5(path: str | Path) -> Imported:
    """Read a pickled YOLOv5 detector (zip or raw pickle) without running anything of it.

    The averaged weights (`ema`) are taken where there are any.  Raises UserError naming the global
    of a payload, or what is missing or odd.
    """
    path = Path(path)
    with open_pickled(path) as pickled:
        key, network = _network(path, pickled.root)
        tree = walk(path, network)
        detect = _detect(path, tree)
        strides = _strides(pickled, network, detect)
        state = {name: _float(pickled.tensor(ref)) for name, ref in tree.tensors.items()}
        ignored = _ignored(pickled, tree)
    head = next(name for name, stub in tree.modules.items() if stub is detect)
    anchors = _anchors(path, state, head, strides)
    names = _names(path, network)
    parts = {name: _facts(stub) for name, stub in tree.modules.items()}
    return Imported(
        spec_yaml=_yaml(path, network, anchors=anchors, parts=parts),
        names=names,
        strides=strides,
        anchors=anchors,
        state_dict=state,
        parts=parts,
        ignored=ignored,
        source=f"{path.name} ({key})",
    )


def to_detector(imported: Imported) -> Detector:
    """Build the checkpoint's own architecture and load every tensor into it.

    Raises UserError listing the tensors that do not fit, and for modules that compute otherwise
    than the file's: a partial load is refused.
    """
    where = imported.source
    spec = parse_spec(imported.spec_yaml, where)
    model = build_detector(spec, classes=len(imported.names), names=imported.names)
    # v1-v5 keep the anchors a second time, in pixels (checked on reading)
    given = {k: v for k, v in imported.state_dict.items() if not k.endswith(".anchor_grid")}
    load_all(model, given, where)
    if model.stride != imported.strides:
        raise UserError(f"{where}: strides {imported.strides}, but the rows give {model.stride}")
    _check_parts(model, imported)
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
    model.load_state_dict(dict(state), strict=True)


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "scalar"


def _listed(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(names)} {what}{f' ({shown})' if names else ''}"


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _network(path: Path, root: Any) -> tuple[str, Stub]:
    """The network in the file: the averaged one where there is one."""
    candidates: dict[str, Any] = {"whole": root}
    if type(root) is dict:
        candidates = {key: root.get(key) for key in ("ema", "model")}
    for key, value in candidates.items():
        if not isinstance(value, Stub):
            continue
        if value.kind.startswith("ultralytics."):
            raise UserError(f"{path}: a {value.kind}, which is no YOLOv5 model")
        if value.kind.startswith("models.yolo."):
            return key, value
        raise UserError(f"{path}: {key} is a {value.kind}, expected a models.yolo.Model")
    held = (
        ", ".join(str(key)[:40] for key in list(root)[:LISTED])
        if type(root) is dict
        else type(root).__name__
    )
    raise UserError(f"{path}: holds no detector, neither FeatherDet's nor YOLOv5's (found: {held})")


def _ignored(pickled: Pickled, tree: Tree) -> tuple[str, ...]:
    """Tensors that are no part of the network, and bytes that no tensor refers to."""
    used = {id(ref) for ref in tree.tensors.values()}
    tensors = all_tensors(pickled.root)
    names = [name for name, ref in tensors.items() if id(ref) not in used]
    bare = pickled.keys - {ref.storage.key for ref in tensors.values()}
    return (*sorted(names), *(f"data/{key}" for key in sorted(bare)))


def _detect(path: Path, tree: Tree) -> Stub:
    rows = [stub for name, stub in tree.modules.items() if name.count(".") == 1]
    last = rows[-1] if rows else None
    if last is None or last.kind != "models.yolo.Detect":
        found = last.kind if last else "nothing"
        raise UserError(
            f"{path}: the last row is {found}, expected models.yolo.Detect (a detector)"
        )
    return last


def _strides(pickled: Pickled, network: Stub, detect: Stub) -> tuple[int, ...]:
    value = detect.state.get("stride", network.state.get("stride"))
    values: Any = (
        pickled.tensor(value).flatten().tolist() if isinstance(value, TensorRef) else value
    )
    if type(values) not in {list, tuple} or not all(
        isinstance(v, (int, float)) and 1 <= v <= MAX_STRIDE and v == int(v) for v in values
    ):
        raise UserError(f"{pickled.path}: no usable 'stride' (pixels per cell of each level)")
    return tuple(int(v) for v in values)


def _anchors(
    path: Path, state: Mapping[str, Tensor], head: str, strides: tuple[int, ...]
) -> Tensor:
    """(levels, A, 2) pixels, from the buffer in units of the stride."""
    cells = state.get(f"{head}.anchors")
    if cells is None or cells.ndim != 3 or cells.shape[0] != len(strides) or cells.shape[2] != 2:
        raise UserError(f"{path}: no usable anchors of shape ({len(strides)}, A, 2) in {head}")
    if not (torch.isfinite(cells).all() and (cells > 0).all()):
        raise UserError(f"{path}: {head}.anchors are not all over 0")
    pixels = cells * torch.tensor(strides, dtype=torch.float32).view(-1, 1, 1)
    again = state.get(f"{head}.anchor_grid")
    if again is not None and not (
        again.numel() == pixels.numel()
        and torch.allclose(again.reshape(pixels.shape), pixels, rtol=1e-2)
    ):
        raise UserError(f"{path}: anchor_grid is not anchors times stride; the units are unclear")
    return pixels


def _names(path: Path, network: Stub) -> tuple[str, ...]:
    names: Any = network.state.get("names")
    if type(names) is dict and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [names.get(i, names.get(str(i))) for i in range(len(names))]
    if (
        type(names) not in {list, tuple}
        or not names
        or any(type(n) is not str or len(n) > MAX_NAME for n in names)
    ):
        raise UserError(f"{path}: no usable class names in the checkpoint")
    count = network.state.get("nc", len(names))
    if count != len(names):
        raise UserError(f"{path}: {len(names)} class names, but nc is {_shown(count)}")
    return tuple(names)


def _yaml(
    path: Path, network: Stub, *, anchors: Tensor, parts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The model file in the checkpoint, completed by what later changed: anchors, activation."""
    found = network.state.get("yaml")
    if type(found) is not dict:
        raise UserError(f"{path}: no 'yaml' (the architecture as plain values) in the checkpoint")
    if found.get("ch", 3) != 3:
        raise UserError(f"{path}: a network for {_shown(found['ch'])} image channels, expected 3")
    left = iter(range(MAX_VALUES))
    data = {key: _plain(path, found[key], left) for key in YAML_KEYS if found.get(key) is not None}
    data["anchors"] = anchors.flatten(1).tolist()
    if "activation" not in data:
        # before v7 the activation was a matter of the code's version, so the modules have to say it
        kinds = {
            _activation(parts[f"{name}.act"])
            for name, facts in parts.items()
            if facts["kind"] == "models.common.Conv" and f"{name}.act" in parts
        } - {"Identity"}
        if len(kinds) == 1:
            data["activation"] = kinds.pop()
    return data


def _activation(facts: Mapping[str, Any]) -> str:
    name = str(facts["kind"]).rpartition(".")[2]
    slope = facts.get("negative_slope")
    return name if slope is None else f"{name}({slope})"


def _plain(path: Path, value: Any, left: Iterator[int], depth: int = 8) -> Any:
    """A copy of nested lists and dicts of scalars, of as many values as `left` has."""
    if depth and next(left, None) is not None:
        if _is_scalar(value):
            return value
        if type(value) in {list, tuple}:
            return [_plain(path, item, left, depth - 1) for item in value]
        if type(value) is dict:
            return {
                str(key)[:MAX_NAME]: _plain(path, item, left, depth - 1)
                for key, item in value.items()
            }
    raise UserError(f"{path}: the architecture ('yaml') is no table of plain values; refused")


def _is_scalar(value: Any) -> bool:
    """None or a scalar that can be printed: a list inside itself, or a vast number, cannot."""
    if type(value) is str:
        return len(value) <= MAX_NAME
    if type(value) is int:
        return abs(value) < MAX_KEY
    return value is None or type(value) in {float, bool}


def _shown(value: Any) -> str:
    return repr(value) if _is_scalar(value) else f"a {type(value).__name__}"


def _facts(stub: Stub) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": stub.kind}
    for key in DECISIVE:
        value = stub.state.get(key)
        items = value if type(value) is tuple and len(value) <= MAX_TUPLE else (value,)
        if value is not None and all(_is_scalar(item) for item in items):
            facts[key] = value
    return facts


def _check_parts(model: Detector, imported: Imported) -> None:
    """The built modules' classes and settings are the file's, so that both compute the same."""
    for name, module in model.named_modules():
        facts = imported.parts.get(name)
        if facts is None:
            continue
        kind = str(facts["kind"])
        if kind.startswith(LEAVES) and kind.rpartition(".")[2] != type(module).__name__:
            raise UserError(f"{imported.source}: {name} is a {kind}, not {type(module).__name__}")
        for key, value in facts.items():
            own = getattr(module, key, value) if key != "kind" else value
            if _pair(own) != _pair(value):
                raise UserError(
                    f"{imported.source}: {name} has {key} {value!r}, built with {own!r}"
                )


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, (int, float)) else value

"""Walking the inert module tree of a pickled network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.weights.pickled import Stub, TensorRef
from utils.errors import UserError

MAX_MODULES = 100_000
MAX_DEPTH = 32
MAX_NAME = 100  # characters of one module's name; the limits keep a small file from a giant tree
MAX_PATH = 400
CHILDREN = ("_modules", "_parameters", "_buffers")  # where nn.Module keeps them


@dataclass(frozen=True)
class Tree:
    """The network's modules by path, and its tensors by state-dict name."""

    modules: dict[str, Stub]
    tensors: dict[str, TensorRef]


def _children(path: Path, stub: Stub, kind: str) -> dict[str, Any]:
    children = stub.state.get(kind, {})
    if type(children) is not dict or not all(
        type(name) is str and len(name) <= MAX_NAME for name in children
    ):
        raise UserError(f"{path}: not a checkpoint: a {stub.kind} with odd {kind}")
    return {name: value for name, value in children.items() if value is not None}


def walk(path: Path, network: Stub) -> Tree:
    """The tree of a pickled nn.Module. Raises UserError, which starts with `path`."""
    tree = Tree({}, {})
    todo: list[tuple[str, Any]] = [("", network)]
    while todo:
        name, stub = todo.pop()
        if len(tree.modules) >= MAX_MODULES or name.count(".") > MAX_DEPTH:
            raise UserError(f"{path}: a network nested beyond reason; refused")
        if not isinstance(stub, Stub):
            raise UserError(f"{path}: not a checkpoint: module {name!r} is no module")
        tree.modules[name] = stub
        prefix = f"{name}." if name else ""
        hidden = stub.state.get("_non_persistent_buffers_set", ())
        for kind in ("_parameters", "_buffers"):
            for part, value in _children(path, stub, kind).items():
                if not isinstance(value, TensorRef):
                    raise UserError(f"{path}: not a checkpoint: {prefix}{part} is no tensor")
                if part not in hidden:
                    tree.tensors[prefix + part] = value
        children = [(prefix + part, v) for part, v in _children(path, stub, "_modules").items()]
        todo += reversed(children)
    return tree


def all_tensors(root: Any) -> dict[str, TensorRef]:
    """Every tensor of the file, by the first path that leads to it."""
    found: dict[str, TensorRef] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        name, value = todo.pop()
        if id(value) in seen or not isinstance(value, (TensorRef, Stub, dict, list, tuple)):
            continue
        seen.add(id(value))
        if isinstance(value, TensorRef):
            found[name] = value
            continue
        if isinstance(value, Stub):
            value = {**value.state, "args": value.args}
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            path = name if key in CHILDREN else f"{name}.{key}".lstrip(".")[:MAX_PATH]
            todo.append((path, item))
    return found

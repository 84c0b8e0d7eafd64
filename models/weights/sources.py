"""Layers of a pretrained network, with their weights, in the order in which they run.

A source is a network of timm's, or a file of tensors; no code of a file is ever run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.weights.leaves import PROBE, Leaf, leaves_of, misplaced, run_order, walk
from utils.errors import UserError, cause_of, nearest

TIMM = "timm:"
SUFFIXES = (".pth", ".pt", ".safetensors")
WRAPPERS = ("state_dict", "model")  # keys of the tensors in training scripts' checkpoints


@dataclass(frozen=True)
class Source:
    """Pretrained layers, in the order of registration and of execution."""

    name: str  # as the user gave it
    registered: tuple[Leaf, ...]
    executed: tuple[Leaf, ...]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # where known


def read_source(name: str) -> Source:
    """The weights of `timm:NAME`, or of a .pth, .pt or .safetensors file.

    Raises UserError for a missing file or package, an unknown name, a failed download, values that
    are not tensors, and tensors in no order.
    """
    if name.startswith(TIMM):
        return _timm_source(name)
    path = Path(name)
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"--backbone-weights {name}: expected timm:NAME or a file of {', '.join(SUFFIXES)}"
        )
    try:
        found = path.is_file()
    except OSError as error:  # e.g. a name that is too long
        raise UserError(f"--backbone-weights {path}: {error.strerror}") from error
    if not found:
        raise UserError(f"--backbone-weights {name}: the file does not exist")
    if path.suffix == ".safetensors":
        return source_of_tensors(name, _read_safetensors(path), ordered=False)
    return source_of_tensors(name, _read_torch(path))


def source_of_module(
    name: str,
    module: nn.Module,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Source:
    """The layers of a network that takes (B, 3, H, W). UserError when it cannot run."""
    found = leaves_of(module)
    try:
        executed = run_order(found, module)
    except Exception as error:
        raise UserError(
            f"{name}: cannot run on an image of {PROBE} px, so its order is unknown: "
            f"{cause_of(error)}"
        ) from error
    return Source(name, tuple(found.values()), executed, normalisation)


def source_of_tensors(name: str, state: Mapping[str, Tensor], *, ordered: bool = True) -> Source:
    """The layers of a state dict; `ordered`: as torch wrote it, else by known names alone.

    Raises UserError where neither the file nor the names give an order.
    """
    wrong = misplaced(state) if ordered else None
    if wrong:
        raise UserError(
            f"{name}: {wrong} is not where a network has it, so the file's order is not that of"
            " its layers; save the state_dict() of the model as it is"
        )
    groups: dict[str, dict[str, Tensor]] = {}
    tree: dict[str, Any] = {}
    for key, value in state.items():
        module, _, tensor = key.removeprefix("module.").rpartition(".")
        groups.setdefault(module, {})[tensor] = value
        node = tree
        for part in module.split("."):
            node = node.setdefault(part, {})
    registered, executed = (
        tuple(
            Leaf(module, groups[module])
            for module in walk(tree, name, ordered=ordered, executed=executed)
            if module in groups
        )
        for executed in (False, True)
    )
    return Source(name, registered, executed)


def _timm_source(name: str) -> Source:
    timm = _optional("timm", name)
    model_name = name.removeprefix(TIMM)
    base = model_name.partition(".")[0]
    if not timm.is_model(base):
        raise UserError(
            f"--backbone-weights {name}: timm {timm.__version__} has no model"
            f" {base!r}{nearest(base, timm.list_models())}"
        )
    try:
        with _tensors_only():
            network = timm.create_model(model_name, pretrained=True)
    except Exception as error:  # of any of the libraries that timm downloads and reads with
        raise UserError(
            f"--backbone-weights {name}: timm could not load the weights ({cause_of(error)}); they"
            " are downloaded once into timm's cache: check the name and the network, or give a file"
        ) from error
    config = network.pretrained_cfg
    mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
    return source_of_module(name, network, (mean, std))


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """While inside, torch.load runs no code of a file, whatever its caller asks for."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _optional(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        install = package.partition(".")[0]
        raise UserError(
            f"--backbone-weights {name}: needs {install}, which is not installed:"
            f" pip install {install}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _optional("safetensors.torch", str(path))
    try:
        tensors: dict[str, Tensor] = safetensors.load_file(path)
    except Exception as error:
        raise UserError(f"{path}: not a .safetensors file: {cause_of(error)}") from error
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        cause = cause_of(error)
        if type(error).__name__ == "UnpicklingError":  # torch's text advises to trust the file
            cause = "it contains other objects, or is damaged"
        raise UserError(
            f"{path}: not a file of tensors ({cause}); save the model's state_dict()"
        ) from error
    if isinstance(content, dict) and "format" in content and "spec" in content:
        raise UserError(f"{path}: a whole detector of FeatherDet; give it as --weights")
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(
            f"{path}: no tensors by name, neither at the top nor under {' or '.join(WRAPPERS)}"
        )
    return tensors

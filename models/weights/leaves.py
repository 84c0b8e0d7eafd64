"""Layers with weights, and the order in which they run: of a network, and of a list of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

PROBE = 64  # pixels of the image that shows the order of execution
# what decides, besides the weights, what a layer computes
SETTINGS = ("stride", "padding", "dilation", "groups", "eps")
COUNTER = "num_batches_tracked"  # of BN; no result depends on it
STATISTICS = ("running_mean", "running_var", COUNTER)

# Neighbours that are registered in another order than they run in.
# fmt: off
STORED_LATER = (
    ("short_conv", "primary_conv"),  # GhostNetV2 of timm: the gate runs first
    ("branch_proj", "branch_main"),  # ShuffleNetV2 of its authors
)
# Neighbours in the order of their registration, for files without one of their own (.safetensors is
# sorted by name); the first row with all the names of a module counts.
KNOWN_ORDER = tuple(row.split() for row in (
    "conv_stem bn1 blocks conv_head bn2 classifier",            # timm: GhostNet, MixNet, MobileNet
    "primary_conv cheap_operation short_conv",                  # Ghost module
    "ghost1 conv_dw bn_dw se ghost2 shortcut",                  # Ghost bottleneck
    "conv_dw bn1 se conv_pw bn2",                               # depthwise separable
    "conv_pw bn1 conv_dw bn2 se conv_pwl bn3",                  # inverted residual
    "conv_reduce conv_expand",                                  # SE
    "fc1 fc2",
    "conv_reduction conv_mid conv_concat attn",                 # OSA
    "conv_dw conv_pw bn",
    "conv bn",
    "conv bn1",
    "stem stages head",
    "conv1 bn1 layer1 layer2 layer3 layer4 fc",                 # ResNet
    "conv1 bn1 conv2 bn2 conv3 bn3 downsample",
    "conv1 stage2 stage3 stage4 conv5 fc",                      # ShuffleNetV2 of torchvision
    "branch1 branch2",
    "features classifier",
    "conv0 norm0 denseblock1 transition1 denseblock2 transition2 denseblock3 transition3 "
    "denseblock4 norm5",                                        # DenseNet
    "norm1 conv1 norm2 conv2",
    "norm conv",
))
# fmt: on


@dataclass(frozen=True)
class Leaf:
    """A layer with weights of its own: a convolution, a linear layer, a normalisation, other."""

    name: str  # the module's, dotted
    tensors: Mapping[str, Tensor]  # by name in the module: weight, bias, running_mean, ...
    settings: Mapping[str, Any] = field(default_factory=dict)  # those known of SETTINGS

    @property
    def signature(self) -> tuple[str, tuple[Any, ...]]:
        """Kind and shapes, by which layers correspond; a linear layer is a 1x1 convolution."""
        weight = self.tensors.get("weight")
        kind = "other"
        if "running_mean" in self.tensors:
            kind = "normalisation"
        elif weight is not None and weight.ndim in {2, 4}:
            kind = "convolution"
        shapes = sorted((key, self.shape(key)) for key in self.tensors if key != COUNTER)
        return kind, tuple(shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; of a linear layer's weight (out, in, 1, 1)."""
        shape = tuple(self.tensors[key].shape)
        return (*shape, 1, 1) if key == "weight" and len(shape) == 2 else shape

    @property
    def count(self) -> int:
        return sum(key != COUNTER for key in self.tensors)

    @property
    def parameters(self) -> int:
        """Number of trained values: all but running statistics."""
        return sum(value.numel() for key, value in self.tensors.items() if key not in STATISTICS)


def leaves_of(module: nn.Module, prefix: str = "") -> dict[nn.Module, Leaf]:
    """Modules with weights of their own, in order of registration."""
    found: dict[nn.Module, Leaf] = {}
    for name, part in module.named_modules(prefix=prefix):
        tensors: dict[str, Tensor] = dict(part.named_parameters(recurse=False))
        if tensors or isinstance(part, nn.BatchNorm2d):
            tensors.update(part.named_buffers(recurse=False))
            settings = {key: _pair(getattr(part, key)) for key in SETTINGS if hasattr(part, key)}
            found[part] = Leaf(name, tensors, settings)
    return found


def run_order(
    found: Mapping[nn.Module, Leaf], network: nn.Module, size: int = PROBE
) -> tuple[Leaf, ...]:
    """The layers in the order in which `network` calls them for one image, the rest at the end."""
    called: dict[nn.Module, Leaf] = {}

    def note(part: nn.Module, *_: Any) -> None:
        called.setdefault(part, found[part])

    handles = [part.register_forward_hook(note) for part in found]
    training = {part: part.training for part in network.modules()}
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, size, size, device=device))
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in training.items():
            part.training = mode
    return tuple({**called, **found}.values())


def grouped(leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
    """Neighbours `x.0`, `x.1`, ... of equal 1x1 convolutions as one grouped convolution `x`.

    timm writes the grouped convolutions of MixNet so.
    """
    runs: list[list[Leaf]] = []
    for leaf in leaves:
        run = runs[-1] if runs else []
        parent, _, number = leaf.name.rpartition(".")
        follows = number == str(len(run)) and run and run[0].name == f"{parent}.0"
        same = follows and run[0].signature == leaf.signature and "weight" in leaf.tensors
        if same and leaf.shape("weight")[2:] == (1, 1):
            run.append(leaf)
        else:
            runs.append([leaf])
    return tuple(run[0] if len(run) == 1 else _joined(run) for run in runs)


def _joined(run: Sequence[Leaf]) -> Leaf:
    tensors = {key: torch.cat([leaf.tensors[key] for leaf in run]) for key in run[0].tensors}
    settings = dict(run[0].settings)
    if "groups" in settings:
        settings["groups"] = (len(run), len(run))
    return Leaf(run[0].name.rpartition(".")[0], tensors, settings)


def misplaced(names: Iterable[str]) -> str | None:
    """The first dotted name apart from its siblings, or after a higher-numbered one."""
    current: dict[str, str] = {}  # by parent, the child that the list is in
    left: set[str] = set()
    for name in names:
        path = name.split(".")
        for depth, child in enumerate(path):
            parent = ".".join(path[:depth])
            before = current.get(parent, child)
            numbers = before.isdigit() and child.isdigit()
            if f"{parent}.{child}" in left or (numbers and int(before) > int(child)):
                return name
            if before != child:
                left.add(f"{parent}.{before}")
            current[parent] = child
    return None


def walk(tree: Mapping[str, Any], where: str, *, ordered: bool, executed: bool) -> Iterator[str]:
    """Dotted names of all nodes of a tree of modules, siblings in order.

    `ordered`: the tree is as it was registered, else known names decide (UserError for others);
    `executed`: in order of execution, else of registration.
    """
    names = list(tree) if ordered else _by_name(list(tree), where)
    for name in _run_order(names) if executed else names:
        yield name
        for below in walk(tree[name], where, ordered=ordered, executed=executed):
            yield f"{name}.{below}"


def _run_order(names: list[str]) -> list[str]:
    for first, second in STORED_LATER:
        if first in names and second in names and names.index(first) > names.index(second):
            names = [name for name in names if name != first]
            names.insert(names.index(second), first)
    return names


def _by_name(names: list[str], where: str) -> list[str]:
    for row in KNOWN_ORDER:
        if set(names) <= set(row):
            return [name for name in row if name in names]
    numbered = {name: re.fullmatch(r"(.*?)([0-9]+)", name) for name in names}
    stems = {match[1] if match else name for name, match in numbered.items()}
    if len(stems) > 1:
        raise UserError(
            f"{where}: a .safetensors file has no order of its own, and that of"
            f" {', '.join(sorted(names)[:4])} is not known; give timm:NAME, or a .pth file"
        )
    return sorted(names, key=lambda name: int(match[2]) if (match := numbered[name]) else 0)


def _pair(value: Any) -> Any:
    """(1, 1) for 1, as torch's convolutions have it."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

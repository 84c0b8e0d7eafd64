"""Weights of an ImageNet network into the backbone of a detector: by order and shape, by stage."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from models import registry
from models.detector import Detector
from models.spec import GraphSpec
from models.weights.leaves import Leaf, grouped, leaves_of, run_order
from models.weights.sources import Source
from utils.errors import UserError

MIN_SHARE = 0.95  # of the backbone's parameters; below it a transfer is likely a mistake
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # torchvision's and the authors' input
LISTED = 4  # layers named of a longer list
AFTER_TAPS, ALL = "after", "all"  # the stage of rows after the last tap; the last line

# Names of layers that decide between two forms of equal shapes: a part of the name, one that must
# not occur, the argument of our rows, and its value.
FORMS = (
    ("branch_main", "", "shuffle", "start"),  # ShuffleNetV2 of its authors
    ("branch2", "", "shuffle", "end"),  # of torchvision
    ("OSA[0-9]+_[0-9]+", "", "identity", True),  # VoVNet of its authors
    ("conv_mid", "attn", "identity", False),  # VoVNet of timm, VoVNetV2 has attention
)

Pairs = tuple[tuple[Leaf, Leaf], ...]


@dataclass(frozen=True)
class Transfer:
    """Which layers of a source go where in a backbone; nothing is changed before `apply`.

    In pairs the model's layer comes first.  Every layer of the backbone is in `loaded`, `unfit`
    (the source has another shape in its place) or `missing`.
    """

    source: str
    stages: Mapping[str, str]  # of every layer of the backbone, by name
    loaded: Pairs
    unfit: Pairs
    missing: tuple[Leaf, ...]
    unused: tuple[Leaf, ...]  # of the source
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]  # (mean, std) of images in [0, 1]

    @property
    def share(self) -> float:
        """Loaded part of the backbone's parameters."""
        loaded, *rest = map(_parameters, self._groups())
        return loaded / max(loaded + sum(rest), 1)

    def _groups(self) -> tuple[list[Leaf], list[Leaf], list[Leaf]]:
        """Layers of the backbone: loaded, missing, unfit."""
        loaded, unfit = ([leaf for leaf, _ in pairs] for pairs in (self.loaded, self.unfit))
        return loaded, list(self.missing), unfit

    def apply(self, model: Detector, *, allow_partial: bool = False) -> None:
        """Copy the weights into `model` and set its normalisation.

        Raises UserError, and changes nothing, when under 95 % of the parameters would be loaded
        (with `allow_partial`: none), or when some are not finite.
        """
        where = f"--backbone-weights {self.source}"
        if not self.loaded or (self.share < MIN_SHARE and not allow_partial):
            remedy = "" if allow_partial else ", --allow-partial"
            raise UserError(
                f"{where}: {_percent(self.share)} of the backbone's parameters would be loaded,"
                f" under {MIN_SHARE:.0%}: not the same network; another --backbone{remedy}"
                " or other weights"
            )
        for _, leaf in self.loaded:
            for key, value in leaf.tensors.items():
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise UserError(f"{where}: {leaf.name}.{key} is not finite")
        with torch.no_grad():
            for target, leaf in self.loaded:
                for key, value in target.tensors.items():
                    if key in leaf.tensors:  # old files have no counter of batches
                        value.copy_(leaf.tensors[key].reshape(value.shape))
        if (epsilon := self._epsilon()) is not None:
            model.set_backbone_epsilon(epsilon)
        model.set_normalisation(*self.normalisation)

    def text(self) -> str:
        """A table of tensors and parameters by stage, and everything else worth knowing."""
        groups = self._groups()
        lines = [
            f"{self.source} into the backbone: {_percent(self.share)} of"
            f" {sum(map(_parameters, groups)):,} parameters",
            f"  {'stage':<7}"
            + "".join(f"{head:>26}" for head in ("loaded", "missing", "other shape")),
        ]
        for stage in (*dict.fromkeys(self.stages.values()), ALL):
            cells = (
                _amount([leaf for leaf in group if stage in {self.stages[leaf.name], ALL}])
                for group in groups
            )
            lines.append(f"  {stage:<7}" + "".join(f"{cell:>26}" for cell in cells))
        if self.missing:
            lines.append(f"  missing: {_listed([leaf.name for leaf in self.missing])}")
        if self.unfit:
            found = [f"{a.name} {_shape(a)}, not {_shape(b)} of {b.name}" for a, b in self.unfit]
            lines.append(f"  unfit: {_listed(found)}")
        if self.unused:
            names = list(dict.fromkeys(leaf.name for leaf in self.unused))
            lines.append(f"  not used: {_amount(self.unused)} ({_listed(names)})")
        lines += [f"  different here: {text}" for text in self._differences()]
        if (epsilon := self._epsilon()) is not None:
            lines.append(f"  BatchNorm: epsilon {epsilon:g}, as in the weights")
        mean, std = (" ".join(f"{value:g}" for value in item) for item in self.normalisation)
        return "\n".join([*lines, f"  input: (image - mean) / std, mean {mean}, std {std}"])

    def _differences(self) -> list[str]:
        """Settings with another value in the source, e.g. its padding."""
        found: dict[str, list[str]] = {}
        for ours, theirs in self.loaded:
            for key, value in ours.settings.items():
                other = theirs.settings.get(key, value)
                if other != value and (key != "eps" or self._epsilon() is None):
                    found.setdefault(key, []).append(f"{ours.name} {other}, here {value}")
        return [f"{key}: {_listed(layers)}" for key, layers in found.items()]

    def _epsilon(self) -> float | None:
        """The epsilon of the source's BN, where it has one for all and ours is another."""
        pairs = {(a.settings.get("eps"), b.settings.get("eps")) for a, b in self.loaded}
        pairs = {pair for pair in pairs if None not in pair}
        theirs = {pair[1] for pair in pairs}
        return theirs.pop() if len(theirs) == 1 and any(a != b for a, b in pairs) else None


def plan_transfer(model: Detector, source: Source) -> Transfer:
    """Match the layers of `source` with those of the backbone of `model`.

    Layers correspond in order, by kind and shape; where the two sequences disagree, the longest
    runs that agree are used.  Both orders, of registration and of execution, are tried, with
    neighbouring 1x1 convolutions as one grouped convolution and without, and the one that loads
    most is taken.  Raises UserError for weights of another form of the same shapes.
    """
    _refuse_other_form(model.spec, source)
    rows = [i for i, layer in enumerate(model.spec.layers) if layer.section == "backbone"]
    found = {
        part: leaf
        for row in rows
        for part, leaf in leaves_of(model.layers[row], prefix=str(row)).items()
    }
    executed = run_order(found, model, 2 * model.max_stride)
    registered = tuple(found.values())
    stages = _stages(model.spec)
    named = {leaf.name: stages[int(leaf.name.split(".")[0])] for leaf in registered}
    normalisation = source.normalisation or model.spec.normalisation or IMAGENET
    return max(
        (
            Transfer(source.name, named, *_aligned(ours, leaves), normalisation)
            for ours, theirs in ((executed, source.executed), (registered, source.registered))
            for leaves in (theirs, grouped(theirs))
        ),
        key=lambda transfer: transfer.share,  # the first of equals
    )


def _aligned(
    ours: Sequence[Leaf], theirs: Sequence[Leaf]
) -> tuple[Pairs, Pairs, tuple[Leaf, ...], tuple[Leaf, ...]]:
    """Pairs of equal layers and of unequal ones, and the rest here and there."""
    loaded: list[tuple[Leaf, Leaf]] = []
    unfit: list[tuple[Leaf, Leaf]] = []
    missing: list[Leaf] = []
    unused: list[Leaf] = []
    here, there = ([leaf.signature for leaf in leaves] for leaves in (ours, theirs))
    matcher = difflib.SequenceMatcher(None, here, there, autojunk=False)
    for tag, start, end, their_start, their_end in matcher.get_opcodes():
        rest = list(theirs[their_start:their_end])
        if tag == "equal":
            loaded += zip(ours[start:end], rest, strict=True)
            continue
        for leaf in ours[start:end]:
            kind = leaf.signature[0]
            partner = next((other for other in rest if other.signature[0] == kind), None)
            if partner is None:
                missing.append(leaf)
            else:
                rest.remove(partner)
                unfit.append((leaf, partner))
        unused += rest
    return tuple(loaded), tuple(unfit), tuple(missing), tuple(unused)


def _stages(spec: GraphSpec) -> list[str]:
    """The stage of each row: stem, then the first tap that is not before it."""
    backbone = [index for index, row in enumerate(spec.layers) if row.section == "backbone"]
    taps = {index: name for name, index in spec.taps().items() if index in backbone}
    stem = next((index for index in backbone if spec.layers[index].name == "stem"), 0)
    stages = []
    for index in backbone:
        following = [tap for tap in taps if tap >= index]
        early = index <= stem and index not in taps
        stages.append("stem" if early else taps[min(following)] if following else AFTER_TAPS)
    return stages


def _refuse_other_form(spec: GraphSpec, source: Source) -> None:
    parts = {part for leaf in source.registered for part in leaf.name.split(".")}
    for pattern, absent, argument, value in FORMS:
        if absent in parts or not any(re.fullmatch(pattern, part) for part in parts):
            continue
        for index, row in enumerate(spec.layers):
            if row.section != "backbone" or (argument == "identity" and row.repeats == 1):
                continue  # the first module of a stage never has one
            parameter = registry.BLOCKS[row.block].arguments.get(argument)
            here = row.args.get(argument, parameter and parameter.default)
            if parameter is not None and here != value:
                raise UserError(
                    f"--backbone-weights {source.name}: these weights need {row.block} with"
                    f" {argument}: {value}, {row.where or f'row {index}'} has {here}; the shapes"
                    " agree, the results would not: take the form of the backbone that has it"
                )


def _parameters(leaves: Iterable[Leaf]) -> int:
    return sum(leaf.parameters for leaf in leaves)


def _amount(leaves: Sequence[Leaf]) -> str:
    if not leaves:
        return "-"
    return f"{sum(leaf.count for leaf in leaves)} tensors, {_parameters(leaves):,}"


def _percent(share: float) -> str:
    """Rounded down, so that only all of it is 100 %."""
    return f"{math.floor(share * 1000) / 10:.1f} %"


def _shape(leaf: Leaf) -> str:
    key = "weight" if "weight" in leaf.tensors else next(iter(leaf.tensors))
    return "x".join(map(str, leaf.shape(key)))


def _listed(names: Sequence[str]) -> str:
    more = f", ... {len(names)} in all" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

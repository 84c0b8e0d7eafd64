"""Equal budgets: scale the width and depth of a detector until its cost is as asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from models.builder import build_detector
from models.profile.counting import ModelProfile, profile_spec
from models.registry import BLOCKS, HEADS
from models.spec import ModelSpec
from models.yaml.parser import OUTPUT, Draft
from models.yaml.rows import Row, bind_arguments
from utils.errors import UserError, nearest
from utils.terminal import formatted

TOLERANCE = 0.02  # of the budget
GOOD = 0.01  # near enough to stop looking
NECK = ("neck", "head")  # the sections whose rows make up the neck
UNITS = {"gflops": 1e9, "gmacs": 1e9, "flops": 1.0, "macs": 1.0, "params": 1.0}
SMALLEST, LARGEST = 0.05, 16.0  # times the widths as written
STEPS = 10  # of a bisection; widths move in steps of 4 or 8 channels, so more gain nothing
NECK_RANGE = 2.0  # the neck may be so much wider or narrower than in step with the backbone
# YOLOv5's own pairs of width and depth, n s m l x; a neck as wide as theirs is as deep as theirs.
DEPTHS = ((0.25, 0.33), (0.5, 0.33), (0.75, 0.67), (1.0, 1.0), (1.25, 1.33))
LEVEL_3 = 256  # channels of YOLOv5-l's out3: width 1


@dataclass(frozen=True)
class Budget:
    """Cost that a detector may have: `value` FLOPs, MACs or parameters, at `image_size` pixels."""

    kind: str
    value: float
    image_size: int

    def cost(self, profile: ModelProfile) -> float:
        """The profile's cost in the budget's own kind."""
        if self.kind == "params":
            return profile.params
        return profile.macs if self.kind.endswith("macs") else profile.flops

    def text(self, value: float) -> str:
        """A cost as the user wrote the budget: 'gflops=4.5'."""
        return f"{self.kind}={value / UNITS[self.kind]:.6g}"


def read_budget(text: str, *, image_size: int) -> Budget:
    """'gflops=4.5', 'params=1.9e6', 'macs=2.2e9', with '@640' for another size than `image_size`.

    UserError for anything else.
    """
    kind, equals, amount = text.partition("=")
    amount, at, size = amount.partition("@")
    kind = kind.strip().lower()
    if kind == "ms":
        raise UserError(f"--fit {text}: only compare.py fits models to a measured latency")
    if kind not in UNITS or not equals:
        raise UserError(
            f"--fit {text}: expected KIND=NUMBER with KIND one of {', '.join(UNITS)}"
            f"{nearest(kind, UNITS)}"
        )
    try:
        value = float(amount) * UNITS[kind]
        pixels = int(size) if at else image_size
    except ValueError:
        value, pixels = math.nan, 0
    if not 0 < value < math.inf or pixels < 1:
        raise UserError(f"--fit {text}: expected a number over 0, as in --fit gflops=4.5@640")
    return Budget(kind, value, pixels)


@dataclass(frozen=True)
class Fitted:
    """A detector near a budget, and how its parts were scaled."""

    spec: ModelSpec
    cost: float  # in the budget's kind
    error: float  # distance from the budget, as a part of the budget
    backbone_width: float  # of the section's own unit: the paper's multiplier, or times as written
    neck_width: float
    neck_depth: float
    skew: float  # how far the neck is out of step with the backbone, as a logarithm

    def text(self, budget: Budget) -> str:
        error = formatted(self.cost / budget.value - 1, "+.1%")
        return (
            f"--fit {budget.text(budget.value)} at {budget.image_size} px: "
            f"{budget.text(self.cost)} ({error}) with backbone width "
            f"{self.backbone_width:g}, neck width {self.neck_width:g}, neck depth "
            f"{self.neck_depth:g}"
        )


def fit(draft: Draft, budget: Budget, *, classes: int) -> Fitted:
    """Scale backbone and neck in step, then the neck alone, to within 2 % of the budget.

    The backbone's width is the paper's multiplier where its file has one, else all widths times w
    (multiples of 8); the neck's depth follows its width as YOLOv5's sizes do.  The image size is
    rounded up to a multiple of the largest stride, as in training.  UserError with the nearest
    reachable cost where none is within 2 %.
    """
    with torch.device("meta"):
        stride = build_detector(draft.resolve(), classes=classes).max_stride
    budget = replace(budget, image_size=-(-budget.image_size // stride) * stride)
    search = _Search(draft, budget, classes, follows=_follows_taps(draft))
    search.attempt(1.0)  # unscaled, where that fits the budget
    if not search.done():
        for backbone in search.bisect(SMALLEST, LARGEST):
            if not search.done():
                centre = 1.0 if search.follows else backbone
                search.bisect(centre / NECK_RANGE, centre * NECK_RANGE, backbone)
    if not search.done():
        for factor in (SMALLEST, LARGEST):  # the ends, for the message
            search.attempt(factor)
    if not search.found:
        raise UserError(f"--fit: {draft.source} cannot be built: {search.cause}")
    # within the tolerance the one most in step, else the nearest
    best = min(search.found, key=lambda x: (x.error > TOLERANCE, search.done() * x.skew, x.error))
    if best.error > TOLERANCE:
        end = "lowest" if best.cost > budget.value else "highest"
        raise UserError(
            f"--fit {budget.text(budget.value)}: {draft.source} cannot be fitted at "
            f"{budget.image_size} px; the {end} reachable cost is {budget.text(best.cost)}"
        )
    return best


@dataclass
class _Search:
    """Attempts at a budget so far."""

    draft: Draft
    budget: Budget
    classes: int
    follows: bool  # whether the neck's widths follow the taps
    found: list[Fitted] = field(default_factory=list)
    cause: str = ""  # why the last one could not be built

    def done(self) -> bool:
        return any(item.error <= TOLERANCE for item in self.found)

    def bisect(self, low: float, high: float, backbone: float | None = None) -> tuple[float, float]:
        """Where the cost of a factor crosses the budget, bisected on a logarithmic scale.

        The factor is that of both parts, or of the neck alone where the `backbone` has its own.
        Ends early where the cost is near enough; what cannot be built counts as too small.
        """
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            item = self.attempt(middle) if backbone is None else self.attempt(backbone, middle)
            if item is not None and item.error <= GOOD:
                return middle, middle
            if item is None or item.cost < self.budget.value:
                low = middle
            else:
                high = middle
        return low, high

    def attempt(self, backbone: float, neck: float | None = None) -> Fitted | None:
        """Both parts at these multiples of their widths; None where a block cannot be so narrow.

        Without its own factor the neck stays in step: by itself where its widths follow the taps.
        """
        in_step = 1.0 if self.follows else backbone
        neck = in_step if neck is None else neck
        own, neck_own = (
            float(f"{_width(self.draft, parts) * factor:.3g}")  # so that it reads well
            for parts, factor in ((("backbone",), backbone), (NECK, neck))
        )
        try:
            depth = _depth(_resized(self.draft, own, neck_own, depth=1.0).resolve())
            spec = _resized(self.draft, own, neck_own, depth=depth).resolve()
            size = self.budget.image_size
            profile = profile_spec(spec, image_size=size, classes=self.classes)
        except UserError as error:
            self.cause = str(error)
            return None
        cost = self.budget.cost(profile)
        distance = abs(cost / self.budget.value - 1)
        skew = abs(math.log(neck / in_step))
        self.found.append(Fitted(spec, cost, distance, own, neck_own, depth, skew))
        return self.found[-1]


def _resized(draft: Draft, backbone: float, neck: float, *, depth: float) -> Draft:
    """The draft with both parts at these widths, and the neck at this depth."""
    part = draft.sections["backbone"]
    if not part.title:  # rows of the model file itself
        part = replace(part, title=draft.file.stem, published=(_width(draft, ("backbone",)),))
    sections = {"backbone": part.resized(width=backbone)}
    sections |= {
        key: draft.sections[key].resized(width=neck, depth=depth)
        for key in NECK
        if key in draft.sections
    }
    return replace(draft, sections=sections)


def _rows(draft: Draft, parts: Sequence[str]) -> list[Row]:
    return [row for key in parts for row in draft.rows(key)]


def _follows_taps(draft: Draft) -> bool:
    """Whether the neck's widths name taps, so that it grows with the backbone by itself."""
    return any(
        isinstance(bind_arguments(row).get(key), str)
        for row in _rows(draft, NECK)
        if row.block not in HEADS
        for key in BLOCKS[row.block].channel_args
    )


def _width(draft: Draft, parts: Sequence[str]) -> float:
    """The width as it stands: the section file's own, 1 for rows that follow taps, the model's."""
    rows = _rows(draft, parts)
    own = next((row.setting.width for row in rows if row.setting.width is not None), None)
    if own is not None:
        return own
    return 1.0 if parts == NECK and _follows_taps(draft) else draft.multiples[1]


def _depth(spec: ModelSpec) -> float:
    """The depth multiple that YOLOv5's sizes give a neck as wide as this one."""
    ratios = [
        layer.args["c_out"] / (LEVEL_3 * 2 ** (int(layer.name[-1]) - 3))
        for layer in spec.layers
        if layer.name and OUTPUT.fullmatch(layer.name) and "c_out" in layer.args
    ]
    width = sum(ratios) / len(ratios) if ratios else 1.0
    return min(DEPTHS, key=lambda pair: abs(pair[0] - width))[1]

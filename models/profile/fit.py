"""Equal budgets: width and depth of a detector, so that it costs what is asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from models.builder import build_detector
from models.profile.counting import ModelProfile, profile_spec
from models.registry import BLOCKS
from models.spec import DETECT, ModelSpec
from models.yaml.parser import OUTPUT, Draft
from models.yaml.rows import Row, bind_arguments
from models.yaml.sections import Size
from utils.errors import UserError, nearest

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
    """What a detector may cost: `value` FLOPs, MACs or parameters, of an image of `image_size`."""

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
    """A detector of a budget, and how its parts were scaled."""

    spec: ModelSpec
    profile: ModelProfile
    backbone_width: float  # of the section's own unit: the paper's multiplier, or times as written
    neck_width: float
    neck_depth: float
    skew: float  # how far the neck is out of step with the backbone, as a logarithm

    def text(self, budget: Budget) -> str:
        """One line for people."""
        cost = budget.cost(self.profile)
        return (
            f"--fit {budget.text(budget.value)} at {budget.image_size} px: "
            f"{budget.text(cost)} ({cost / budget.value - 1:+.1%}) with backbone width "
            f"{self.backbone_width:g}, neck width {self.neck_width:g}, neck depth "
            f"{self.neck_depth:g}"
        )


def fit(draft: Draft, budget: Budget, *, classes: int) -> Fitted:
    """Scale backbone and neck in step, then the neck alone, to within 2 % of the budget.

    The backbone's width is the paper's multiplier where its file has one, else all widths times w
    (multiples of 8); the neck's depth follows its width as YOLOv5's sizes do.  UserError with the
    nearest reachable cost where none is within 2 %.
    """
    follows = _follows_taps(draft)
    budget = _whole_cells(draft, budget, classes)
    search = _Search(draft, budget, classes, follows)
    search.attempt(1.0, 1.0)  # as it is, where that costs what is asked
    if not search.done():
        low, high = search.bisect(lambda x: (x, 1.0 if follows else x), SMALLEST, LARGEST)
        for backbone in (low, high):
            if not search.done():
                centre = 1.0 if follows else backbone
                search.bisect(partial(_pair, backbone), centre / NECK_RANGE, centre * NECK_RANGE)
    if not search.done():
        for factor in (SMALLEST, LARGEST):  # what to say of the ends
            search.attempt(factor, 1.0 if follows else factor)
    if not search.found:
        raise UserError(f"--fit: {draft.source} cannot be built: {search.cause}")
    best = search.best()
    if search.error(best) > TOLERANCE:
        cost = budget.cost(best.profile)
        end = "lowest" if cost > budget.value else "highest"
        raise UserError(
            f"--fit {budget.text(budget.value)}: {draft.source} cannot be fitted at "
            f"{budget.image_size} px; the {end} reachable cost is {budget.text(cost)}"
        )
    return best


def _whole_cells(draft: Draft, budget: Budget, classes: int) -> Budget:
    """The budget at a size that is a multiple of the largest stride, as training rounds it up."""
    with torch.device("meta"):
        stride = build_detector(draft.resolve(), classes=classes).max_stride
    return replace(budget, image_size=-(-budget.image_size // stride) * stride)


@dataclass
class _Search:
    """What was tried, and how near it came."""

    draft: Draft
    budget: Budget
    classes: int
    follows: bool  # whether the neck's widths follow the taps
    found: list[Fitted] = field(default_factory=list)
    cause: str = ""  # why the last one could not be built

    def done(self) -> bool:
        """Whether something is within the tolerance."""
        return any(self.error(item) <= TOLERANCE for item in self.found)

    def best(self) -> Fitted:
        """Within the tolerance, what keeps backbone and neck most in step; else the nearest."""
        within = [item for item in self.found if self.error(item) <= TOLERANCE]
        return min(
            within or self.found, key=lambda item: (bool(within) * item.skew, self.error(item))
        )

    def error(self, item: Fitted) -> float:
        """Distance from the budget, of the budget."""
        return abs(self.budget.cost(item.profile) / self.budget.value - 1)

    def bisect(
        self, factors: Callable[[float], tuple[float, float]], low: float, high: float
    ) -> tuple[float, float]:
        """Where the cost of `factors(x)` crosses the budget, bisected on a logarithmic scale.

        Ends early where the cost is near enough; what cannot be built counts as too small.
        """
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            item = self.attempt(*factors(middle))
            if item is not None and self.error(item) <= GOOD:
                return middle, middle
            if item is None or self.budget.cost(item.profile) < self.budget.value:
                low = middle
            else:
                high = middle
        return low, high

    def attempt(self, backbone: float, neck: float) -> Fitted | None:
        """Both parts at so many times their widths; None where a block cannot be so narrow."""
        widths = (
            _rounded(_width(self.draft, ("backbone",)) * backbone),
            _rounded(_width(self.draft, NECK) * neck),
        )
        try:
            depth = _depth(_resized(self.draft, *widths, depth=1.0).resolve())
            spec = _resized(self.draft, *widths, depth=depth).resolve()
            size = self.budget.image_size
            profile = profile_spec(spec, image_size=size, classes=self.classes)
        except UserError as error:
            self.cause = str(error)
            return None
        skew = abs(math.log(neck / (1.0 if self.follows else backbone)))
        self.found.append(Fitted(spec, profile, *widths, depth, skew))
        return self.found[-1]


def _resized(draft: Draft, backbone: float, neck: float, *, depth: float) -> Draft:
    """The draft with both parts at these widths, and the neck at this depth."""
    part = draft.sections["backbone"]
    if part.size is None:  # rows of the model file itself
        width = _width(draft, ("backbone",))
        part = replace(part, size=Size(draft.file.stem, width, (width,)))
    sections = {"backbone": part.resized(width=backbone)}
    sections |= {
        key: draft.sections[key].resized(width=neck, depth=depth)
        for key in NECK
        if key in draft.sections
    }
    return replace(draft, sections=sections)


def _pair(backbone: float, neck: float) -> tuple[float, float]:
    return backbone, neck


def _rows(draft: Draft, parts: Sequence[str]) -> list[Row]:
    return [row for key in parts if key in draft.sections for row in draft.sections[key].rows]


def _follows_taps(draft: Draft) -> bool:
    """Whether the neck's widths name taps, so that it grows with the backbone by itself."""
    return any(
        isinstance(bind_arguments(row).get(key), str)
        for row in _rows(draft, NECK)
        if row.block != DETECT
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


def _rounded(width: float) -> float:
    return float(f"{width:.3g}")  # so that it reads well

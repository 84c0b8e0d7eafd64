"""ShuffleNetV2's guidelines G1-G4 as numbers and sentences: costs that FLOPs do not show.

arXiv:1807.11164, section 2; from the kernels that models/profile/cost.py records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.profile.cost import Cost
from models.profile.counting import ModelProfile
from models.profile.kernels import Convolution

LIGHT = ("element-wise", "depthwise")  # kernels of few operations per element


@dataclass(frozen=True)
class Findings:
    """G1-G4 as numbers: ratios to the best case (1 is best), kernels, a share of all elements."""

    unequal_widths: float | None  # G1: access of 1x1 convolutions / minimum at their MACs
    groups: float | None  # G2: access of group convolutions / at one group and the same MACs
    kernels: int  # G3: launched
    branches: int  # G3: maximum of parallel kernels in a row
    elementwise: float  # G4: element-wise operators and depthwise convolutions, of all elements


def findings(cost: Cost) -> Findings:
    """The guidelines' numbers of some kernels."""
    convolutions = [k.convolution for k in cost.kernels if k.convolution]
    narrow = [c for c in convolutions if c.pointwise]
    grouped = [c for c in convolutions if c.kind == "group"]
    return Findings(
        unequal_widths=_ratio(narrow, [c.min_access for c in narrow]),
        groups=_ratio(grouped, [c.ungrouped.access for c in grouped]),
        kernels=len(cost.kernels),
        branches=cost.branches,
        elementwise=cost.elements_of(*LIGHT) / cost.elements if cost.elements else 0.0,
    )


def _ratio(convolutions: Sequence[Convolution], best: Sequence[float]) -> float | None:
    return sum(c.access for c in convolutions) / sum(best) if convolutions else None


def sentences(model: ModelProfile) -> tuple[str, str, str, str]:
    """A sentence for each of the guidelines G1-G4."""
    total = findings(model.cost)
    rows = [(row.label, findings(row.cost)) for row in model.rows]
    widths, groups = "G1: no 1x1 convolutions", "G2: no group convolutions besides depthwise"
    if total.unequal_widths is not None:
        label, value = max(((x, f.unequal_widths or 0) for x, f in rows), key=lambda item: item[1])
        widths = (
            f"G1: the 1x1 convolutions move {total.unequal_widths:.2f} times what equal widths "
            f"would; most {label}, {value:.2f}"
        )
    if total.groups is not None:
        label, value = max(((x, f.groups or 0) for x, f in rows), key=lambda item: item[1])
        groups = (
            f"G2: the group convolutions move {total.groups:.2f} times what one group would at "
            f"the same FLOPs; most {label}, {value:.2f}"
        )
    label, most = max(rows, key=lambda item: item[1].kernels)
    light = max(model.rows, key=lambda row: row.cost.elements_of(*LIGHT))
    return (
        widths,
        groups,
        f"G3: {total.kernels} kernels, {total.kernels / len(rows):.1f} per row, up to "
        f"{total.branches} in parallel; most {label}, {most.kernels}",
        f"G4: element-wise operators and depthwise convolutions move {total.elementwise:.0%} of "
        f"all elements; most {light.label}",
    )

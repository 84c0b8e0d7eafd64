"""A detector as data: rows with bound arguments. No torch here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SECTIONS = ("backbone", "neck", "head")
CLASSIFIER = "classifier"  # the section of rows after a backbone that make it one
IMAGE = -1  # the source of row 0
IMAGE_CHANNELS = 3
DETECT = "Detect"  # the head that has anchors
# What --head puts into the last row, and its options.
HEAD_ROWS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "anchor": (DETECT, {}),
    "free": ("FreeDetect", {"end_to_end": False}),
    "free-e2e": ("FreeDetect", {"end_to_end": True}),
}
TAP = re.compile(r"P[0-9]")


@dataclass(frozen=True)
class LayerSpec:
    """One row: what it reads, which block, how often, with which arguments."""

    section: str  # backbone: rows of `backbone:`; head: the last row; neck: the rest
    sources: tuple[int, ...]  # rows it reads, IMAGE for the image
    repeats: int
    block: str  # a name of the registry
    args: Mapping[str, Any] = field(default_factory=dict)  # by constructor parameter, without c_in
    name: str | None = None
    where: str = ""  # file:line, for errors
    activation: str | None = None  # what `act=True` means in this row; None: the model's
    norm: tuple[float, float] | None = None  # (eps, momentum) of its BN; None: YOLOv5's

    def __post_init__(self) -> None:
        if self.section not in SECTIONS:
            raise ValueError(f"section must be one of {SECTIONS}, got {self.section!r}")


@dataclass(frozen=True)
class GraphSpec:
    """Rows with absolute numbers and final widths, whatever they end in."""

    layers: tuple[LayerSpec, ...]
    activation: str = "SiLU"
    source: str = ""  # the file it came from
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """(mean, std) per channel that images in [0, 1] are normalised by, as pretrained weights expect
    them; None: they are taken as they are."""
    notes: tuple[str, ...] = ()  # what tables add to the name, e.g. an unpublished width

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a model needs at least one row")
        for index, layer in enumerate(self.layers):
            for source in layer.sources:
                if not IMAGE <= source < index:
                    raise ValueError(
                        f"{layer.where}: row {index} reads row {source}; it can read "
                        "earlier rows only"
                    )

    def unused_rows(self) -> list[int]:
        """Rows whose output nobody reads (the last row excepted)."""
        read = {source for layer in self.layers for source in layer.sources}
        return [index for index in range(len(self.layers) - 1) if index not in read]

    def taps(self) -> dict[str, int]:
        """Rows named P2, P3, ... (stride 4, 8, ...) by name."""
        return {
            layer.name: index
            for index, layer in enumerate(self.layers)
            if layer.name and TAP.fullmatch(layer.name)
        }


@dataclass(frozen=True)
class ModelSpec(GraphSpec):
    """A whole detector; `anchors` in pixels, per level (w, h, w, h, ...), or how many to find.

    () for a head without anchors.
    """

    anchors: tuple[tuple[float, ...], ...] | int = field(kw_only=True)

    @property
    def anchors_per_level(self) -> int:
        """How many anchors each level has."""
        return self.anchors if isinstance(self.anchors, int) else len(self.anchors[0]) // 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back, for checkpoints."""
        values = asdict(self)
        keys = ("activation", "anchors", "source", "normalisation", "notes", "layers")
        return {key: _plain(values[key]) for key in keys}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`. Raises ValueError naming what is missing or wrong."""
        try:
            layers = []
            for row in data["layers"]:
                args = {k: tuple(v) if isinstance(v, list) else v for k, v in row["args"].items()}
                norm = row.get("norm") and (float(row["norm"][0]), float(row["norm"][1]))
                sources = tuple(int(source) for source in row["sources"])
                changed = {"sources": sources, "args": args, "norm": norm}
                layers.append(LayerSpec(**{**row, **changed}))
            anchors = data["anchors"]
            if not isinstance(anchors, int):
                anchors = tuple(tuple(float(value) for value in level) for level in anchors)
            return ModelSpec(
                tuple(layers),
                str(data["activation"]),
                str(data["source"]),
                read_normalisation(data.get("normalisation")),
                tuple(map(str, data.get("notes", ()))),
                anchors=anchors,
            )
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"not a model specification: {error!r}") from error

    def to_yaml_dict(self) -> dict[str, Any]:
        """The resolved model in the file format: a valid model YAML without references."""
        rows: dict[str, list[Any]] = {section: [] for section in SECTIONS}
        for index, layer in enumerate(self.layers):
            source: Any = [s - index if s == index - 1 else s for s in layer.sources]
            source = source[0] if len(source) == 1 else source
            row: Any = [source, layer.repeats, layer.block, _plain(layer.args)]
            rows[layer.section].append({layer.name: row} if layer.name else row)
        plain = self.to_dict()
        both, first = plain["normalisation"], self.layers[0]
        backbone = {  # all its rows have the same settings
            "activation": first.activation,
            "norm": first.norm and {"eps": first.norm[0], "momentum": first.norm[1]},
            "rows": rows["backbone"],  # under this key no width is rounded again
        }
        values = {
            "activation": self.activation,
            "anchors": plain["anchors"],
            "normalisation": both and {"mean": both[0], "std": both[1]},
            "notes": plain["notes"],
            "backbone": {key: value for key, value in backbone.items() if value},
            "neck": rows["neck"] and {"rows": rows["neck"]},
            "head": rows["head"],
        }
        return {key: value for key, value in values.items() if value}


def read_normalisation(value: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) from plain values, three numbers each; ValueError for anything else."""
    if value is None:
        return None
    if isinstance(value, Mapping) and set(value) == {"mean", "std"}:
        value = (value["mean"], value["std"])
    try:
        mean, std = (tuple(float(item) for item in values) for values in value)
    except (TypeError, ValueError):
        mean = std = ()
    finite = all(math.isfinite(item) for item in (*mean, *std))
    if len(mean) != 3 or len(std) != 3 or not finite or not all(item > 0 for item in std):
        raise ValueError(f"normalisation must be three means and three stds over 0, got {value!r}")
    return mean, std


def make_divisible(value: float, divisor: int) -> int:
    """The next multiple of `divisor`, rounded up (YOLOv5's rule for scaled channels)."""
    return math.ceil(value / divisor) * divisor


def round_channels(value: float, divisor: int) -> int:
    """Nearest multiple of `divisor`, at least `divisor` and never under 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def scale_repeats(repeats: int, depth: float) -> int:
    """max(round(repeats * depth), 1) where there is more than one (YOLOv5's rule)."""
    return max(round(repeats * depth), 1) if repeats > 1 else repeats


def _plain(value: Any) -> Any:
    """Tuples as lists, throughout."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value

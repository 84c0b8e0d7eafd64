"""A detector as data: rows with bound arguments. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

SECTIONS = ("backbone", "neck", "head")
IMAGE = -1  # the source of row 0


@dataclass(frozen=True)
class LayerSpec:
    """One row: what it reads, which block, how often, with which arguments."""

    section: str  # backbone: rows of `backbone:`; head: Detect; neck: the rest
    sources: tuple[int, ...]  # rows it reads, IMAGE for the picture
    repeats: int
    block: str  # a name of the registry
    args: Mapping[str, Any] = field(default_factory=dict)  # by constructor parameter, without c_in
    name: str | None = None
    where: str = ""  # file:line, for errors

    def __post_init__(self) -> None:
        if self.section not in SECTIONS:
            raise ValueError(f"section must be one of {SECTIONS}, got {self.section!r}")
        if self.repeats < 1:
            raise ValueError(
                f"{self.where}: number of repeats must be at least 1, got {self.repeats}"
            )

    def scaled(self, *, depth: float, width: float, channel_args: tuple[str, ...]) -> LayerSpec:
        """The row with its repeats times `depth` and its channel arguments times `width`."""
        args = {
            key: make_divisible(value * width, 8)
            if key in channel_args and isinstance(value, (int, float))
            else value
            for key, value in self.args.items()
        }
        return replace(self, repeats=scale_repeats(self.repeats, depth), args=args)


@dataclass(frozen=True)
class ModelSpec:
    """A whole detector, scaled and with absolute row numbers; `anchors` in pixels or a number."""

    layers: tuple[LayerSpec, ...]
    anchors: tuple[tuple[float, ...], ...] | int  # per level (w, h, w, h, ...), or how many to find
    activation: str = "SiLU"
    source: str = ""  # the file it came from

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

    @property
    def anchors_per_level(self) -> int:
        """How many anchors each level has."""
        return self.anchors if isinstance(self.anchors, int) else len(self.anchors[0]) // 2

    def unused_rows(self) -> list[int]:
        """Rows whose output nobody reads (the last row excepted)."""
        read = {source for layer in self.layers for source in layer.sources}
        return [index for index in range(len(self.layers) - 1) if index not in read]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back, for checkpoints."""
        return {
            "activation": self.activation,
            "anchors": self.anchors
            if isinstance(self.anchors, int)
            else [list(level) for level in self.anchors],
            "source": self.source,
            "layers": [
                {**asdict(layer), "sources": list(layer.sources), "args": _plain(layer.args)}
                for layer in self.layers
            ],
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelSpec:
        """The inverse of `to_dict`. Raises ValueError naming what is missing or wrong."""
        try:
            layers = tuple(
                LayerSpec(
                    section=str(row["section"]),
                    sources=tuple(int(source) for source in row["sources"]),
                    repeats=int(row["repeats"]),
                    block=str(row["block"]),
                    args={
                        k: tuple(v) if isinstance(v, list) else v for k, v in row["args"].items()
                    },
                    name=row["name"],
                    where=str(row["where"]),
                )
                for row in data["layers"]
            )
            anchors = data["anchors"]
            if not isinstance(anchors, int):
                anchors = tuple(tuple(float(value) for value in level) for level in anchors)
            return ModelSpec(layers, anchors, str(data["activation"]), str(data["source"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a model specification: {error!r}") from error

    def to_yaml_dict(self) -> dict[str, Any]:
        """The resolved model in the file format: a valid model YAML without references."""
        rows: dict[str, list[Any]] = {"backbone": [], "head": []}
        for index, layer in enumerate(self.layers):
            source: Any = [s - index if s == index - 1 else s for s in layer.sources]
            row: Any = [
                source[0] if len(source) == 1 else source,
                layer.repeats,
                layer.block,
                _plain(layer.args),
            ]
            section = "backbone" if layer.section == "backbone" else "head"
            rows[section].append({layer.name: row} if layer.name else row)
        plain = self.to_dict()
        return {"activation": self.activation, "anchors": plain["anchors"], **rows}


def make_divisible(value: float, divisor: int) -> int:
    """The next multiple of `divisor`, rounded up (YOLOv5's rule for scaled channels)."""
    return math.ceil(value / divisor) * divisor


def scale_repeats(repeats: int, depth: float) -> int:
    """max(round(repeats * depth), 1) where there is more than one (YOLOv5's rule)."""
    return max(round(repeats * depth), 1) if repeats > 1 else repeats


def _plain(args: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}

"""What a comparison leaves: results.json is `dataclasses.asdict(Results)`, plus texts and columns.

`None` is: not defined, not measured, or not done.  Times are seconds where the name does not end in
ms; sizes are bytes; FLOPs are 2 * MACs; costs are of one image.  `report.text.complete` adds what
the report draws.  `construct` makes dataclasses of plain values, e.g. of a JSON file.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine.compare.bootstrap import Difference
from engine.compare.error_split import ErrorSplit
from engine.measure.energy import Energy
from engine.measure.latency import Latency
from utils.terminal import printable

FORMAT = "featherdet-compare-1"
DONE, PARTLY, FAILED, PROFILED = "done", "partly", "failed", "profiled"  # states of a row
# Metrics of `Row.accuracy`, in the order of the tables.
ACCURACY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "precision", "recall")
# Limits of plain values
LEVELS = 16  # of mappings and lists in each other
MIN, MAX = 1e-99, 1e99  # of sizes of numbers: so far from the ends that no sum or quotient is inf
T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """A metric over the seeds of a row."""

    mean: float | None
    sd: float | None  # of the sample (n - 1); None with one value
    values: list[float | None]  # in the order of Row.seeds


@dataclass(frozen=True)
class Model:
    """What the row's model is made of, as in the flags ('' where they name nothing)."""

    cfg: str
    backbone: str
    neck: str
    fit: str
    weights: str  # the checkpoint of a row that was not trained here
    source: str  # the files, or how it was put together
    notes: list[str]
    head: str = ""
    pretrained: int | None = None  # parameters that --init-weights has; None without that flag
    fitted_ms: float | None = None  # median latency that --fit ms= found before training


@dataclass(frozen=True)
class Training:
    """Duration and speed of training; means of the epochs of each seed."""

    epochs: int
    images_per_second: Spread
    wait_share: Spread  # of the time of the steps, waiting for data
    seconds: Spread  # all epochs with their evaluations


@dataclass(frozen=True)
class Run:
    """One seed of a row."""

    seed: int | None  # None: a given checkpoint
    status: str  # DONE or FAILED
    command: str  # repeats the run
    cause: str | None = None
    record: str | None = None  # file name of its record
    accuracy: dict[str, float | None] | None = None  # keys ACCURACY
    best_epoch: int | None = None  # counted from 0
    seconds: float | None = None
    curves: dict[str, list[float | None]] = field(default_factory=dict)  # results.csv by column
    environment: dict[str, Any] = field(default_factory=dict)  # versions, device, commit


@dataclass(frozen=True)
class ClassAccuracy:
    """One class of the data set."""

    name: str
    instances: int
    AP: Spread
    AP50: Spread


@dataclass(frozen=True)
class Layer:
    """One row of the model file."""

    index: int
    name: str | None
    block: str
    section: str  # 'backbone', 'neck' or 'head'
    params: int
    macs: int
    flops: int
    access_bytes: int
    bytes: int
    kernels: int
    predicted: float | None = None  # seconds by the roofline, one image; None: not timed
    measured: float | None = None
    bound: str | None = None  # 'compute' or 'memory'


@dataclass(frozen=True)
class Cost:
    """Computed, for one image; the parts add up to the whole.

    Parameters and MACs are of the model as it is trained; traffic, kernels and G1-G4 are of the
    model with BN folded, as it is timed.
    """

    image_size: int
    classes: int
    params: int
    macs: int
    flops: int
    backbone: dict[str, int]  # params, macs, flops
    neck: dict[str, int]
    head: dict[str, int]
    access_bytes: int  # memory access cost as ShuffleNetV2 defines it: convolutions alone
    bytes: int  # read and written by all kernels
    activation_bytes: int  # peak of image and feature maps, no weights
    intensity: float  # FLOP per byte
    unequal_widths: float | None  # G1, 1 is best; None: no 1x1 convolution
    groups: float | None  # G2, 1 is best; None: no group convolution
    kernels: int  # G3
    branches: int  # G3
    elementwise: float  # G4, share of all elements
    guidelines: list[str]  # a sentence each for G1-G4
    layers: list[Layer]


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    status: str  # DONE, PARTLY (some seeds failed), FAILED (all), PROFILED (costs only)
    cause: str | None  # of failures, one line
    model: Model
    seeds: list[int | None]  # finished, in the order of Spread.values; [None]: a given checkpoint
    runs: list[Run]
    cost: Cost | None
    accuracy: dict[str, Spread] | None = None  # keys ACCURACY
    classes: list[ClassAccuracy] | None = None
    difference: dict[str, Difference] | None = None  # keys AP, AP50, AP75; None for the baseline
    errors: ErrorSplit | None = None  # mean over seeds
    training: Training | None = None
    # for each of measurement.runtimes each of measurement.batches
    latency: list[Latency] = field(default_factory=list)
    # roofline.Times of each kind of block at batch 1, with `bound`; longest measured first
    blocks: list[dict[str, Any]] | None = None
    energy: Energy | None = None
    # The baseline's cost divided by the row's own: 'flops', None for a row without any, and
    # 'latency', by the p50: 'batch', 'runtime' and 'factor', None where one of the two failed, for
    # each of Row.latency.  None for the baseline, and where either has no model.
    speedup: dict[str, Any] | None = None


@dataclass(frozen=True)
class Measurement:
    """The conditions of all measured numbers, taken in one run."""

    device: str
    threads: int | None
    batches: list[int]
    runtimes: list[str]  # the first one is that of speed-ups and default axes
    settings: dict[str, Any]  # of engine/measure/latency.py
    device_peak: dict[str, float] | None  # flops_per_second, bytes_per_second, ...
    energy_source: str | None


@dataclass(frozen=True)
class Results:
    """results.json."""

    command: str  # makes this file
    protocol: dict[str, Any]  # engine/compare/protocol.py; nested, plain values
    baseline: str | None  # name of a row
    rows: list[Row]
    measurement: Measurement | None = None
    format: str = FORMAT


def construct(kind: type[T], value: Any, name: str = "", levels: int = LEVELS) -> T:
    """`value` as `kind`, a dataclass; keys that it lacks are ignored.

    Fields may be dataclasses, str (printable), int (not negative), float (finite), lists and dicts
    of these, unions with None, and Any (plain values in up to `levels` levels).  Raises ValueError
    naming the field, by its dotted name after `name`.
    """
    if not isinstance(value, dict):
        raise _wrong(name, value, "a mapping")
    hints = typing.get_type_hints(kind)
    found = {}
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        path = f"{name}.{item.name}" if name else item.name
        if item.name in value:
            found[item.name] = _typed(hints[item.name], value[item.name], path, levels)
        elif item.default is item.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path!r} is missing")
    return kind(**found)


def _typed(kind: Any, value: Any, name: str, levels: int) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:  # X | None
        return None if value is None else _typed(inner[0], value, name, levels)
    if dataclasses.is_dataclass(kind):
        return construct(kind, value, name, levels)  # type: ignore[arg-type]
    if levels == 0:
        raise ValueError(f"{name!r} has too many levels")
    if isinstance(value, list) and (origin is list or kind is Any):
        (kind,) = inner or (Any,)
        return [_typed(kind, x, f"{name}.{i}", levels - 1) for i, x in enumerate(value)]
    if isinstance(value, dict) and (origin is dict or kind is Any):
        bad = next((key for key in value if printable(key) != key), None)
        if bad is not None:
            raise _wrong(name, bad, "printable keys")
        kind = inner[1] if inner else Any
        return {key: _typed(kind, x, f"{name}.{key}", levels - 1) for key, x in value.items()}
    truth = isinstance(value, bool)
    text = isinstance(value, str) and printable(value) == value
    number = isinstance(value, int | float) and not truth
    number = number and (value == 0 or MIN < abs(value) < MAX)
    meets, expected = {
        str: (text, "printable text"),
        bool: (truth, "true or false"),
        int: (number and isinstance(value, int) and value >= 0, "a whole number"),
        float: (number, "a number"),
        list: (False, "a list"),
        dict: (False, "a mapping"),
        Any: (text or number or truth or value is None, "printable text or a number"),
    }[origin or kind]
    if not meets:
        raise _wrong(name, value, expected)
    return value


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"{name!r} is {shown}, expected {expected}")

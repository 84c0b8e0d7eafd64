"""The exact shape of results.json, which a comparison leaves and its report is made from.

Plain JSON values.  `None` is: not defined, not measured, or not done.  Times are seconds where the
name does not say ms; sizes are bytes; FLOPs are 2 * MACs; costs are of one image.
"""

from __future__ import annotations

from typing import Any, TypedDict

FORMAT = "featherdet-compare-1"
DONE, PARTLY, FAILED, PROFILED = "done", "partly", "failed", "profiled"  # states of a row
# Figures of `Row.accuracy`, in the order of the tables.
ACCURACY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "precision", "recall")


class Spread(TypedDict):
    """A figure over the seeds of a row."""

    mean: float | None
    sd: float | None  # of the sample (n - 1); None with one value
    values: list[float | None]  # in the order of Row.seeds


class Model(TypedDict):
    """What the row's model is made of, as the flags said it ('' where they did not)."""

    cfg: str
    backbone: str
    neck: str
    fit: str
    weights: str  # the checkpoint of a row that was not trained here
    source: str  # the files, or how it was put together
    notes: list[str]


class Training(TypedDict):
    """What training took; means of the epochs of each seed."""

    epochs: int
    images_per_second: Spread
    wait_share: Spread  # of the time of the steps, waiting for data
    seconds: Spread  # all epochs with their evaluations


class Run(TypedDict):
    """One seed of a row."""

    seed: int | None  # None: a given checkpoint
    status: str  # DONE or FAILED
    cause: str | None
    command: str  # repeats the run
    record: str | None  # file name of its record
    accuracy: dict[str, float | None] | None  # keys ACCURACY
    best_epoch: int | None  # counted from 0
    seconds: float | None
    curves: dict[str, list[float | None]]  # columns of results.csv, 'epoch' first; {} if none
    environment: dict[str, Any]  # versions, device, commit


class ClassFigures(TypedDict):
    """One class of the data set."""

    name: str
    instances: int
    AP: Spread
    AP50: Spread


class Difference(TypedDict):
    """A figure less the baseline's, by a paired bootstrap over images."""

    delta: float
    low: float
    high: float
    level: float  # 0.95
    significant: bool  # the interval leaves out 0
    resamples: int
    seeds: list[int | None]  # those that both rows have


class Errors(TypedDict):
    """The error split of engine/compare/error_split.py, mean over seeds."""

    ap50: float
    delta: dict[str, float]  # kind: AP50 gained if it alone were repaired
    special: dict[str, float]  # 'false positives', 'false negatives'
    counts: dict[str, float]  # kind: how many


class Part(TypedDict):
    """A section of the model."""

    params: int
    macs: int
    flops: int


class Layer(TypedDict):
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
    predicted: float | None  # seconds by the roofline, one image; None: not timed
    measured: float | None
    bound: str | None  # 'compute' or 'memory'


class Cost(TypedDict):
    """On paper, one image; the parts add up to the whole.

    Parameters and MACs are of the model as it is trained; what is moved, kernels and G1-G4 are of
    the model with BN folded, as it is timed.
    """

    image_size: int
    classes: int
    params: int
    macs: int
    flops: int
    backbone: Part
    neck: Part
    head: Part
    access_bytes: int  # memory access cost as ShuffleNetV2 defines it: convolutions alone
    bytes: int  # read and written by all kernels
    activation_bytes: int  # most that lives at once: image and maps, no weights
    intensity: float  # FLOP per byte
    unequal_widths: float | None  # G1, 1 is best; None: no 1x1 convolution
    groups: float | None  # G2, 1 is best; None: no group convolution
    kernels: int  # G3
    branches: int  # G3
    elementwise: float  # G4, share of all elements
    guidelines: list[str]  # a sentence each for G1-G4
    layers: list[Layer]


class LatencyAt(TypedDict):
    """Measured at one batch size; the figures are None where it failed."""

    batch: int
    cause: str | None  # of a failure
    p50_ms: float | None  # of one image
    p90_ms: float | None
    least_ms: float | None
    images_per_second: float | None
    gflops_per_second: float | None
    memory_bytes: int | None
    memory_source: str | None


class BlockTime(TypedDict):
    """All rows of one kind of block at batch 1: why fewer FLOPs were not faster."""

    block: str
    rows: list[int]
    flops: int
    bytes: int
    kernels: int
    predicted: float  # seconds
    compute_bound: float  # the part of `predicted` in compute-bound kernels
    launch: float  # to start the kernels at all
    measured: float
    bound: str


class Energy(TypedDict):
    """By the device's own counter."""

    joules_per_image: float
    watts: float
    batch: int
    source: str


class SpeedUpAt(TypedDict):
    """Measured at one batch size; None where one of the two failed."""

    batch: int
    factor: float | None


class SpeedUp(TypedDict):
    """The baseline's cost over the row's own: above 1 where the row is faster."""

    flops: float | None  # what the FLOPs promise; None: a row without any
    latency: list[SpeedUpAt]  # by the p50, one for each of Row.latency


class Row(TypedDict):
    """One model of the table."""

    name: str
    status: str  # DONE, PARTLY (some seeds failed), FAILED (all), PROFILED (costs only)
    cause: str | None  # of failures, one line
    model: Model
    seeds: list[int | None]  # finished, in the order of Spread.values; [None]: a given checkpoint
    runs: list[Run]
    accuracy: dict[str, Spread] | None  # keys ACCURACY
    classes: list[ClassFigures] | None
    difference: dict[str, Difference] | None  # keys AP, AP50, AP75; None for the baseline
    errors: Errors | None
    cost: Cost | None
    latency: list[LatencyAt]  # [] where not measured, else one for each of measurement.batches
    blocks: list[BlockTime] | None  # longest measured first
    energy: Energy | None
    speedup: SpeedUp | None  # None for the baseline, and where either has no model
    training: Training | None


class Measurement(TypedDict):
    """Under what the measured figures of all rows were taken, in one sitting."""

    device: str
    threads: int | None
    batches: list[int]
    settings: dict[str, Any]  # of engine/measure/latency.py
    roof: dict[str, float] | None  # flops_per_second, bytes_per_second, ...
    energy_source: str | None


class Results(TypedDict):
    """results.json, but for what `report.text.complete` adds: texts, columns with cells, fronts."""

    format: str
    command: str  # makes this file
    protocol: dict[str, Any]  # engine/compare/protocol.py; nested, plain values
    baseline: str | None  # name of a row
    measurement: Measurement | None
    rows: list[Row]

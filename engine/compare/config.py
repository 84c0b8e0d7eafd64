"""The settings of a comparison, as flags of compare.py."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.train.config import CACHES, OPTIMIZERS
from models.spec import HEAD_ROWS
from utils.config import (
    MAX_PIXELS,
    MAX_WORKERS,
    changed,
    check_options,
    default_workers,
    flag,
    option,
    threads_option,
)
from utils.hyp import AUTO

RUNTIMES = ("torch", "onnxruntime", "openvino")
TRAIN, EVALUATE, PROFILE, TABLE = "train", "evaluate", "profile", "table"  # what is compared


def repeated(values: Sequence[Any]) -> Any:
    """The first value that is there more than once."""
    return next((value for value in values if values.count(value) > 1), None)


@dataclass(frozen=True)
class CompareConfig:
    """One comparison: which models, under which protocol, and where it goes."""

    cfg: tuple[str, ...] = option((), metavar="FILE", help="model YAMLs to train, by path or name")
    weights: tuple[str, ...] = option(
        (), metavar="FILE", help="checkpoints to evaluate as they are"
    )
    backbone: tuple[str, ...] = option(
        (), metavar="NAME", help="backbones in place of each model's own, e.g. ghostnet-1.0"
    )
    neck: tuple[str, ...] = option(
        (), metavar="NAME", help="necks in place of each model's own, e.g. pan-ghost"
    )
    head: tuple[str, ...] = option(
        (), choices=tuple(HEAD_ROWS), help="heads in place of each model's own"
    )
    init_weights: str = option(
        "",
        metavar="FILE",
        help="checkpoint that every model of --cfg starts from; tensors are loaded where name and"
        " shape match",
    )
    data: str = option("shapes", help="data set YAML, by path or name")
    split: str = option(
        "val",
        choices=("val", "test"),
        help="split to evaluate on; best.pt is chosen on val, so test is independent of the choice",
    )
    imgsz: int = option(
        640, flags=("--img", "--img-size"), min=1, max=MAX_PIXELS, help="network size in pixels"
    )
    epochs: int = option(100, min=1, max=2**31, help="passes over the training images")
    seeds: tuple[int, ...] = option(
        (0,), metavar="N", min=0, max=2**31, help="seeds that each model is trained with"
    )
    baseline: str = option("", metavar="ROW", help="row to compare the others with; '': the first")
    fit: str = option(
        "",
        metavar="KIND=NUMBER",
        help="scale all models to one budget at --img: gflops=4.5, params=1.9e6, or to a latency"
        " measured here: ms=20@cpu, @cuda (PyTorch), @onnxruntime, @openvino",
    )
    hyp: str = option(AUTO, help="hyper-parameter YAML, as in train.py")
    batch_size: int = option(16, flags=("--batch",), min=1, max=2**31, help="images per batch")
    optimizer: str = option(AUTO, choices=OPTIMIZERS, help="optimizer, as in train.py")
    amp: str = option(
        "auto",
        choices=("auto", "off", "fp16", "bf16"),
        help="mixed precision of training on CUDA; evaluation is in float32",
    )
    cache: str = option(
        "none", choices=CACHES, const="ram", help="where decoded images are kept, as in train.py"
    )
    workers: int = option(
        default_workers(), min=0, max=MAX_WORKERS, help="loading processes of each run; 0: none"
    )
    device: str = option("", help="cpu, a GPU number, or several: 0,1,3; '': CUDA if present")
    threads: int = threads_option()
    jobs: int = option(
        1, min=1, max=2**31, help="runs at the same time: one GPU each, or shares of the CPU"
    )
    records: str = option(
        "",
        metavar="DIR",
        help="folder of records: its runs of the same protocol count as done;"
        " without --cfg and --weights, the table is made from these records alone",
    )
    dry_run: bool = option(False, help="list the runs with their costs, write nothing")
    profile_only: bool = option(False, help="costs and latency only; needs no data")
    classes: int = option(80, min=1, max=2**31, help="number of classes with --profile-only")
    runtime: tuple[str, ...] = option(
        ("torch",),
        choices=RUNTIMES,
        help="runtimes in which latency is measured; speed-up and plots are of the first one",
    )
    latency_batches: tuple[int, ...] = option(
        (1, 32), metavar="N", min=1, max=2**31, help="batch sizes whose latency is measured"
    )
    latency_seconds: float = option(
        60.0, help="seconds for all models at each batch size (5 to 50 rounds)"
    )
    latency_dtype: str = option(
        "fp32",
        choices=("fp32", "fp16", "bf16"),
        help="type of weights and images when latency, energy and rows are measured",
    )
    latency_graph: bool = option(
        False, help="time CUDA graphs: small batches then measure the GPU, not Python"
    )
    project: str = option("runs/compare", help="folder of the comparisons")
    name: str = option(
        "exp", help="folder of this comparison; the same command continues, another gets a number"
    )
    exist_ok: bool = option(False, help="continue in this folder, or refuse at another protocol")

    def __post_init__(self) -> None:
        composed = self.backbone or self.neck or self.head or self.fit or self.init_weights
        exported = set(self.runtime) != {"torch"}
        refused = {
            "--cfg and --weights exclude each other: what is trained here and what comes from"
            " elsewhere have no protocol in common": self.cfg and self.weights,
            "nothing to compare: give --cfg, --weights or --records": not (
                self.cfg or self.weights or self.records
            ),
            "--backbone, --neck, --head, --fit and --init-weights change models of --cfg;"
            " give --cfg": composed and not self.cfg,
            "--profile-only needs --cfg or --weights": self.profile_only
            and not (self.cfg or self.weights),
            "--init-weights is for training; --profile-only trains nothing": self.profile_only
            and self.init_weights,
            "--latency-graph and --latency-dtype need --runtime torch; exported networks run in"
            " float32": exported and (self.latency_graph or self.latency_dtype != "fp32"),
        }
        for message, wrong in refused.items():
            if wrong:
                raise ValueError(message)
        check_options(self)
        names = (
            "seeds",
            "latency_batches",
            "cfg",
            "weights",
            "backbone",
            "neck",
            "head",
            "runtime",
        )
        lists = {name: getattr(self, name) for name in names}
        gpus = [part.strip().lower().removeprefix("cuda:") for part in self.device.split(",")]
        if "mps" in gpus:
            raise ValueError("--device mps: costs are measured on CPUs and CUDA alone; use cpu")
        lists["device"] = [gpu for gpu in gpus if gpu]  # each run has one of its own
        for name, values in lists.items():
            twice = repeated(values)
            if twice is not None:
                raise ValueError(f"{flag(name)} has {twice} twice")
        if not self.latency_seconds > 0:
            raise ValueError(f"--latency-seconds must be positive, got {self.latency_seconds}")

    @property
    def kind(self) -> str:
        """TRAIN, EVALUATE, PROFILE, or TABLE (of records alone)."""
        if self.profile_only:
            return PROFILE
        if self.cfg:
            return TRAIN
        return EVALUATE if self.weights else TABLE

    def command(self) -> str:
        """The command line of these settings."""
        words = ["python", "compare.py"]
        for name, value in changed(self).items():
            words.append("--img" if name == "imgsz" else flag(name))
            if value is not True:
                words += map(str, value if isinstance(value, tuple) else (value,))
        return shlex.join(words)

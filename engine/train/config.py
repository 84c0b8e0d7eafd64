"""The settings of a training run, as flags of train.py and as a plain mapping in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config import MAX_PIXELS, MAX_WORKERS, check_options, default_workers, flag, option
from utils.errors import UserError

NEWEST = "newest"
CACHES = ("none", "ram", "disk")
OPTIMIZERS = ("SGD", "Adam", "AdamW")
DEFAULT_TIMEOUT = 1800.0  # seconds; a scan or a final evaluation on rank 0 must fit in it
# What may be said again beside --resume: it changes where and how, not what is computed.
FREE_ON_RESUME = ("resume", "device", "workers", "cache", "profile", "noplots", "ddp_timeout")


@dataclass(frozen=True)
class TrainConfig:
    """One run; the defaults are those of the YOLO ecosystem."""

    weights: str = option("", help="checkpoint to start from, '' for random weights")
    cfg: str = option(
        "", help="model YAML, by path or name; '': the checkpoint's own model, else yolov5n"
    )
    backbone: str = option(
        "", metavar="NAME", help="backbone in place of the model's own, e.g. ghostnet-1.0"
    )
    neck: str = option("", metavar="NAME", help="neck in place of the model's own, e.g. pan-ghost")
    fit: str = option(
        "",
        metavar="KIND=NUMBER",
        help="scale backbone and neck to a budget at --img, or at a size: gflops=4.5@640",
    )
    backbone_weights: str = option(
        "",
        metavar="SOURCE",
        help="ImageNet weights for the backbone: timm:NAME, or a .pth, .pt or .safetensors file",
    )
    allow_partial: bool = option(
        False, help="take --backbone-weights that fit less than 95 %% of the backbone"
    )
    data: str = option("shapes", help="data set YAML, by path or name")
    hyp: str = option("default", help="hyper-parameter YAML, by path or name")
    epochs: int = option(100, min=1, max=2**31, help="passes over the training images")
    batch_size: int = option(
        16,
        flags=("--batch",),
        help="images per step over all ranks; -1 finds what fits on one GPU",
    )
    imgsz: int = option(
        640, flags=("--img", "--img-size"), min=1, max=MAX_PIXELS, help="network size in pixels"
    )
    rect: bool = option(False, help="batches of one shape instead of square mosaics")
    resume: str | None = option(
        None,
        const=NEWEST,
        metavar="PATH",
        help="go on with a run (its folder or last.pt); without a path the newest of --project",
    )
    nosave: bool = option(False, help="write a checkpoint at the end only")
    noval: bool = option(False, help="validate after the last epoch only")
    noautoanchor: bool = option(False, help="keep the model's anchors")
    noplots: bool = option(False, help="write no pictures")
    cache: str = option(
        "none",
        choices=CACHES,
        const="ram",
        help="keep decoded images in memory or on disk",
    )
    device: str = option("", help="'' for CUDA if present, cpu, or a GPU number")
    multi_scale: bool = option(False, help="vary the size of each batch by up to half")
    single_cls: bool = option(False, help="treat all classes as one")
    optimizer: str = option("SGD", choices=OPTIMIZERS, help="Adam moves biases by at most lr0")
    sync_bn: bool = option(False, help="batch statistics over all ranks (CUDA only)")
    workers: int = option(
        default_workers(), min=0, max=MAX_WORKERS, help="loading processes per rank; 0: none"
    )
    project: str = option("runs/train", help="folder of the runs")
    name: str = option("exp", help="folder of this run; a number is added when it exists")
    exist_ok: bool = option(False, help="write into an existing folder")
    cos_lr: bool = option(False, help="half-cosine fall of the rate instead of a line")
    label_smoothing: float = option(0.0, help="class targets in [s/2, 1-s/2]")
    patience: int = option(
        100, min=0, max=2**63 - 1, help="epochs without a better fitness before stopping; 0: never"
    )
    freeze: tuple[str, ...] = option(
        (),
        metavar="ROWS",
        help="one number N: the first N rows; several: these rows; or backbone, neck, row names",
    )
    lr_scale: tuple[str, ...] = option(
        (),
        metavar="NAME=FACTOR",
        help="multiply the learning rate of rows named as by --freeze, e.g. backbone=0.1 neck=0.5",
    )
    save_period: int = option(-1, help="also keep a checkpoint every so many epochs; -1: no")
    seed: int = option(0, min=0, max=2**63 - 1, help="of weights, order and augmentation")
    close_mosaic: int = option(0, min=0, max=2**63 - 1, help="last epochs without mosaic")
    amp: str = option(
        "auto",
        choices=("auto", "off", "fp16", "bf16"),
        help="mixed precision on CUDA; auto: fp16 there, off on CPU",
    )
    compile: bool = option(False, help="compile the model with torch.compile")
    grad_clip: float = option(10.0, min=0, help="maximum norm of the gradient; 0: no limit")
    profile: bool = option(False, help="print where the time of a step goes")
    ddp_timeout: float = option(
        DEFAULT_TIMEOUT, help="seconds that ranks wait for one another before giving up"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.batch_size < 1 and self.batch_size != -1:
            raise ValueError(f"--batch-size must be positive or -1, got {self.batch_size}")
        if self.save_period < 1 and self.save_period != -1:
            raise ValueError(f"--save-period must be positive or -1, got {self.save_period}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.backbone_weights and self.weights:
            raise ValueError(
                "--backbone-weights and --weights exclude each other: a checkpoint brings its own"
                " backbone"
            )
        if self.allow_partial and not self.backbone_weights:
            raise ValueError("--allow-partial is about --backbone-weights, which are not given")
        if not self.ddp_timeout > 0:
            raise ValueError(f"--ddp-timeout must be positive, got {self.ddp_timeout}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for opt.yaml and checkpoints."""
        plain = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; ValueError for an impossible value or an unknown key."""
        known = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown settings {', '.join(unknown)}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return TrainConfig(**plain)

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        default = TrainConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default[key]}

    def resumed_as(self, saved: TrainConfig) -> TrainConfig:
        """The settings to go on with: the saved ones, but for what may be said again.

        Raises UserError where this command line asks for anything else than the saved run had.
        """
        changes = self.changed()
        plain = saved.to_dict()
        for key, value in changes.items():
            if key not in FREE_ON_RESUME and key != "project" and plain[key] != value:
                raise UserError(
                    f"{flag(key)} {value}: the run to resume has {plain[key]!r};"
                    " leave the flag out, or start a new run with --weights"
                )
        free = {key: changes[key] for key in FREE_ON_RESUME if key in changes}
        return TrainConfig.from_dict({**plain, **free})


def checkpoint_to_resume(config: TrainConfig) -> Path:
    """The last.pt that `--resume` means. UserError when there is none."""
    if config.resume is None:
        raise ValueError("not a run to resume")
    if config.resume != NEWEST:
        path = Path(config.resume)
        if path.is_dir():
            path = path / "weights" / "last.pt"
        if not path.is_file():
            raise UserError(f"--resume {config.resume}: {path} does not exist")
        return path
    found = Path(config.project).glob("*/weights/last.pt")
    newest = max(found, key=lambda item: item.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"--resume: no run with weights/last.pt in {config.project}")
    return newest

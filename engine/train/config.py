"""The settings of a training run, as flags of train.py and as a plain mapping in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.spec import HEAD_ROWS
from utils.config import (
    MAX_PIXELS,
    MAX_WORKERS,
    check_options,
    default_workers,
    flag,
    option,
    threads_option,
)
from utils.errors import UserError
from utils.hyp import AUTO

NEWEST = "newest"
CACHES = ("auto", "none", "ram", "disk", "device")
LOGGERS = ("tensorboard", "mlflow", "wandb")
OPTIMIZERS = (AUTO, "SGD", "MuSGD", "Adam", "AdamW")
DEFAULT_TIMEOUT = 1800.0  # seconds; a scan or a final evaluation on rank 0 must fit in it
# What --resume may change: where the data are, how to compute, when to stop and save.
FREE_ON_RESUME = (
    "resume", "data", "device", "threads", "workers", "cache", "augment", "profile", "noplots",
    "ddp_timeout", "epochs", "patience", "nosave", "noval", "save_period", "exist_ok",
    "loggers",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """One run; the defaults are those of the YOLO ecosystem."""

    weights: str = option("", help="checkpoint to start from; default: random weights")
    cfg: str = option(
        "", help="model YAML, by path or name; default: the model of --weights, else yolov5n"
    )
    backbone: str = option(
        "", metavar="NAME", help="backbone in place of the model's own, e.g. ghostnet-1.0"
    )
    neck: str = option("", metavar="NAME", help="neck in place of the model's own, e.g. pan-ghost")
    head: str = option(
        "",
        choices=tuple(HEAD_ROWS),
        help="head in place of the model's own: anchor (YOLOv5's), free (anchor-free) or free-e2e"
        " (and without NMS)",
    )
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
        False, help="accept --backbone-weights that match less than 95 %% of the backbone"
    )
    data: str = option("shapes", help="data set YAML, by path or name")
    hyp: str = option(
        AUTO, help="hyper-parameter YAML, by path or name; auto: chosen by the length of the run"
    )
    epochs: int = option(100, min=1, max=2**31, help="passes over the training images")
    batch_size: int = option(
        16,
        flags=("--batch",),
        min=-1,
        help="images per step over all ranks; -1: as many as fit on one GPU",
    )
    imgsz: int = option(
        640, flags=("--img", "--img-size"), min=1, max=MAX_PIXELS, help="network size in pixels"
    )
    rect: bool = option(
        False, help="rectangular batches of images of similar shape, without mosaic"
    )
    resume: str | None = option(
        None,
        const=NEWEST,
        metavar="PATH",
        help="continue a run (its folder or last.pt); without a path the newest of --project",
    )
    nosave: bool = option(False, help="write checkpoints after the last epoch only")
    noval: bool = option(False, help="validate after the last epoch only")
    noautoanchor: bool = option(False, help="keep the model's anchors as they are")
    noplots: bool = option(False, help="write no images or plots")
    cache: str = option(
        "auto",
        choices=CACHES,
        const="ram",
        help="where decoded images are kept; auto: the first of device, ram and disk that has room",
    )
    augment: str = option(
        "auto",
        choices=("auto", "cpu", "device"),
        help="where training images are composed; auto: on the device with CUDA",
    )
    device: str = option("", help="cpu, mps or a GPU number; '': CUDA if present")
    threads: int = threads_option()
    multi_scale: bool = option(False, help="vary the image size of each batch by up to half")
    single_cls: bool = option(False, help="treat all classes as one")
    optimizer: str = option(
        AUTO,
        choices=OPTIMIZERS,
        help="auto: chosen by the length of the run, or the one that goes with --hyp; "
        "Adam and AdamW start the bias warm-up at lr0 or below",
    )
    sync_bn: bool = option(False, help="batch normalisation over all ranks (CUDA only)")
    workers: int = option(
        default_workers(), min=0, max=MAX_WORKERS, help="loading processes per rank; 0: none"
    )
    project: str = option("runs/train", help="folder of the runs")
    name: str = option("exp", help="folder of this run; a number is added if it exists")
    exist_ok: bool = option(False, help="write into an existing folder")
    cos_lr: bool = option(False, help="cosine learning-rate decay instead of linear")
    label_smoothing: float = option(0.0, help="class targets s/2 and 1 - s/2 instead of 0 and 1")
    patience: int = option(
        100, min=0, max=2**63 - 1, help="epochs without a better fitness before stopping; 0: never"
    )
    freeze: tuple[str, ...] = option(
        (),
        metavar="ROWS",
        help="rows not to train: N for the first N, several numbers, or backbone, neck, row names",
    )
    lr_scale: tuple[str, ...] = option(
        (),
        metavar="NAME=FACTOR",
        help="multiply the learning rate of rows, named as in --freeze: backbone=0.1 neck=0.5",
    )
    save_period: int = option(-1, min=-1, help="also keep a checkpoint every N epochs; -1: off")
    seed: int = option(
        0, min=0, max=2**63 - 1, help="seed of initial weights, image order and augmentation"
    )
    close_mosaic: int = option(
        0,
        min=0,
        max=2**63 - 1,
        help="train the last N epochs without mosaic and mixup; 0: as the --hyp file says",
    )
    amp: str = option(
        "auto",
        choices=("auto", "off", "fp16", "bf16"),
        help="mixed precision on CUDA; auto: fp16 there, off on CPU",
    )
    compile: bool = option(False, help="compile forward and loss with torch.compile")
    grad_clip: float = option(10.0, min=0, help="maximum norm of the gradients; 0: no limit")
    profile: bool = option(False, help="print the time of each part of a training step")
    loggers: tuple[str, ...] = option(
        (),
        choices=LOGGERS,
        help="what else gets metrics, settings and pictures; by default tensorboard if installed",
    )
    ddp_timeout: float = option(
        DEFAULT_TIMEOUT, help="seconds a rank waits for the others before the run fails"
    )
    auto: tuple[str, ...] = ()  # no flag: which of hyp and optimizer were AUTO and have a value now

    def __post_init__(self) -> None:
        check_options(self)
        if self.batch_size == 0 or self.save_period == 0:
            raise ValueError("--batch-size and --save-period must be positive or -1, got 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.backbone_weights and self.weights:
            raise ValueError(
                "--backbone-weights and --weights exclude each other: a checkpoint brings its own"
                " backbone"
            )
        if self.allow_partial and not self.backbone_weights:
            raise ValueError("--allow-partial needs --backbone-weights")
        if not self.ddp_timeout > 0:
            raise ValueError(f"--ddp-timeout must be positive, got {self.ddp_timeout}")
        if self.rect and self.multi_scale:
            raise ValueError(
                "--rect and --multi-scale exclude each other: both choose the batch's size"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for opt.yaml and checkpoints."""
        plain = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; any error for an impossible value or an unknown key."""
        default = TrainConfig()
        plain: dict[str, Any] = {}
        for key, value in values.items():
            plain[key] = tuple(value) if isinstance(value, list) else value
            kind = type(getattr(default, key))
            if key != "resume" and not isinstance(
                plain[key], (int, float) if kind is float else kind
            ):
                raise TypeError(f"{flag(key)} is {value!r}")
        return TrainConfig(**plain)

    def resumed_as(self, saved: TrainConfig, given: Collection[str]) -> TrainConfig:
        """The settings of a resumed run: `saved`, with what this command line may change.

        `given`: the fields that the command line names.  UserError for those that differ from the
        saved run and cannot be changed in it.
        """
        typed = {key: getattr(self, key) for key in given}
        free = {key: value for key, value in typed.items() if key in FREE_ON_RESUME}
        fixed = set(typed) - set(free) - ({"project"} if self.resume == NEWEST else set())
        chosen = {key for key in saved.auto if typed.get(key) == AUTO}
        differing = [key for key in sorted(fixed - chosen) if typed[key] != getattr(saved, key)]
        if differing:
            listed = ", ".join(
                f"{flag(key)} {typed[key]} (it has {getattr(saved, key)})" for key in differing
            )
            raise UserError(
                f"--resume: the run has other settings: {listed}; leave these flags out, or start"
                " a new run with --weights"
            )
        return dataclasses.replace(saved, **free)


def checkpoint_to_resume(resume: str, project: str) -> Path:
    """The last.pt that `--resume` means. UserError when there is none."""
    if resume != NEWEST:
        path = Path(resume)
        if path.is_dir():
            path = path / "weights" / "last.pt"
        if not path.is_file():
            raise UserError(f"--resume {resume}: {path} does not exist")
        return path.resolve()
    found = Path(project).glob("*/weights/last.pt")
    newest = max(found, key=lambda item: item.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(f"--resume: no run with weights/last.pt in {project}")
    return newest.resolve()

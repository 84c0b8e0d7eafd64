"""Hyper-parameters under YOLOv5's names, read from cfg/train/*.yaml."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.errors import UserError, nearest
from utils.files import find_config
from utils.terminal import say_main
from utils.yamlio import load_yaml

AUTO = "auto"
SHORT_RUN = 1000  # updates; where min_updates of YOLOv5's recipe begins to act, too
FOR_DEFAULT = ("SGD", "MuSGD")
FOR_ADAMW = ("small", "finetune")
FORMER = {"demo": "small"}  # names of recipes


def _number(default: float, *, low: float = 0.0, high: float = 1e9) -> Any:
    return dataclasses.field(default=default, metadata={"bounds": (low, high)})


@dataclass(frozen=True)
class Hyperparameters:
    """A recipe: everything that is not a command-line flag. Defaults are YOLOv5's."""

    lr0: float = _number(0.01, high=10.0)
    lrf: float = _number(0.01, high=1.0)  # final learning rate = lr0 * lrf
    momentum: float = _number(0.937, high=0.9999)  # SGD momentum or Adam beta1
    weight_decay: float = _number(0.0005, high=1.0)
    warmup_epochs: float = _number(3.0)
    warmup_momentum: float = _number(0.8, high=0.9999)
    warmup_bias_lr: float = _number(0.1)
    box: float = _number(0.05)
    cls: float = _number(0.5)
    cls_pw: float = _number(1.0)
    obj: float = _number(1.0)
    obj_pw: float = _number(1.0)
    iou_t: float = _number(
        0.2, high=1.0
    )  # kept for old files; YOLOv5's loss does not use it either
    anchor_t: float = _number(4.0, high=1e6, low=1.0)
    anchors: float = _number(0.0, high=100.0)  # per level, to be found; 0: those of the model
    fl_gamma: float = _number(0.0)
    hsv_h: float = _number(0.015, high=1.0)
    hsv_s: float = _number(0.7, high=1.0)
    hsv_v: float = _number(0.4, high=1.0)
    degrees: float = _number(0.0, high=180.0)
    translate: float = _number(0.1, high=1.0)
    scale: float = _number(0.5, high=0.99)
    shear: float = _number(0.0, high=89.0)
    perspective: float = _number(0.0, high=0.001)
    flipud: float = _number(0.0, high=1.0)
    fliplr: float = _number(0.5, high=1.0)
    mosaic: float = _number(1.0, high=1.0)
    mixup: float = _number(0.0, high=1.0)
    copy_paste: float = _number(0.0, high=1.0)
    # nominal batch size: gradients accumulate up to it
    nbs: float = _number(64.0, high=1e6, low=1.0)
    cosine: float = _number(0.0, high=1.0)  # share of the epochs in which the rate falls so
    close_mosaic: float = _number(0.0)  # epochs at the end without mosaic and mixup
    min_updates: float = _number(0.0)  # a run with fewer makes nbs smaller; not in YOLOv5

    @staticmethod
    def from_dict(
        values: dict[str, Any], where: Callable[[str], str] = lambda _: "hyper-parameters"
    ) -> Hyperparameters:
        """From plain values; UserError for unknown keys and impossible values, at `where(key)`."""
        fields = {field.name: field for field in dataclasses.fields(Hyperparameters)}
        checked: dict[str, float] = {}
        for name, value in values.items():
            if name not in fields:
                hint = nearest(name, fields)
                raise UserError(f"{where(name)}: unknown hyper-parameter {name!r}{hint}")
            low, high = fields[name].metadata["bounds"]
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):  # YAML 1.1 reads 1e-3 as text
                number = math.nan
            if not low <= number <= high:
                expected = f"a number from {low:g} to {high:g}"
                raise UserError(f"{where(name)}: {name} must be {expected}, got {value!r}")
            checked[name] = number
        return Hyperparameters(**checked)


def choose_recipe(
    hyp: str, optimizer: str, *, images: int, epochs: int, batch_size: int, pretrained: bool
) -> tuple[str, str]:
    """What --hyp and --optimizer are where they say `AUTO`; printed if the run's length decides.

    A run of fewer than SHORT_RUN updates at YOLOv5's nominal batch gets AdamW and the recipe
    'small', or 'finetune' from trained weights; a longer one SGD and YOLOv5's 'default'.  Where one
    of the two is given, the other goes with it.
    """
    nominal = max(int(Hyperparameters().nbs), batch_size)
    updates = epochs * images // nominal
    if hyp == optimizer == AUTO:
        short = updates < SHORT_RUN
        hyp = ("finetune" if pretrained else "small") if short else "default"
        optimizer = "AdamW" if short else "SGD"
        say_main(
            f"--hyp {hyp} --optimizer {optimizer}: {images} images x {epochs} epochs / {nominal} ="
            f" {updates} updates, {'fewer than' if short else 'at least'} {SHORT_RUN}"
        )
    elif hyp == AUTO:
        hyp = "default" if optimizer in FOR_DEFAULT else "finetune" if pretrained else "small"
    elif optimizer == AUTO:
        file = _file_of(hyp)
        known = any(file.samefile(_file_of(name)) for name in FOR_ADAMW)
        optimizer = "AdamW" if known else "SGD"
    return hyp, optimizer


def _file_of(name: str) -> Path:
    return find_config(FORMER.get(name, name), "train")


def load_hyp(name: str) -> Hyperparameters:
    """Read a recipe, by path or by its name in cfg/train/; `AUTO` not yet chosen: 'default'."""
    document = load_yaml(_file_of("default" if name == AUTO else name))
    return Hyperparameters.from_dict(document.mapping(), document.at)

"""Hyper-parameters under YOLOv5's names, read from cfg/train/*.yaml."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from utils.config import check_range
from utils.errors import UserError, nearest
from utils.paths import find_config
from utils.yamlio import load_yaml

_ANY = (0.0, 1e9)
_UNIT = (0.0, 1.0)
_BOUNDS = {
    "lr0": (0.0, 10.0),
    "lrf": _UNIT,
    "momentum": (0.0, 0.9999),
    "weight_decay": _UNIT,
    "warmup_momentum": (0.0, 0.9999),
    "anchor_t": (1.0, 1e6),
    "hsv_h": _UNIT,
    "hsv_s": _UNIT,
    "hsv_v": _UNIT,
    "degrees": (0.0, 180.0),
    "translate": _UNIT,
    "scale": (0.0, 0.99),
    "shear": (0.0, 89.0),
    "perspective": (0.0, 0.001),
    "flipud": _UNIT,
    "fliplr": _UNIT,
    "mosaic": _UNIT,
    "mixup": _UNIT,
    "copy_paste": _UNIT,
    "iou_t": _UNIT,
    "nbs": (1.0, 1e6),
}


@dataclass(frozen=True)
class Hyperparameters:
    """A recipe: everything that is not a command-line flag. Defaults are YOLOv5's."""

    lr0: float = 0.01
    lrf: float = 0.01  # final learning rate = lr0 * lrf
    momentum: float = 0.937  # SGD momentum or Adam beta1
    weight_decay: float = 0.0005
    warmup_epochs: float = 3.0
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    box: float = 0.05
    cls: float = 0.5
    cls_pw: float = 1.0
    obj: float = 1.0
    obj_pw: float = 1.0
    iou_t: float = 0.2  # kept for old files; YOLOv5's loss does not use it either
    anchor_t: float = 4.0
    fl_gamma: float = 0.0
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.1
    scale: float = 0.5
    shear: float = 0.0
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    nbs: float = 64.0  # nominal batch size: gradients accumulate up to it
    min_updates: float = 0.0  # a run with fewer makes nbs smaller; not in YOLOv5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_range(name, value, *_BOUNDS.get(name, _ANY))

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = "hyper-parameters") -> Hyperparameters:
        """From plain values; unknown keys and non-numbers raise UserError."""
        known = [field.name for field in dataclasses.fields(Hyperparameters)]
        checked: dict[str, float] = {}
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{where}: unknown hyper-parameter {name!r}{nearest(name, known)}")
            try:
                checked[name] = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):  # YAML 1.1 reads 1e-3 as text
                checked[name] = math.nan
            if math.isnan(checked[name]):
                raise UserError(f"{where}: {name} must be a number, got {value!r}")
        try:
            return Hyperparameters(**checked)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error


def load_hyp(name: str) -> Hyperparameters:
    """Read a recipe, by path or by its name in cfg/train/."""
    document = load_yaml(find_config(name, "train"))
    values = document.mapping()
    for key in values:
        Hyperparameters.from_dict({key: values[key]}, document.at(key))
    return Hyperparameters.from_dict(values, str(document.path))

"""The log of a training run: console rows, results.csv, results.png, TensorBoard."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# The ecosystem's columns, in its order; EXTRA_COLUMNS follow them.
COLUMNS = (
    "epoch",
    "train/box_loss",
    "train/obj_loss",
    "train/cls_loss",
    "metrics/precision",
    "metrics/recall",
    "metrics/mAP_0.5",
    "metrics/mAP_0.5:0.95",
    "val/box_loss",
    "val/obj_loss",
    "val/cls_loss",
    "x/lr0",
    "x/lr1",
    "x/lr2",
)
EXTRA_COLUMNS = ("images_per_second", "train_seconds", "val_seconds", "data_wait_share")
CONSOLE = ("Epoch", "GPU_mem", "box_loss", "obj_loss", "cls_loss", "Instances", "Size")
DRAWN = (*COLUMNS[1:4], *COLUMNS[4:6], *COLUMNS[8:11], *COLUMNS[6:8])


def console_header() -> str:
    """The names of the columns of `console_row`."""
    return ("%11s" * len(CONSOLE)) % CONSOLE


def console_row(
    epoch: str, memory: str, losses: Sequence[float], *, instances: int, size: int
) -> str:
    """One line under `console_header`."""
    numbers = "".join(f"{value:11.4g}" for value in losses)
    return f"{epoch:>11s}{memory:>11s}{numbers}{instances:11d}{size:11d}"


def csv_text(rows: Iterable[Mapping[str, float]]) -> str:
    """The rows as CSV, one for each epoch; a value that was not measured stays empty."""
    columns = (*COLUMNS, *EXTRA_COLUMNS)
    lines = [",".join(columns)]
    for row in rows:
        lines.append(",".join(_cell(row.get(name, math.nan)) for name in columns))
    return "\n".join(lines) + "\n"


def _cell(value: float) -> str:
    if math.isnan(value):
        return ""
    return str(int(value)) if abs(value) < 1e9 and value == int(value) else f"{value:.6g}"


def plot_results(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Losses and metrics over epochs as one plot; nothing without rows."""
    if not rows:
        return
    figure = Figure(figsize=(15, 6), layout="tight")
    axes = figure.subplots(2, 5).ravel()
    epochs = [row["epoch"] for row in rows]
    for axis, name in zip(axes, DRAWN, strict=True):
        values = [row.get(name, math.nan) for row in rows]
        axis.plot(epochs, values, marker=".", linewidth=1.5)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[5:]:
        axis.set_xlabel("epoch")
    figure.savefig(path, dpi=120)


class TensorBoard:
    """Scalars per epoch as TensorBoard events, when tensorboard is installed; else nothing."""

    def __init__(self, folder: Path, *, enabled: bool, purge_from: int) -> None:
        """`purge_from`: the epoch that a resumed run continues; older events of it are removed."""
        self._writer: Any = None
        if enabled and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and optional

            self._writer = SummaryWriter(str(folder), purge_step=purge_from)

    def add(self, row: Mapping[str, float]) -> None:
        """Write one row of results.csv at its epoch."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "epoch" and not math.isnan(value):
                    self._writer.add_scalar(name, value, int(row["epoch"]))
            self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()

"""Train, evaluate, compare and use detectors from a program; docs/python-api.md has examples.

    import featherdet

    run = featherdet.train(data="mine.yaml", cfg="yolov5n", epochs=50)
    print(run.metrics.map50, run.best)
    print(featherdet.Predictor(run.best)("image.jpg").text)

Settings are the flags of the command lines, by name: `batch_size=16` or `batch=16` for --batch-size
and --batch, a list for several values, True for a flag without a value.  What a user can fix raises
`UserError` with one line; nothing ends the program.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.evaluate.metrics import DetectionMetrics
    from engine.predict.predictor import Predictor
    from engine.train.loop import TrainResult
    from models.detector import Detector
    from utils.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "Predictor",
    "UserError",
    "compare",
    "evaluate",
    "export",
    "load_model",
    "train",
]
_ROOT = Path(__file__).resolve().parent.parent


def train(*, callbacks: Sequence[object] = (), **settings: Any) -> TrainResult:
    """Train as train.py does: the folder of the run, its metrics, and the rows of results.csv.

    `callbacks`: objects with on_train_start(run), on_batch_end(run), on_epoch_end(run, row),
    on_checkpoint(run, path), on_train_end(run, metrics), or some of these.
    Ctrl-C saves the state to resume from and raises KeyboardInterrupt.
    """
    _prepare()
    from engine.train.config import TrainConfig
    from engine.train.loop import fit
    from utils.config import from_settings

    return fit(*from_settings(TrainConfig, settings), callbacks=callbacks)


def evaluate(weights: str | Path, **settings: Any) -> DetectionMetrics | None:
    """Validate a checkpoint as val.py does: `.map`, `.map50`, `.table()`, `.to_dict()`.

    None for `task="study"`, which leaves study.csv.
    """
    _prepare()
    from engine.evaluate.config import ValConfig
    from engine.evaluate.run import run
    from utils.config import from_settings

    return run(from_settings(ValConfig, {"weights": weights, **settings})[0])


def compare(**settings: Any) -> Path | None:
    """Compare as compare.py does: the folder of results.json, table.csv and report.html.

    Each run is a process of its own.  Raises PartlyDoneError where some of them failed.
    """
    _prepare()
    from engine.compare.comparison import compare
    from engine.compare.config import CompareConfig
    from utils.config import from_settings

    return compare(from_settings(CompareConfig, settings)[0])


def export(weights: str | Path, **settings: Any) -> list[Path]:
    """Export a checkpoint as export.py does: the files and folders it wrote."""
    _prepare()
    from engine.export.config import ExportConfig
    from engine.export.run import run
    from utils.config import from_settings

    return run(from_settings(ExportConfig, {"weights": weights, **settings})[0])


def load_model(weights: str | Path, *, device: str = "") -> Detector:
    """The network of a FeatherDet or YOLOv5 checkpoint, in eval mode, as a torch module.

    (B, 3, H, W) float in [0, 1] -> raw maps; `model.detect` decodes them.  For images use
    `Predictor`.
    """
    _prepare()
    from engine.checkpoint import load_detector
    from engine.distributed import select_device

    return load_detector(weights, device=select_device(device))


def __getattr__(name: str) -> Any:
    """`Predictor` and `UserError`, imported when they are asked for."""
    if name not in {"Predictor", "UserError"}:
        raise AttributeError(f"module 'featherdet' has no attribute {name!r}")
    _prepare()
    if name == "UserError":
        from utils.errors import UserError

        return UserError
    from engine.predict.predictor import Predictor

    return Predictor


def _prepare() -> None:
    """Before the first import of our packages; ImportError where others have their names."""
    for name in ("utils", "engine", "models", "data"):
        found = importlib.util.find_spec(name)
        if found is None or Path(found.origin or "").resolve().parent != _ROOT / name:
            raise ImportError(
                f"FeatherDet's package {name!r} is hidden by {found and found.origin}: models,"
                " data, utils, engine and cfg are top-level names; rename yours"
            )
    from utils.errors import missing_libraries_named, wait_briefly

    wait_briefly()
    with missing_libraries_named():
        import cv2  # noqa: F401

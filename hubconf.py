"""For torch.hub: torch.hub.load("path/to/FeatherDet", "custom", "best.pt", source="local")."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.predict.predictor import Predictor

dependencies = ["cv2", "numpy", "PIL", "torch", "torchvision", "tqdm", "yaml"]


def custom(path: str | Path, *, device: Any = "", **options: Any) -> Predictor:
    """A `Predictor` (docs/detect.md) for a checkpoint or exported file: images in, results out.

    `device`: '', 'cpu', a GPU's number, or a torch.device; `options` are Predictor's, e.g.
    conf=0.4, iou=0.5, classes=["person"], image_size=640.  Raises UserError.
    """
    from engine.predict.predictor import Predictor

    return Predictor(path, device="" if device is None else str(device), **options)

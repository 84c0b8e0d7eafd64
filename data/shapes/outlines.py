"""The classes of the embedded data set as polygons, and polygons as soft masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

_SUBPIXELS = 4  # per pixel and axis


def _arc(start: int, stop: int, step: int = 6, radius: int = 1000, x: int = 0) -> np.ndarray:
    """(P, 2) int32: a point every `step` degrees of the circle around (x, 0), clockwise."""
    return np.array(cv2.ellipse2Poly((x, 0), (radius, radius), 0, start, stop, step))


_SQUARE = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
_ARROW = np.array([(-100, -26), (5, -26), (5, -72), (100, 0), (5, 72), (5, 26), (-100, 26)])
_CROSS = np.array([(95, -33), (95, 33), (33, 33), (33, 95), (-33, 95), (-33, 33)])  # one half
_STAR = np.stack((_arc(0, 288, 72), _arc(36, 324, 72, radius=420)), 1).reshape(-1, 2)
_HEART = (_arc(150, 360, radius=500, x=-500), _arc(180, 390, radius=500, x=500), [(0, 1250)])
_CRESCENT = (_arc(51, 309), _arc(77, 283, radius=800, x=450)[::-1])

# Closed polygons, each class in a unit of its own; the even-odd rule makes holes.
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "disc": (_arc(0, 360),),
    "ring": (_arc(0, 360), _arc(0, 360, radius=520)),
    "triangle": (_arc(0, 360, 120),),
    "rectangle": (_SQUARE,),
    "hexagon": (_arc(0, 360, 60),),
    "star": (_STAR,),
    "cross": (np.concatenate((_CROSS, -_CROSS)),),
    "arrow": (_ARROW,),
    "crescent": (np.concatenate(_CRESCENT),),
    "heart": (np.concatenate(_HEART),),
}
NAMES = tuple(OUTLINES)


def place(
    name: str, centre: Any, side: int, *, degrees: int = 0, squeeze: float = 1.0
) -> tuple[np.ndarray, ...]:
    """The class's polygons (P, 2) in pixels, turned clockwise by `degrees`.

    Their box has its middle at `centre` (x, y) and the longer side `side`; `squeeze` is the shorter
    over the longer axis, before turning.
    """
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = np.array([(cosine, sine), (-sine, cosine)])
    turned = [(polygon * (1, squeeze)) @ turn for polygon in OUTLINES[name]]
    low, high = turned[0].min(0), turned[0].max(0)
    scale = side / (high - low).max()
    return tuple((polygon - (low + high) / 2) * scale + centre for polygon in turned)


def rasterize(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Polygons in pixels -> (H, W) uint8: how much of each pixel they cover, 0 to 255."""
    mask: np.ndarray = np.zeros(size, np.uint8)
    corners = np.concatenate(polygons)
    left, top = np.clip(np.floor(corners.min(0)).astype(int), 0, size[::-1])
    right, bottom = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, size[::-1])
    if left < right and top < bottom:
        shape = (bottom - top, _SUBPIXELS, right - left, _SUBPIXELS)
        fine: np.ndarray = np.zeros((shape[0] * _SUBPIXELS, shape[2] * _SUBPIXELS), np.uint8)
        # Not 1/2: corners at decimal fractions would be ties, which round by a machine's last bit
        moved = [
            np.rint((p - (left, top)) * _SUBPIXELS - 31 / 64).astype(np.int32) for p in polygons
        ]
        cv2.fillPoly(fine, moved, 1)
        covered = fine.reshape(shape).sum((1, 3), dtype=np.int32)
        mask[top:bottom, left:right] = covered * 255 // _SUBPIXELS**2
    return mask

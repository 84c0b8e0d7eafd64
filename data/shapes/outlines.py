"""The classes of the embedded data set: their outlines as polygons, and polygons as soft masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

SUPERSAMPLE = 4  # sub-pixels per pixel and axis; own averaging, because it is the same everywhere

Outline = tuple[np.ndarray, ...]  # closed polygons (P, 2) float64; the even-odd rule makes holes


def _circle(radius: float, *, points: int = 48) -> np.ndarray:
    angle = np.arange(points) * (2 * np.pi / points)
    return radius * np.stack((np.cos(angle), np.sin(angle)), 1)


def _regular(corners: int) -> Outline:
    return (_circle(1.0, points=corners),)


def _star() -> Outline:
    points = _circle(1.0, points=10)
    points[1::2] *= 0.42
    return (points,)


def _cross() -> Outline:
    arm, end = 0.33, 0.95
    quarter = np.array([(end, -arm), (end, arm), (arm, arm)])
    turns = [quarter @ np.array([(c, s), (-s, c)]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    return (np.concatenate(turns).astype(np.float64),)


def _arrow() -> Outline:
    half = [(-1.0, -0.26), (0.05, -0.26), (0.05, -0.72), (1.0, 0.0)]
    mirrored = [(x, -y) for x, y in reversed(half[:-1])]
    return (np.array(half + mirrored, dtype=np.float64),)


def _crescent() -> Outline:
    # The inner arc is part of a circle of radius 0.8 round (0.45, 0); both arcs share the horns.
    horn = (1.0 + 0.45**2 - 0.8**2) / (2 * 0.45)
    outer_angle = np.arccos(horn)
    inner_angle = np.arccos((horn - 0.45) / 0.8)
    outer = np.linspace(outer_angle, 2 * np.pi - outer_angle, 32)
    inner = np.linspace(2 * np.pi - inner_angle, inner_angle, 32)
    return (
        np.concatenate(
            (
                np.stack((np.cos(outer), np.sin(outer)), 1),
                np.stack((0.45 + 0.8 * np.cos(inner), 0.8 * np.sin(inner)), 1),
            )
        ),
    )


def _heart() -> Outline:
    angle = np.arange(48) * (2 * np.pi / 48)
    x = 16 * np.sin(angle) ** 3
    y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return (np.stack((x, -y), 1) / 17.0,)


OUTLINES: dict[str, Callable[[], Outline]] = {
    "disc": lambda: (_circle(1.0),),
    "ring": lambda: (_circle(1.0), _circle(0.52)),
    "triangle": lambda: _regular(3),
    "rectangle": lambda: (np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),),
    "hexagon": lambda: _regular(6),
    "star": _star,
    "cross": _cross,
    "arrow": _arrow,
    "crescent": _crescent,
    "heart": _heart,
}


@dataclass(frozen=True)
class Pose:
    """Where and how an outline lies in the picture."""

    centre: tuple[float, float]  # x, y in pixels
    size: float  # longer side of the bounding box in pixels
    angle: float  # radians, clockwise on the screen
    squeeze: float = 1.0  # shorter over longer axis, before the rotation


def place(outline: Outline, pose: Pose) -> Outline:
    """The outline in pixels: centred on `pose.centre`, its longer side exactly `pose.size`."""
    cosine, sine = np.cos(pose.angle), np.sin(pose.angle)
    turn = np.array([(cosine, sine), (-sine, cosine)])
    turned = [(polygon * (1.0, pose.squeeze)) @ turn for polygon in outline]
    low, high = turned[0].min(0), turned[0].max(0)
    scale = pose.size / float((high - low).max())
    middle = (low + high) / 2
    return tuple((polygon - middle) * scale + np.array(pose.centre) for polygon in turned)


@dataclass(frozen=True)
class Mask:
    """A soft mask somewhere in the plane; it may reach over the edges of any picture."""

    left: int
    top: int
    alpha: np.ndarray  # (h, w) float64 in [0, 1]: the part of each pixel that is covered

    @property
    def area(self) -> int:
        """Pixels covered by half or more."""
        return int(np.count_nonzero(self.alpha >= 0.5))


def rasterize(outline: Outline, *, inset: float = 0.0) -> Mask:
    """Polygons in pixels (even-odd rule) -> their soft mask, shrunk by `inset` pixels all round."""
    corners = np.concatenate(outline)
    left, top = (int(value) for value in np.floor(corners.min(0)))
    width, height = (int(value) for value in np.ceil(corners.max(0)) - (left, top) + 1)
    fine: np.ndarray = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    polygons = [
        np.rint((polygon - (left, top)) * SUPERSAMPLE - 0.5).astype(np.int32) for polygon in outline
    ]
    cv2.fillPoly(fine, polygons, 1)
    if inset > 0:
        kernel = np.ones((2 * round(inset * SUPERSAMPLE) + 1,) * 2, np.uint8)
        fine = cv2.erode(fine, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    rows = sum(fine[i::SUPERSAMPLE] for i in range(1, SUPERSAMPLE)) + fine[::SUPERSAMPLE]
    cells = sum(rows[:, i::SUPERSAMPLE] for i in range(1, SUPERSAMPLE)) + rows[:, ::SUPERSAMPLE]
    return Mask(left, top, cells / SUPERSAMPLE**2)

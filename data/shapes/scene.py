"""Scenes of the embedded data set: outlines, textures, clutter, objects, and their annotations.

Random numbers are integers, and pixels are computed in integers or by exact functions of OpenCV,
so that the images are the same on every machine.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

# Difficulty, measured by training yolov5n and yolov5n-ghost as `make demo` does. Shares are in %.
EMPTY_SHARE, CROWD_SHARE = 8, 8  # of images: without objects; with one crowd region
OBJECTS = (3, 16)  # min and max, in an image that has any
SIZE_BANDS = ((10, 8, 16), (36, 16, 64), (54, 64, None))  # share, min and max longer side (px)
MAX_SIDE = 0.85  # of the image's shorter side, where a band has no max
TILT, SQUEEZE = 34, 70  # max rotation either way in degrees, min ratio of the axes in %
OVERLAP, ANYWHERE = 0.25, 15  # max part of an object over others; share of objects with no limit
USUAL_HUE, OUTLINED = 90, 50  # share of objects in their class's usual hue; with a rim
MIN_VISIBLE, MIN_SIDE = 0.30, 4  # of an object, and in pixels; less is not annotated
CRUMB = 0.03  # loose parts under this part of an object's visible area do not count
CONTRAST = 80  # min RGB distance between a colour and what it is painted on

Size = tuple[int, int]  # height, width
Rng = np.random.Generator


def _arc(start: int, stop: int, step: int = 6, radius: int = 1000, x: int = 0) -> np.ndarray:
    """(P, 2) int32: a point every `step` degrees of the circle around (x, 0), clockwise."""
    return np.array(cv2.ellipse2Poly((x, 0), (radius, radius), 0, start, stop, step))


_CROSS = np.array([(95, -33), (95, 33), (33, 33), (33, 95), (-33, 95), (-33, 33)])  # one half
_HEART = (_arc(150, 360, radius=500, x=-500), _arc(180, 390, radius=500, x=500), [(0, 1250)])
# Closed polygons, each class in a unit of its own; the even-odd rule makes holes.
OUTLINES = {
    "disc": (_arc(0, 360),),
    "ring": (_arc(0, 360), _arc(0, 360, radius=520)),
    "triangle": (_arc(0, 360, 120),),
    "rectangle": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),),
    "hexagon": (_arc(0, 360, 60),),
    "star": (np.stack((_arc(0, 288, 72), _arc(36, 324, 72, radius=420)), 1).reshape(-1, 2),),
    "cross": (np.concatenate((_CROSS, -_CROSS)),),
    "arrow": (np.array([(-100, -26), (5, -26), (5, -72), (100, 0), (5, 72), (5, 26), (-100, 26)]),),
    "crescent": (np.concatenate((_arc(51, 309), _arc(77, 283, radius=800, x=450)[::-1])),),
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


def rasterize(polygons: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """Polygons in pixels -> (H, W) uint8: how much of each pixel they cover, 0 to 255."""
    mask: np.ndarray = np.zeros(size, np.uint8)
    corners = np.concatenate(polygons)
    low = np.clip(np.floor(corners.min(0)).astype(int), 0, size[::-1])
    high = np.clip(np.ceil(corners.max(0)).astype(int) + 1, 0, size[::-1])
    part = mask[low[1] : high[1], low[0] : high[0]]
    if part.size:
        fine = part.repeat(4, 0).repeat(4, 1)  # 16 samples in a pixel
        # Not 1/2: corners at decimal fractions would be ties, which round by a machine's last bit
        cv2.fillPoly(fine, [np.rint(4 * (p - low) - 31 / 64).astype(np.int32) for p in polygons], 1)
        covered = fine.reshape(len(part), 4, -1, 4).sum((1, 3), dtype=np.int32)
        part[:] = covered * 255 // 16
    return mask


@dataclass(frozen=True)
class Canvas:
    """An image in the making; `paint` changes it in place."""

    image: np.ndarray  # (H, W, 3) int32 RGB
    owner: np.ndarray  # (H, W) uint8: the number of the object that is seen there; 0: none

    def paint(self, mask: np.ndarray, colour: np.ndarray, owner: int, opacity: int = 255) -> None:
        """Lay `colour`, (3,) or the (h, w, 3) of the mask's bounding box, over what is there."""
        x, y, width, height = cv2.boundingRect(mask)
        part = (slice(y, y + height), slice(x, x + width))
        alpha = mask[part].astype(np.int32)[..., None] * opacity // 255
        self.image[part] += alpha * (colour - self.image[part]) // 255
        self.owner[part][mask[part] >= 128] = owner


def random_colour(rng: Rng, ground: np.ndarray | None = None, hue: int | None = None) -> np.ndarray:
    """(3,) int32 RGB that stands out from `ground`: clearly of `hue` (0 to 359), or of any."""
    min_saturation, min_value = (25, 30) if hue is None else (60, 50)
    while True:
        degrees = rng.integers(360) if hue is None else hue
        saturation, value = rng.integers(min_saturation, 101), rng.integers(min_value, 101)
        rgb = colorsys.hsv_to_rgb(int(degrees) / 360, int(saturation) / 100, int(value) / 100)
        colour = np.array([round(255 * channel) for channel in rgb], np.int32)
        if ground is None or ((colour - ground) ** 2).sum() >= CONTRAST**2:
            return colour


def noise(rng: Rng, size: Size, period: int) -> np.ndarray:
    """(h, w) int32, 0..255: random values about `period` pixels apart, bilinear between."""
    grid = rng.integers(0, 256, (size[0] // period + 2, size[1] // period + 2), dtype=np.uint8)
    return cv2.resize(grid, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT).astype(np.int32)


def _wave(size: Size, degrees: int, period: int) -> np.ndarray:
    """(h, w), -128..128: a triangle wave that runs in direction `degrees`."""
    y, x = np.ogrid[: size[0], : size[1]]
    angle = math.radians(degrees)
    phase = x * round(1024 * math.cos(angle) / period) + y * round(1024 * math.sin(angle) / period)
    return np.abs(phase % 1024 - 512) // 2 - 128


def texture(rng: Rng, size: Size, first: np.ndarray, second: np.ndarray, period: int) -> np.ndarray:
    """(h, w, 3) int32: a random pattern between two colours; `period` in pixels."""
    degrees = int(rng.integers(180))
    wave, across = _wave(size, degrees, period), _wave(size, degrees + 90, period)
    patterns = (
        _wave(size, degrees, 2 * max(size)) + 128,  # a gradient
        3 * wave + 128,  # stripes
        wave * across // 20 + 128,  # checks
        3 * (wave + across - 40),  # dots
        (2 * noise(rng, size, period) + noise(rng, size, period // 3 + 1)) // 3,  # clouds
        np.full(size, rng.integers(256)),
    )
    mix = np.clip(patterns[rng.integers(len(patterns))], 0, 255)[..., None]
    return (first + mix * (second - first) // 255).astype(np.int32)


def scribble(rng: Rng, canvas: Canvas, *, max_width: int = 9) -> None:
    """One mark that is of no class: a winding ribbon, or a blot with a ragged rim."""
    height, width = canvas.owner.shape
    centre = rng.integers((0, 0), (width, height))
    if rng.integers(100) < 65:
        mask = np.zeros((height, width), np.uint8)
        path = (rng.integers(-10, 11, (12, 2)) + rng.integers(-10, 11, 2)).cumsum(0)
        reach = min(height, width) * rng.integers(5, 36) // 100
        path = (path - path[6]) * reach // max(np.abs(path - path[6]).max(), 1) + centre
        thickness = int(rng.integers(1, max_width + 1))
        cv2.polylines(mask, [path.astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
    else:
        blot = place("disc", (0, 0), 2)[0][::3]
        radii = rng.integers(10, 101, (len(blot), 1))
        blot = blot * (radii + np.roll(radii, 1, 0)) / 200
        mask = rasterize([blot * rng.integers(4, 36) + centre], (height, width))
    canvas.paint(mask, random_colour(rng), 0, opacity=int(rng.integers(128, 256)))


def compose(rng: Rng, size: Size | None = None) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """A random image (H, W, 3) uint8 RGB of `size`, and its annotations as `annotate` makes them.

    Equal generators give equal scenes, bit for bit.
    """
    size = size or (int(rng.integers(224, 301)), int(rng.integers(288, 401)))
    # A textured, muted ground with clutter: ribbons and blots in the objects' colours
    first = random_colour(rng)
    second = first + (random_colour(rng) - first) * 6 // 10
    muted = [colour + (colour.sum() // 3 - colour) * 6 // 10 for colour in (first, second)]
    image = texture(rng, size, muted[0], muted[1], int(rng.integers(8, 91)))
    image += (noise(rng, size, int(rng.integers(12, 61)))[..., None] - 128) * 60 // 255
    canvas = Canvas(image, np.zeros(size, np.uint8))
    for _ in range(rng.integers(3, 11)):
        scribble(rng, canvas)
    objects: list[tuple[int, np.ndarray]] = []  # label and mask of object 1, 2, ...
    bands = np.repeat(np.arange(len(SIZE_BANDS)), [share for share, _, _ in SIZE_BANDS])
    empty, crowd = rng.integers(100) < EMPTY_SHARE, rng.integers(100) < CROWD_SHARE
    if crowd and not empty:
        objects.append((NAMES.index("disc"), _paint_crowd(rng, canvas)))
    sides = []  # longer sides of the objects, from large (underneath) to small
    for _ in range(0 if empty else rng.integers(*OBJECTS, endpoint=True)):
        _, low, high = SIZE_BANDS[bands[rng.integers(100)]]
        ratio = (high or MAX_SIDE * min(size)) / low
        sides.append(round(low * ratio ** (rng.integers(256) / 255)))
    for side in sorted(sides, reverse=True):
        label = int(rng.integers(len(NAMES)))
        mask = _free_mask(rng, canvas, NAMES[label], side)
        if mask is not None:
            objects.append((label, mask))
            paint_object(rng, canvas, label, mask, owner=len(objects))
    for _ in range(rng.integers(0, 4)):
        scribble(rng, canvas, max_width=3)
    entries = [
        annotate(label, canvas.owner == number, mask, crowd=bool(crowd and number == 1))
        for number, (label, mask) in enumerate(objects, 1)
    ]
    light = 217 + noise(rng, size, max(size)) * 77 // 255  # of 255: 15 % either way
    grain = rng.integers(-10, 11, canvas.image.shape, dtype=np.int32)
    image = np.clip(canvas.image * light[..., None] // 255 + grain, 0, 255)
    return image.astype(np.uint8), [entry for entry in entries if entry]


def _free_mask(rng: Rng, canvas: Canvas, name: str, side: int) -> np.ndarray | None:
    """An object's mask (H, W) where it covers few others, or None where there is no room."""
    height, width = canvas.owner.shape
    allowed = 1.0 if rng.integers(100) < ANYWHERE else OVERLAP
    margin = side * 35 // 100  # up to a seventh may reach over the edge
    for _ in range(12):
        centre = rng.integers((margin, margin), (width - margin, height - margin))
        degrees, squeeze = int(rng.integers(-TILT, TILT + 1)), rng.integers(SQUEEZE, 101) / 100
        outline = place(name, centre, side, degrees=degrees, squeeze=squeeze)
        mask = rasterize(outline, (height, width))
        inside = mask >= 128
        if np.count_nonzero(canvas.owner[inside]) <= allowed * np.count_nonzero(inside):
            return mask
    return None


def paint_object(rng: Rng, canvas: Canvas, label: int, mask: np.ndarray, *, owner: int) -> None:
    """Paint a textured object in its class's usual hue or another one, with or without a rim."""
    pixels = canvas.image[mask >= 128]
    ground = pixels.sum(0) // max(len(pixels), 1)
    hue = (36 * label + int(rng.integers(-9, 10))) % 360 if rng.integers(100) < USUAL_HUE else None
    first = random_colour(rng, ground, hue)
    second = first + (random_colour(rng, ground, hue) - first) * rng.integers(2, 8) // 10
    side = max(cv2.boundingRect(mask)[2:])
    if side >= 16 and rng.integers(100) < OUTLINED:
        canvas.paint(mask, random_colour(rng, first), owner)
        kernel = 2 * int(rng.integers(1, 2 + side // 40)) + 1
        mask = cv2.erode(mask, np.ones((kernel, kernel), np.uint8))
    _, _, width, height = cv2.boundingRect(mask)
    period = max(side * int(rng.integers(12, 51)) // 100, 3)
    if width:  # the rim of a thin object covers all of it
        canvas.paint(mask, texture(rng, (height, width), first, second, period), owner)


def _paint_crowd(rng: Rng, canvas: Canvas) -> np.ndarray:
    """Paint a swarm of tiny discs as object 1; the mask (H, W) of the region around them."""
    height, width = canvas.owner.shape
    centre = rng.integers((width // 4, height // 4), (3 * width // 4, 3 * height // 4))
    reach = int(rng.integers(40, 91))
    outline = place("disc", centre, reach, degrees=int(rng.integers(180)), squeeze=0.6)
    region = rasterize(outline, (height, width))
    canvas.owner[region >= 128] = 1
    colour = random_colour(rng, canvas.image.sum((0, 1)) // (height * width))
    middles = np.argwhere(cv2.erode(region, np.ones((9, 9), np.uint8)) > 230)[:, ::-1]
    for middle in middles[rng.integers(len(middles), size=reach // 2)]:
        disc = rasterize(place("disc", middle, int(rng.integers(4, 8))), (height, width))
        canvas.paint(disc, colour + rng.integers(-30, 31, 3), 1)
    return region


def annotate(
    label: int, seen: np.ndarray, mask: np.ndarray, *, crowd: bool = False
) -> dict[str, Any] | None:
    """COCO's entry of an object of which the pixels `seen` (H, W) bool are visible; no ids.

    `label` indexes NAMES.  Box and polygons are of the outer contours without crumbs, so that holes
    are lost, as in COCO; a crowd has run lengths.  None where too little of the `mask` is left.
    """
    x, y, width, height = cv2.boundingRect(seen.astype(np.uint8))
    zoom = 4  # contours then run along the pixels' edges, to 1/8 pixel
    part = seen[y : y + height, x : x + width].astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
    mode = cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    contours, _ = cv2.findContours(part, *mode, offset=(zoom * x, zoom * y))
    area = int(np.count_nonzero(seen))
    contours = [c for c in contours if cv2.contourArea(c) >= CRUMB * area * zoom**2]
    if area < max(MIN_VISIBLE * np.count_nonzero(mask >= 128), 1) or not contours:
        return None
    box = [side // zoom for side in cv2.boundingRect(np.concatenate(contours))]
    if min(box[2:]) < MIN_SIDE:
        return None
    tolerance = zoom * min(max(0.01 * max(box[2:]), 0.3), 0.8)
    smooth = [cv2.approxPolyDP(contour, tolerance, True) for contour in contours]
    # A thin sliver stays as it is
    corners = [s if len(s) >= 3 else c for s, c in zip(smooth, contours, strict=True)]
    polygons = [[round(v, 2) for v in ((c + 0.5) / zoom).ravel().tolist()] for c in corners]
    entry = {"category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
    if not crowd:
        return {**entry, "segmentation": polygons}
    # COCO's uncompressed run lengths: zeros first, column by column
    starts = np.flatnonzero(np.diff(seen.T.ravel(), prepend=False))
    counts = np.diff(starts, prepend=0, append=seen.size).tolist()
    return {**entry, "segmentation": {"size": list(seen.shape), "counts": counts}}

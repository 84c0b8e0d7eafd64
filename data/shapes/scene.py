"""Scenes of the embedded data set: objects, their visible parts, and what COCO says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data.shapes.outlines import OUTLINES, Mask, Outline, Pose, place, rasterize
from data.shapes.paint import (
    Canvas,
    background,
    contrasting_colour,
    overlap,
    scribble,
    texture,
)
from utils.seeding import generator

# Difficulty. Measured by training yolov5n and yolov5n-ghost as `make demo` does.
NAMES = tuple(OUTLINES)
EMPTY_SHARE = 0.08  # images without objects
CROWD_SHARE = 0.08  # images with one crowd region
HEIGHTS, WIDTHS = (224, 300), (288, 400)
OBJECTS = (3, 16)  # at least and at most, in an image that has any
SIZE_BANDS = (  # share, smallest and largest longer side; None: 0.85 of the picture's shorter side
    (0.13, 8.0, 16.0),
    (0.40, 16.0, 64.0),
    (0.47, 64.0, None),
)
LARGEST = 0.85
TILT = 0.6  # largest rotation either way, in radians
SQUEEZE = 0.7  # smallest ratio of the axes
OVERLAP = 0.30  # share of an object that earlier objects may cover, and be covered ...
CAREFREE = 0.15  # ... except for this share of objects, which lie anywhere
USUAL_HUE = 0.9  # share of objects in their class's usual hue; the others have any
HUE_SPREAD = 0.015  # of usual hues, standard deviation in turns of the colour circle
OUTLINED = 0.5  # share of objects with a rim of another colour
MIN_VISIBLE = 0.30  # objects hidden more than 70 % are not annotated
MIN_SIDE = 4  # pixels; nor are slivers under this
CRUMB = 0.03  # loose parts of an object's visible area under this share do not count
_HIDDEN_TRIES = 12


@dataclass(frozen=True)
class Item:
    """One annotation: the visible part of an object, or a crowd region."""

    label: int  # index into NAMES
    box: tuple[int, int, int, int]  # xyxy pixels, the tight box of the visible pixels
    area: int  # visible pixels
    polygons: tuple[tuple[float, ...], ...]  # x1 y1 x2 y2 ...; empty for a crowd
    crowd: dict[str, list[int]] | None = None  # COCO's run-length form, of a crowd


@dataclass(frozen=True)
class Scene:
    """A picture and what is to be found in it."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Figure:
    """An object before it is painted; `style` seeds its colours, so that a video repeats them."""

    label: int
    pose: Pose
    style: int

    def outline(self) -> Outline:
        """The polygons in pixels."""
        return place(OUTLINES[NAMES[self.label]](), self.pose)


def compose(rng: np.random.Generator) -> Scene:
    """A random scene; equal generators give equal scenes, bit for bit."""
    size = (int(rng.integers(*HEIGHTS, endpoint=True)), int(rng.integers(*WIDTHS, endpoint=True)))
    canvas = background(rng, size)
    if rng.random() < EMPTY_SHARE:
        return Scene(canvas.finish(rng), ())
    figures = plan_figures(rng, size)
    crowd = rng.random() < CROWD_SHARE
    region = _paint_crowd(rng, canvas, owner=len(figures) + 1) if crowd else None
    items = paint_figures(rng, canvas, figures)
    if region is not None:
        items += _crowd_item(canvas, region, owner=len(figures) + 1)
    return Scene(canvas.finish(rng), items)


def plan_figures(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Figure, ...]:
    """Random objects for a picture of (height, width), mostly larger ones first (underneath)."""
    count = int(rng.integers(*OBJECTS, endpoint=True))
    sides = sorted((_random_side(rng, min(size)) for _ in range(count)), reverse=True)
    figures: list[Figure] = []
    taken = np.zeros(size, bool)
    for side in sides:
        figure = _placed(rng, taken, side)
        if figure is not None:
            figures.append(figure)
            mask = rasterize(figure.outline())
            target, source = overlap(size, mask)
            taken[target] |= mask.alpha[source] >= 0.5
    return tuple(figures)


def _random_side(rng: np.random.Generator, shorter: int) -> float:
    band = int(rng.choice(len(SIZE_BANDS), p=[share for share, _, _ in SIZE_BANDS]))
    _, low, high = SIZE_BANDS[band]
    return float(np.exp(rng.uniform(np.log(low), np.log(high or LARGEST * shorter))))


def _placed(rng: np.random.Generator, taken: np.ndarray, side: float) -> Figure | None:
    """A figure of a free place, or None where the picture is full. `taken`: (H, W) bool."""
    height, width = taken.shape
    allowed = 1.0 if rng.random() < CAREFREE else OVERLAP
    label, style = int(rng.integers(len(NAMES))), int(rng.integers(2**31))
    for _ in range(_HIDDEN_TRIES):
        margin = 0.35 * side  # up to a fifth may reach over the edge
        x, y = rng.uniform((margin, margin), (width - margin, height - margin))
        angle, squeeze = float(rng.uniform(-TILT, TILT)), float(rng.uniform(SQUEEZE, 1.0))
        figure = Figure(label, Pose((float(x), float(y)), side, angle, squeeze), style)
        mask = rasterize(figure.outline())
        target, source = overlap((height, width), mask)
        inside = mask.alpha[source] >= 0.5
        if np.count_nonzero(inside & taken[target]) <= allowed * np.count_nonzero(inside):
            return figure
    return None


def paint_figures(
    rng: np.random.Generator, canvas: Canvas, figures: Sequence[Figure]
) -> tuple[Item, ...]:
    """Paint the figures in order, a few thin scribbles over them; the items that stay visible."""
    masks = [_paint_figure(canvas, figure, owner=i + 1) for i, figure in enumerate(figures)]
    for _ in range(int(rng.integers(0, 4))):
        scribble(rng, canvas, widest=3.0)
    items = []
    for index, (figure, mask) in enumerate(zip(figures, masks, strict=True)):
        seen = _without_crumbs(canvas.owner == index + 1)
        area = int(np.count_nonzero(seen))
        if area < MIN_VISIBLE * mask.area:
            continue
        box = _tight_box(seen)
        if min(box[2] - box[0], box[3] - box[1]) >= MIN_SIDE:
            items.append(Item(figure.label, box, area, _polygons(seen)))
    return tuple(items)


def _paint_figure(canvas: Canvas, figure: Figure, *, owner: int) -> Mask:
    rng = generator(figure.style)
    outline = figure.outline()
    mask = rasterize(outline)
    target, source = overlap(canvas.size, mask)
    covered = mask.alpha[source]
    ground = (canvas.image[target] * covered[..., None]).sum((0, 1)) / max(covered.sum(), 1e-9)
    usual = (figure.label / len(NAMES) + rng.normal(0.0, HUE_SPREAD)) % 1.0
    hue = usual if rng.random() < USUAL_HUE else None
    first = contrasting_colour(rng, ground, hue)
    second = first + rng.uniform(0.2, 0.7) * (contrasting_colour(rng, ground, hue) - first)
    side = figure.pose.size
    period = side * float(rng.uniform(0.12, 0.5))
    fill = texture(rng, mask.alpha.shape, first=first, second=second, period=max(period, 3.0))
    rim = contrasting_colour(rng, first)
    if side < 14 or rng.random() >= OUTLINED:
        canvas.paint(mask, fill, owner=owner)
        return mask
    canvas.paint(mask, rim, owner=owner)
    inner = rasterize(outline, inset=float(rng.uniform(1.0, max(1.2, 0.045 * side))))
    canvas.paint(inner, fill, owner=owner)
    return mask


def _paint_crowd(rng: np.random.Generator, canvas: Canvas, *, owner: int) -> Mask:
    """Paint a swarm of tiny discs; the region around them."""
    height, width = canvas.size
    disc = OUTLINES["disc"]()
    reach = float(rng.uniform(40, 90))
    centre = rng.uniform((0.25 * width, 0.25 * height), (0.75 * width, 0.75 * height))
    shape = Pose((float(centre[0]), float(centre[1])), reach, float(rng.uniform(0, np.pi)), 0.6)
    region = rasterize(place(disc, shape))
    colour = contrasting_colour(rng, canvas.image.mean((0, 1)))
    places = np.argwhere(rasterize(place(disc, shape), inset=4).alpha > 0.9)
    for index in rng.choice(len(places), size=int(reach * 0.5), replace=False):
        y, x = places[index] + (region.top, region.left)
        tiny = place(disc, Pose((float(x), float(y)), float(rng.uniform(4, 7)), 0.0))
        canvas.paint(rasterize(tiny), colour + rng.uniform(-30, 30, 3), owner=owner)
    return region


def _crowd_item(canvas: Canvas, region: Mask, *, owner: int) -> tuple[Item, ...]:
    """The crowd's annotation (none when objects hide most of it)."""
    seen = np.zeros(canvas.size, bool)
    target, source = overlap(canvas.size, region)
    owners = canvas.owner[target]
    seen[target] = (region.alpha[source] >= 0.5) & ((owners == owner) | (owners == 0))
    area = int(np.count_nonzero(seen))
    if area < MIN_VISIBLE * region.area:
        return ()
    label = NAMES.index("disc")
    return (
        Item(
            label=label,
            box=_tight_box(seen),
            area=area,
            polygons=(),
            crowd={"size": list(canvas.size), "counts": list(run_lengths(seen))},
        ),
    )


def _without_crumbs(mask: np.ndarray) -> np.ndarray:
    """The mask without loose pixels, which would stretch its box; nobody would mark them."""
    left, top, right, bottom = _tight_box(mask)
    window = mask[top:bottom, left:right]
    if not window.size:
        return mask
    _, parts, stats, _ = cv2.connectedComponentsWithStats(window.astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= CRUMB * areas[1:].sum()
    kept[0] = False
    cleaned = np.zeros_like(mask)
    cleaned[top:bottom, left:right] = kept[parts]
    return cleaned


def _tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _polygons(mask: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Outer contours of the visible pixels, x1 y1 x2 y2 ... each; holes are lost, as in COCO."""
    left, top, right, bottom = _tight_box(mask)
    zoom = 4  # contours then run along the pixels' edges, to 1/8 pixel
    tolerance = zoom * float(np.clip(0.01 * max(right - left, bottom - top), 0.3, 0.8))
    part = mask[top:bottom, left:right].astype(np.uint8).repeat(zoom, 0).repeat(zoom, 1)
    contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        if len(contour) >= 3 and cv2.contourArea(contour) >= zoom * zoom:
            smooth = cv2.approxPolyDP(contour, tolerance, True)
            corners = smooth if len(smooth) >= 3 else contour  # a thin sliver stays as it is
            points = (corners[:, 0].astype(np.float64) + 0.5) / zoom + (left, top)
            polygons.append(tuple(round(float(value), 2) for value in points.ravel()))
    return tuple(polygons)


def run_lengths(mask: np.ndarray) -> tuple[int, ...]:
    """(H, W) bool -> COCO's uncompressed run lengths: zeros first, column by column."""
    flat = np.concatenate(([False], mask.T.ravel(), [False]))
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate(([0], edges, [mask.size])))
    counts = counts if counts[-1] else counts[:-1]
    return tuple(int(count) for count in counts)

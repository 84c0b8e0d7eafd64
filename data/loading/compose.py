"""Mosaic, warp, mixup, HSV and flips of a whole batch as tensor operators, on any device.

Equal to data.loading.transforms with the same draws: bytes are rounded wherever OpenCV rounds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.loading.geometry import is_axis_aligned
from utils.boxes import GREY

CHUNK = 1 << 22  # pixels composed at once where nothing is compiled, some 300 bytes for each
BEYOND = 3  # a position this far outside of a canvas is as good as any further one
FINE = float(1 << 24)  # times as many steps are as good as none: float32 has no finer ones
# OpenCV on bytes: steps of cv2.resize in a pixel, in a level after its rows and after its columns;
# fixed-point factors in hue and saturation
RESIZE_STEPS = (2048.0, 128.0, 4.0)
SHIFT, PER_HUE, PER_SATURATION = 4096, 4096 * 30, 4096 * 255
HUES = 180  # OpenCV's hue of a byte image counts in steps of 2 degrees
ROUND_DOWN = -0.498  # added to what OpenCV rounds to the nearest


@dataclass(frozen=True)
class Plan:
    """How a batch of B samples is composed: M canvases each (2 with mixup, else 1) of 4 tiles.

    Tiles are in the order top left, top right, bottom left, bottom right; a letterboxed image is
    the top left tile alone.  Where no tile reaches, and outside of the canvas, it is grey.
    """

    slots: Tensor  # (B, M, 4) int64: which of `images` is the tile, -1: none
    corners: Tensor  # (B, M, 4, 2) int32: (left, top) of the tile on the canvas, may be negative
    sizes: Tensor  # (B, M, 4, 2) int32: (width, height) of its image, at its slot's top left
    centres: Tensor  # (B, M, 2) int32: pixel (x, y) is of tile (x >= centre x) + 2 (y >= centre y)
    canvases: Tensor  # (B, M, 2) int32: (width, height)
    inverses: Tensor  # (B, M, 3, 3) float32: continuous coordinates, from the result to the canvas
    shares: Tensor  # (B,) float32: weight of the first canvas
    gains: Tensor  # (B, 3) float32: of hue, saturation and value; all 1: unchanged

    @staticmethod
    def blank(samples: int, canvases: int = 1) -> Plan:
        """Grey, in main memory; `place` fills it."""
        shape = (samples, canvases)
        return Plan(
            slots=torch.full((*shape, 4), -1),
            corners=torch.zeros(*shape, 4, 2, dtype=torch.int32),
            sizes=torch.zeros(*shape, 4, 2, dtype=torch.int32),
            centres=torch.zeros(*shape, 2, dtype=torch.int32),
            canvases=torch.zeros(*shape, 2, dtype=torch.int32),
            inverses=torch.eye(3).repeat(*shape, 1, 1),
            shares=torch.ones(samples),
            gains=torch.ones(samples, 3),
        )

    def place(
        self,
        sample: int,
        canvas: int,
        *,
        tiles: Sequence[tuple[int, tuple[int, int]]],
        centre: tuple[int, int],
        size: tuple[int, int],
        inverse: np.ndarray,
    ) -> None:
        """Describe one canvas: up to 4 `tiles` (slot, (height, width)) that touch at `centre`.

        An image on a letterbox is one tile whose lower right corner is the centre (x, y).  `size`
        is the canvas' (height, width), `inverse` (3, 3) leads from the result to the canvas.
        """
        slots, corners, sizes = (
            item[sample, canvas].numpy() for item in (self.slots, self.corners, self.sizes)
        )
        for number, (slot, (height, width)) in enumerate(tiles):
            slots[number] = slot
            sizes[number] = width, height
            corners[number] = (
                centre[0] - width * (number % 2 == 0),
                centre[1] - height * (number < 2),
            )
        self.centres.numpy()[sample, canvas] = centre
        self.canvases.numpy()[sample, canvas] = size[1], size[0]
        self.inverses.numpy()[sample, canvas] = inverse

    def __len__(self) -> int:
        return self.slots.shape[0]

    def __getitem__(self, rows: slice) -> Plan:
        """The plan of some of the samples."""
        return self.each(lambda item: item[rows])

    def each(self, change: Callable[[Tensor], Tensor]) -> Plan:
        """The plan of the changed tensors, e.g. copies on a device."""
        return Plan(*map(change, vars(self).values()))


def inverse_of(matrix: np.ndarray, size: tuple[int, int], *, ud: bool, lr: bool) -> np.ndarray:
    """(3, 3) from a result of (height, width) `size` back through flips and `matrix`.

    `matrix` is what `transforms.warp` used.  One that only scales and shifts has an inverse with
    zeros outside its diagonal, by which `compose` knows that a window was cropped and resized.
    """
    if is_axis_aligned(matrix):
        scale_x, scale_y = 1 / matrix[0, 0], 1 / matrix[1, 1]
        shift_x, shift_y = -matrix[0, 2] * scale_x, -matrix[1, 2] * scale_y
        inverse = np.array([[scale_x, 0, shift_x], [0, scale_y, shift_y], [0, 0, 1]])
    else:
        inverse = np.linalg.inv(matrix)
    for axis, flipped in enumerate((lr, ud)):
        if flipped:
            inverse[:, 2] += size[1 - axis] * inverse[:, axis]
            inverse[:, axis] *= -1
    return inverse


def compose(images: Tensor, plan: Plan, size: tuple[int, int]) -> Tensor:
    """(R, S, S, 3) uint8 RGB -> (B, 3, *size) uint8, channels last in memory.

    Nothing waits for the device and all shapes are static.  Under torch.compile the batch is one
    piece (fullgraph holds), else it is composed in pieces of about CHUNK pixels.
    """
    samples = max(CHUNK // (plan.slots.shape[1] * size[0] * size[1]), 1)
    if torch.compiler.is_compiling() or len(plan) <= samples:
        return _compose(images, plan, size)
    pieces = [plan[start : start + samples] for start in range(0, len(plan), samples)]
    return torch.cat([_compose(images, piece, size) for piece in pieces])


def _compose(images: Tensor, plan: Plan, size: tuple[int, int]) -> Tensor:
    position, steps = _positions(plan, size)
    cells = position.floor()
    share = ((position - cells) * steps[0]).round() / steps[0]
    weights = torch.stack((1 - share, share))[..., None]  # (2, B, M, 2, H, W, 1)
    across, down = weights.unbind(3)
    pixels = _neighbours(images, plan, cells.int())
    rows = ((pixels * across).sum(1) * steps[1]).floor() / steps[1]
    levels = ((rows * (down * steps[2])).floor().sum(0) / steps[2] + 0.5).floor()
    image = levels[:, 0]
    if levels.shape[1] > 1:
        weight = plan.shares[:, None, None, None]
        image = (image * weight + levels[:, 1] * (1 - weight)).round()
    same = (plan.gains == 1).all(1)[:, None, None, None]
    image = torch.where(same, image, _scale_hsv(image, plan.gains))
    return image.to(torch.uint8).permute(0, 3, 1, 2)


def _positions(plan: Plan, size: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Where each pixel of the result lies on its canvas, (B, M, 2, H, W), in pixel centres.

    Also the steps (B, M, 1, 1, 1) that OpenCV rounds to on the way: coarse ones after a crop,
    whose positions are clamped to the window.
    """
    inverse = plan.inverses
    height, width = size
    device = inverse.device
    x, y = (torch.arange(0.5, side, device=device) for side in (width, height))
    columns = inverse[..., 0, None, None] * x
    rows = (inverse[..., 1, None] * y + inverse[..., 2, None])[..., None]
    points = columns + rows  # (B, M, 3, H, W)
    depth = points[:, :, 2:]
    position = points[:, :, :2] / torch.where(depth == 0, 1e-9, depth) - 0.5

    tilt = inverse[..., 0, 1].abs() + inverse[..., 1, 0].abs() + inverse[..., 2, :2].abs().sum(-1)
    aligned = (tilt == 0)[..., None]  # (B, M, 1)
    first = inverse[..., :2, 2]
    sides = torch.cat((x[-1:], y[-1:])) + 0.5  # a tensor from numbers would be a copy from the host
    last = first + inverse.diagonal(dim1=-2, dim2=-1)[..., :2] * sides
    low = torch.where(aligned, torch.minimum(first, last).round(), -BEYOND)
    high = torch.where(aligned, torch.maximum(first, last).round() - 1, plan.canvases + BEYOND)
    fine = torch.where(aligned, 1.0, FINE)[..., None, None]
    steps = tuple(step * fine for step in RESIZE_STEPS)
    return position.clamp(low[..., None, None], high[..., None, None]), steps


def _neighbours(images: Tensor, plan: Plan, cells: Tensor) -> Tensor:
    """The pixels at `cells` (B, M, 2, H, W) x, y of the canvas, and those right of and below them.

    -> (2 down, 2 right, B, M, H, W, 3) uint8.
    """
    low = plan.corners.clamp(min=0)
    high = torch.minimum(plan.corners + plan.sizes, plan.canvases[:, :, None])
    high = torch.where(plan.slots[..., None] < 0, 0, high)
    bounds = torch.cat((low, high), -1).view(-1, 4)
    _, height, width, _ = images.shape
    starts = (plan.slots * height - plan.corners[..., 1]) * width - plan.corners[..., 0]

    first = torch.arange(0, bounds.shape[0], 4, dtype=torch.int32, device=cells.device)
    pair = torch.arange(2, dtype=torch.int32, device=cells.device).view(2, 1, 1, 1, 1, 1) + cells
    (x, y), (right, down) = (
        (both.select(3, 0), both.select(3, 1)[:, None])
        for both in (pair, pair >= plan.centres[..., None, None])
    )
    tile = first.view(*cells.shape[:2], 1, 1) + right + 2 * down
    x1, y1, x2, y2 = bounds[tile].unbind(-1)
    there = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    places = starts.view(-1)[tile] + (y * width + x)
    pixels = images.flatten(0, 2)[torch.where(there, places, 0)]
    return torch.where(there[..., None], pixels, GREY)


def _scale_hsv(image: Tensor, gains: Tensor) -> Tensor:
    """(B, H, W, 3) bytes as floats -> the same after `gains` (B, 3) of hue, saturation and value.

    There and back in OpenCV's arithmetic on bytes, whose hues count from 0 to 179.
    """
    red, green, blue = image.unbind(-1)
    value = image.amax(-1)
    spread = value - image.amin(-1)
    # in sixths of the circle, times the spread
    hue = torch.where(
        value == green, (blue - red).add(spread, alpha=2), (red - green).add(spread, alpha=4)
    )
    hue = torch.where(value == red, green - blue, hue)
    hue = (hue * (PER_HUE / spread.clamp(min=1)).round() / SHIFT + 0.5).floor() % HUES
    saturation = spread * (PER_SATURATION / value.clamp(min=1)).round() / SHIFT + 0.5
    by_hue, *others = gains[:, None, None].unbind(-1)
    hue = (hue * by_hue + ROUND_DOWN).round() / 30
    saturation, value = (
        (plane * gain + ROUND_DOWN).round().clamp(0, 255)[..., None] / 255
        for plane, gain in zip((saturation.floor(), value), others, strict=True)
    )
    # how far each colour is from full, in sixths: red's circle begins with 5, green's 3, blue's 1
    turn = (hue[..., None] + torch.arange(5, 0, -2, device=image.device)) % 6
    away = torch.minimum(turn, 4 - turn).clamp(0, 1)
    return (value * (1 - saturation * away) * 255).floor()

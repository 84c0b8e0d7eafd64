"""Paint for the embedded data set: a canvas that knows whose each pixel is, textures, clutter."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.shapes.outlines import Mask, rasterize

NOBODY = 0  # owner of pixels that belong to no object
CONTRAST = 80.0  # smallest RGB distance between a colour and what it is painted on
MUTED = 0.6  # how far grounds are drawn towards grey
NOISE = 10  # sensor noise, grey levels either way
CLUTTER = (3, 10)  # marks under the objects, at least and at most


@dataclass(frozen=True)
class Canvas:
    """A picture in the making; `paint` changes it in place."""

    image: np.ndarray  # (H, W, 3) float64 RGB, 0..255
    owner: np.ndarray  # (H, W) int64: the number of the object that is seen there, or NOBODY

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.owner.shape[0], self.owner.shape[1]

    def paint(self, mask: Mask, colour: np.ndarray, *, owner: int, opacity: float = 1.0) -> None:
        """Lay `colour` (3,) or (h, w, 3) of the mask's size over what is there."""
        target, source = overlap(self.size, mask)
        alpha = mask.alpha[source]
        tint = colour[source] if colour.ndim == 3 else colour
        view = self.image[target]
        view += (alpha * opacity)[..., None] * (tint - view)
        self.owner[target][alpha >= 0.5] = owner

    def finish(self, rng: np.random.Generator) -> np.ndarray:
        """(H, W, 3) uint8 RGB: uneven light and sensor noise added."""
        height, width = self.size
        light = 1.0 + 0.3 * (value_noise(rng, (height, width), period=max(height, width)) - 0.5)
        grain = rng.integers(-NOISE, NOISE + 1, (height, width, 3), dtype=np.int8)
        return np.clip(np.rint(self.image * light[..., None] + grain), 0, 255).astype(np.uint8)


def overlap(size: tuple[int, int], mask: Mask) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The rows and columns of a picture of `size` under the mask, and those of the mask itself."""
    target, source = [], []
    for start, extent, limit in zip((mask.top, mask.left), mask.alpha.shape, size, strict=True):
        low = min(max(start, 0), limit)
        high = max(min(start + extent, limit), low)
        target.append(slice(low, high))
        source.append(slice(low - start, high - start))
    return (target[0], target[1]), (source[0], source[1])


def random_colour(rng: np.random.Generator, hue: float | None = None) -> np.ndarray:
    """(3,) RGB, 0..255: clearly of this hue in [0, 1), or of any and then also pale or dark."""
    if hue is None:
        hue, saturation, value = rng.random(), rng.uniform(0.25, 1.0), rng.uniform(0.3, 1.0)
    else:
        saturation, value = rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0)
    return 255.0 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def contrasting_colour(
    rng: np.random.Generator, ground: np.ndarray, hue: float | None = None
) -> np.ndarray:
    """A random colour, of this hue or of any, that stands out from the colour `ground` (3,)."""
    while True:
        colour = random_colour(rng, hue)
        if float(np.sqrt(((colour - ground) ** 2).sum())) >= CONTRAST:
            return colour


def value_noise(rng: np.random.Generator, size: tuple[int, int], *, period: float) -> np.ndarray:
    """(h, w) in [0, 1]: random values on a grid `period` pixels wide, bilinear between."""
    y, x = (np.arange(extent) / period for extent in size)
    top, left = y.astype(np.int64), x.astype(np.int64)
    down, right = (y - top)[:, None], x - left
    grid = rng.random((int(top[-1]) + 2, int(left[-1]) + 2))
    rows = grid[top] + down * (grid[top + 1] - grid[top])
    first = rows[:, left]
    return first + right * (rows[:, left + 1] - first)


def _along(size: tuple[int, int], angle: float) -> np.ndarray:
    y, x = np.ogrid[: size[0], : size[1]]
    return x * np.cos(angle) + y * np.sin(angle)


def _gradient(rng: np.random.Generator, size: tuple[int, int], period: float) -> np.ndarray:
    ramp = _along(size, rng.uniform(0, 2 * np.pi))
    return (ramp - ramp.min()) / max(float(np.ptp(ramp)), 1.0)


def _stripes(rng: np.random.Generator, size: tuple[int, int], period: float) -> np.ndarray:
    wave = np.sin(_along(size, rng.uniform(0, np.pi)) * (2 * np.pi / period))
    return np.clip(0.5 + 1.5 * wave, 0, 1)


def _checks(rng: np.random.Generator, size: tuple[int, int], period: float) -> np.ndarray:
    angle = rng.uniform(0, np.pi / 2)
    first = np.sin(_along(size, angle) * (2 * np.pi / period))
    second = np.sin(_along(size, angle + np.pi / 2) * (2 * np.pi / period))
    return np.clip(0.5 + 3.0 * first * second, 0, 1)


def _dots(rng: np.random.Generator, size: tuple[int, int], period: float) -> np.ndarray:
    angle = rng.uniform(0, np.pi / 2)
    first = np.cos(_along(size, angle) * (2 * np.pi / period))
    second = np.cos(_along(size, angle + np.pi / 2) * (2 * np.pi / period))
    return np.clip(2.0 * (first + second - 0.6), 0, 1)


def _clouds(rng: np.random.Generator, size: tuple[int, int], period: float) -> np.ndarray:
    return 0.65 * value_noise(rng, size, period=period) + 0.35 * value_noise(
        rng, size, period=period / 3
    )


def _flat(rng: np.random.Generator, size: tuple[int, int], period: float) -> np.ndarray:
    return np.full(size, rng.random())


_TEXTURES: tuple[Callable[[np.random.Generator, tuple[int, int], float], np.ndarray], ...] = (
    _gradient,
    _stripes,
    _checks,
    _dots,
    _clouds,
    _flat,
)


def texture(
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    first: np.ndarray,
    second: np.ndarray,
    period: float,
) -> np.ndarray:
    """(h, w, 3): a random pattern between two colours; `period` in pixels."""
    mix = _TEXTURES[rng.integers(len(_TEXTURES))](rng, size, max(period, 2.0))[..., None]
    return first + mix * (second - first)


def background(rng: np.random.Generator, size: tuple[int, int]) -> Canvas:
    """A textured ground with clutter: patches, ribbons and blots in the objects' colours."""
    height, width = size
    first = random_colour(rng)
    second = first + 0.6 * (random_colour(rng) - first)
    first, second = (colour + MUTED * (colour.mean() - colour) for colour in (first, second))
    period = float(rng.uniform(8, 90))
    image = texture(rng, size, first=first, second=second, period=period)
    clouds = value_noise(rng, size, period=float(rng.uniform(12, 60)))
    image = image + 60.0 * (clouds[..., None] - 0.5)
    canvas = Canvas(image, np.full((height, width), NOBODY, np.int64))
    for _ in range(int(rng.integers(CLUTTER[0], CLUTTER[1] + 1))):
        scribble(rng, canvas)
    return canvas


def scribble(rng: np.random.Generator, canvas: Canvas, *, widest: float = 9.0) -> None:
    """One mark that is of no class: a winding ribbon, or a blot with a ragged rim."""
    height, width = canvas.size
    centre = rng.uniform((0, 0), (width, height))
    if rng.random() < 0.65:
        mask = rasterize((_ribbon(rng, centre, reach=0.35 * min(height, width), widest=widest),))
    else:
        mask = rasterize((_blot(rng, centre, radius=float(rng.uniform(3, 30))),))
    canvas.paint(mask, random_colour(rng), owner=NOBODY, opacity=float(rng.uniform(0.5, 1.0)))


def _ribbon(
    rng: np.random.Generator, centre: np.ndarray, *, reach: float, widest: float
) -> np.ndarray:
    steps = rng.normal(0.0, 1.0, (12, 2)).cumsum(0)
    heading = rng.normal(0.0, 1.0, 2)
    path = steps + np.arange(12)[:, None] * heading
    fine = np.linspace(0, 11, 40)
    path = np.stack([np.interp(fine, np.arange(12), path[:, axis]) for axis in (0, 1)], 1)
    path = (path - path.mean(0)) * (rng.uniform(0.15, 1.0) * reach / np.abs(path).max()) + centre
    along = np.gradient(path, axis=0)
    along /= np.maximum(np.sqrt((along**2).sum(1, keepdims=True)), 1e-9)
    side = np.stack((-along[:, 1], along[:, 0]), 1) * (rng.uniform(1.0, widest) / 2)
    return np.concatenate((path + side, (path - side)[::-1]))


def _blot(rng: np.random.Generator, centre: np.ndarray, *, radius: float) -> np.ndarray:
    angle = np.arange(40) * (2 * np.pi / 40)
    length = np.ones(40)
    for wave in (2, 3, 4, 5):
        length += rng.uniform(0.1, 0.3) * np.sin(wave * angle + rng.uniform(0, 2 * np.pi))
    length = radius * np.maximum(length, 0.15)
    return centre + length[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)

"""Boxes with readable labels on RGB images; grids of such images; the palette; image files."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from utils.errors import UserError
from utils.files import writing

Color = tuple[int, int, int]
Pixels = tuple[int, int, int, int]  # left, top, right, bottom

# Twenty colours that are easy to tell apart, strong on photographs; class 0 first.
PALETTE: tuple[Color, ...] = (
    *((230, 25, 75), (60, 180, 75), (67, 99, 216), (245, 130, 49), (145, 30, 180)),
    *((66, 212, 244), (240, 50, 230), (191, 239, 69), (250, 190, 212), (70, 153, 144)),
    *((220, 190, 255), (154, 99, 36), (255, 225, 25), (178, 34, 34), (170, 255, 195)),
    *((128, 128, 0), (255, 216, 177), (40, 40, 170), (169, 169, 169), (255, 250, 200)),
)
COLORS = 256  # different ones; further classes begin again
DARKEST = 250  # sum of the channels; darker lines vanish in shadows

PIXELS_PER_LINE = 240  # geometric mean side per pixel of line thickness
PIXELS_PER_LETTER = 40  # ... and per pixel of font size
SMALLEST_FONT = 10
TINIEST_FONT = 7  # only where a label would not fit into the image otherwise
GAP = 4  # white pixels between the tiles of a grid
LONGEST_GRID = 1920  # pixels of its longer side; larger tiles are shrunk
SMALLEST_TILE = 400  # pixels of its longer side; smaller tiles are enlarged, or labels hide them
TITLE_FONT = 13
LONGEST_NAME = 28  # letters of a class name in a plot
COVERED = 0.85  # of a box's area: too little of it is left to be seen
LETTERS_ABREAST = 40  # under a plot of four inches
WHITE = (255, 255, 255)

# Fonts with the scripts that DejaVu lacks; Pillow looks for them in the system's folders.
WIDE_FONTS = (
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("msyh.ttc", "msgothic.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
    *("Arial Unicode.ttf", "DroidSansFallbackFull.ttf"),
)


def color(label: int) -> Color:
    """The (red, green, blue) of a class, always the same; classes 0-255 all differ."""
    return _colors()[label % COLORS]


@lru_cache(maxsize=1)
def _colors() -> list[Color]:
    """The palette, then each time the colour that is farthest from all before it."""
    levels = np.linspace(0, 255, 8).round()
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    cube = cube[cube.sum(1) > DARKEST]
    chosen = list(PALETTE)
    nearest = np.min([((cube - row) ** 2).sum(1) for row in chosen], axis=0)
    while len(chosen) < COLORS:
        red, green, blue = cube[nearest.argmax()].astype(int).tolist()
        chosen.append((red, green, blue))
        nearest = np.minimum(nearest, ((cube - chosen[-1]) ** 2).sum(1))
    return chosen


def plot_color(label: int) -> tuple[float, float, float]:
    """The `color` of a class as matplotlib takes it, shares of 1."""
    red, green, blue = color(label)
    return red / 255, green / 255, blue / 255


def plot_name(name: str) -> str:
    """A name that fits next to a plot and that matplotlib does not read as a formula or hides."""
    text = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def tick_rotation(names: Sequence[str]) -> int:
    """Degrees by which names under a plot must be turned so as not to overlap."""
    return 90 if len(names) * max(map(len, names), default=0) > LETTERS_ABREAST else 0


def text_color(background: Color) -> Color:
    """Black or white, whichever contrasts more (relative luminance as in WCAG 2, section 1.4.3)."""
    shares = np.array(background) / 255
    linear = np.where(shares <= 0.03928, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    # contrast with white (1.05 / (L + 0.05)) equals contrast with black ((L + 0.05) / 0.05) here
    return (0, 0, 0) if luminance > math.sqrt(1.05 * 0.05) - 0.05 else (255, 255, 255)


def draw_boxes(
    image: np.ndarray,
    boxes: ArrayLike,
    labels: ArrayLike,
    *,
    names: Sequence[str],
    scores: ArrayLike | None = None,
    thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> np.ndarray:
    """(H, W, 3) uint8 RGB with (N, 4) xyxy pixel boxes and (N,) class indices -> a new such image.

    `scores` (N,) are printed behind the names; the best boxes come on top.  Line and font follow
    the image's size unless `thickness` (pixels) is given for the line.
    """
    classes = [int(value) for value in np.asarray(labels).reshape(-1)]
    values = None if scores is None else np.asarray(scores, dtype=np.float64).reshape(-1)
    canvas = np.ascontiguousarray(image).copy()
    height, width = image.shape[:2]
    side = math.sqrt(height * width)
    line = thickness or max(round(side / PIXELS_PER_LINE), 1)
    font_size = max(round(side / PIXELS_PER_LETTER), SMALLEST_FONT)
    best = range(len(classes)) if values is None else np.argsort(values, kind="stable")[::-1]
    corners = np.nan_to_num(np.asarray(boxes, dtype=np.float64), nan=0, posinf=1e9, neginf=0)
    limits = np.array([width - 1, height - 1] * 2)
    pixels = np.clip(corners.reshape(-1, 4).round(), 0, limits).astype(int).tolist()
    for row in reversed(best):
        left, top, right, bottom = pixels[row]
        shade = color(classes[row])
        # level lines on whole pixels: LINE_AA would only blur them (the letters are anti-aliased)
        cv2.rectangle(canvas, (left, top), (right, bottom), shade, line, cv2.LINE_8)
    taken, areas = np.zeros((0, 4)), np.array(pixels).reshape(-1, 4)
    for row in [] if hide_labels else best:  # the best ones have the first choice
        text = _text(classes[row], names, None if values is None or hide_conf else values[row])
        size, shade = font_size, color(classes[row])
        while (patch := _label(text, size, shade)).shape[1] > width and size > TINIEST_FONT:
            size -= 1  # until it fits into the image
        place = _position(
            patch, pixels[row], line // 2, taken=taken, boxes=areas, shape=(height, width)
        )
        if place is None:
            continue
        left, top, right, bottom = place
        taken = np.vstack((taken, (left, top, right, bottom)))
        canvas[top:bottom, left:right] = patch[: bottom - top, : right - left]
    return canvas


def _text(label: int, names: Sequence[str], score: float | None) -> str:
    name = names[label] if 0 <= label < len(names) else f"class {label}"
    name = " ".join(str(name).split())
    if any(char.isprintable() and _font_for(char) is None for char in name):
        name = f"class {label}"  # better than a row of empty squares
    return name if score is None else f"{name} {score:.2f}"


def _position(
    patch: np.ndarray,
    box: Pixels,
    outer: int,
    *,
    taken: np.ndarray,
    boxes: np.ndarray,
    shape: tuple[int, int],
) -> Pixels | None:
    """Where a label goes: above the box if that is inside the image and hides nothing.

    Else inside its top, below it, at its right end or beside it: the position that hides least of
    the labels in `taken` and of those `boxes` more than half of which it would cover.  None where
    even that covers a whole box: its colour tells the class, and a hidden object tells nothing.
    """
    height, width = shape
    rows, columns = min(patch.shape[0], height), min(patch.shape[1], width)
    above, inside, below = box[1] - outer - rows, box[1], box[3] + outer + 1
    left, right = box[0] - outer, box[2] + outer + 1 - columns
    after, before = box[2] + outer + 1, box[0] - outer - columns
    known = np.vstack((taken, boxes))
    sizes = (known[:, 2:] - known[:, :2]).clip(min=1).prod(1)
    sizes[: len(taken)] = 0  # of a label, any part counts
    best, min_hidden = None, math.inf
    for x, y in (
        *((left, above), (left, inside), (left, below), (right, above), (right, inside)),
        *((after, inside), (before, inside), (right, below)),
    ):
        if not (0 <= y <= height - rows) and y != inside:
            continue
        x, y = min(max(x, 0), width - columns), min(max(y, 0), height - rows)
        area = (x, y, x + columns, y + rows)
        low, high = np.maximum(known[:, :2], area[:2]), np.minimum(known[:, 2:], area[2:])
        overlap = (high - low).clip(min=0).prod(1)
        hidden = float(overlap[overlap > sizes / 2].sum())
        if hidden < min_hidden:
            whole = (overlap >= COVERED * sizes)[len(taken) :].any()
            best, min_hidden = None if whole else area, hidden
    return best


@lru_cache(maxsize=512)
def _label(text: str, font_size: int, shade: Color) -> np.ndarray:
    """The filled label box with its text: (h, w, 3) uint8, never to be written to."""
    fonts = [font for font in map(_font_for, text) if font not in {None, _latin()}]
    font = _font((fonts[0] if fonts else None) or _latin(), font_size)
    ascent, descent = font.getmetrics()
    margin = max(font_size // 5, 2)
    size = (math.ceil(font.getlength(text)) + 2 * margin, ascent + descent + margin // 2)
    patch = Image.new("RGB", size, shade)
    ImageDraw.Draw(patch).text((margin, margin // 4), text, fill=text_color(shade), font=font)
    return np.asarray(patch)


@lru_cache(maxsize=1)
def _latin() -> str:
    """DejaVu Sans (Latin, Cyrillic, Greek and more) of matplotlib, which is not imported."""
    package = importlib.util.find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    return str(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(name, size)


@lru_cache(maxsize=4096)
def _font_for(char: str) -> str | None:
    """The first font that has a glyph for `char`."""
    if ord(char) < 128:
        return _latin()
    for name in (_latin(), *WIDE_FONTS):
        try:
            font = _font(name, 16)
        except OSError:  # not installed
            continue
        missing, glyph = font.getmask("\U0010ffff"), font.getmask(char)
        if glyph.size != missing.size or bytes(glyph) != bytes(missing):
            return name
    return None


@dataclass(frozen=True)
class Tile:
    """One image of a grid; boxes in its pixels."""

    image: np.ndarray  # (H, W, 3) uint8 RGB
    boxes: np.ndarray  # (N, 4) xyxy
    labels: np.ndarray  # (N,)
    title: str  # the name of its file
    scores: np.ndarray | None = None  # (N,) of detections


def draw_tiles(tiles: Sequence[Tile], names: Sequence[str]) -> np.ndarray:
    """Tiles of one image size, row by row in a square -> one RGB image, titles above the images.

    Before anything is drawn, images are enlarged to SMALLEST_TILE, or shrunk so that the square's
    longer side is LONGEST_GRID.
    """
    columns = math.ceil(math.sqrt(len(tiles)))
    height, width = tiles[0].image.shape[:2]
    side = max(height, width)
    scale = min(max(side, SMALLEST_TILE), max(LONGEST_GRID // columns, 1)) / side
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    kind = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    cells = []
    for tile in tiles:
        image = tile.image if scale == 1 else cv2.resize(tile.image, size, interpolation=kind)
        drawn = draw_boxes(image, tile.boxes * scale, tile.labels, names=names, scores=tile.scores)
        cells.append(np.vstack((_title(tile.title, size[0]), drawn)))
    rows, (height, width) = math.ceil(len(cells) / columns), cells[0].shape[:2]
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for index, cell in enumerate(cells):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = cell
    return canvas


def _title(text: str, width: int) -> np.ndarray:
    """A white strip with the text; of a long one the middle is left out, since ends differ."""
    text = "".join(char if char.isprintable() and _font_for(char) else "?" for char in text)
    patch, kept = _label(text, TITLE_FONT, WHITE), len(text)
    while patch.shape[1] > width and kept > 2:
        kept -= 1
        short = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
        patch = _label(short, TITLE_FONT, WHITE)
    strip = np.full((patch.shape[0], width, 3), 255, np.uint8)
    strip[:, : patch.shape[1]] = patch[:, :width]
    return strip


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (H, W, 3) uint8 RGB in the format of the suffix, into an existing folder.

    Raises UserError when the suffix is no image format or the file cannot be written.
    """
    try:
        done, data = cv2.imencode(path.suffix, np.ascontiguousarray(image[..., ::-1]))
    except cv2.error:
        done = False
    if not done:
        raise UserError(f"{path}: cannot encode an image as {path.suffix!r}; use .jpg or .png")
    with writing(path):
        path.write_bytes(data.tobytes())

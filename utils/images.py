"""Images from files: right colours, right way up, whole, and never larger than the cap."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

MAX_PIXELS = 100_000_000  # refused from the header alone; far above any camera's frame
MAX_BYTES = 1 << 30
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MACOS = "._"  # macOS keeps attributes of a.jpg in ._a.jpg on foreign disks: no image

# By format: the first bytes, and Pillow's class (`Image.open` would warn on a limit below ours).
_FORMATS: dict[str, tuple[bytes, Callable[[io.BytesIO], ImageFile]]] = {
    "BMP": (rb"BM", BmpImagePlugin.BmpImageFile),
    "GIF": (rb"GIF8", GifImagePlugin.GifImageFile),
    "JPEG": (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    "PNG": (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    "TIFF": (rb"II\*\0|MM\0\*", TiffImagePlugin.TiffImageFile),
    "WEBP": (rb"(?s)RIFF....WEBP", WebPImagePlugin.WebPImageFile),
}
_PLAIN = {"JPEG": {"L", "RGB"}, "PNG": {"L", "RGB", "RGBA"}}  # modes cv2 reads as Pillow does
EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
_ORIENTATION = 0x0112
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # for cv2, by orientation; 5 to 8 after transposing
TRANSPOSED = {5, 6, 7, 8}
_BITS_PER_SAMPLE = 258
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_REDUCED = {size: getattr(cv2, f"IMREAD_REDUCED_COLOR_{size}") for size in (2, 4, 8)}


class ImageError(Exception):
    """A file that is not a whole, readable image: the cause, without the path."""


def read_image(path: Path, *, reduce: int = 1) -> np.ndarray:
    """`decode_image` of a file. Raises ImageError."""
    return decode_image(read_bytes(path), reduce=reduce)


def read_bytes(path: Path | str, *, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises ImageError."""
    try:
        status = os.stat(path)  # noqa: PTH116  a Path for each image costs time and memory
        regular = stat.S_ISREG(status.st_mode)
        data = b""
        if regular and status.st_size <= limit:
            with open(path, "rb") as file:  # noqa: PTH123
                data = file.read()
    except Exception as error:
        raise ImageError(cause_of(path, error)) from error
    if not regular:
        raise ImageError("not a regular file")
    if status.st_size > limit:
        raise ImageError(f"{status.st_size} bytes; more than {limit} are not read")
    return data


def cause_of(path: Path | str, error: Exception) -> str:
    """Why `path` could not be read, in a few words."""
    if getattr(error, "errno", None) in {errno.ENOENT, errno.ELOOP} and Path(path).is_symlink():
        return "dangling or looping symbolic link"
    return getattr(error, "strerror", None) or str(error)


def image_format(data: bytes) -> str | None:
    """'JPEG', 'PNG', 'GIF', 'BMP', 'TIFF' or 'WEBP' by the first bytes, not by the name."""
    return next((name for name, (first, _) in _FORMATS.items() if re.match(first, data)), None)


def decode_image(data: bytes, *, reduce: int = 1) -> np.ndarray:
    """Bytes of an image file -> (H, W, 3) uint8 RGB, EXIF orientation applied.

    Grey is repeated, CMYK and palettes become RGB as Pillow converts them, an alpha channel is
    dropped, 16-bit samples become round(v / 257); of a GIF or TIFF the first image is taken.
    With `reduce` 2, 4 or 8 a grey or RGB JPEG comes at that fraction of its size (sides rounded
    up), from fewer cosine coefficients and so much faster; every other image comes whole.
    Raises ImageError when the size in the header exceeds MAX_PIXELS (nothing is decoded then),
    when the data is truncated or corrupt, and for 32-bit samples (they have no range).
    """
    kind = image_format(data)
    if kind is None:
        raise ImageError(_not_an_image(data))
    try:
        header = _FORMATS[kind][1](io.BytesIO(data))
    except Exception as error:  # Pillow's parsers raise all kinds on hostile bytes
        raise ImageError(f"broken {kind} header: {error}") from error
    width, height = header.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels; more than {MAX_PIXELS} are not decoded")
    try:
        if _has_16_bits(data, kind, header):
            return _upright(_read_16_bits(data), data, kind, header)
        if header.mode in _PLAIN.get(kind, ()) and "transparency" not in header.info:
            reduced = kind == "JPEG" and reduce > 1
            flags = _REDUCED[reduce] if reduced else cv2.IMREAD_COLOR_RGB
            image = _read_plain(data, kind, header, flags)
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if reduced else image
            return _upright(image, data, kind, header)
        return _read_by_pillow(header)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"corrupt {kind} data: {getattr(error, 'err', error)}") from error


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of `decode_image(data)`, with its errors.

    Of a plain JPEG all bits are read, since only they tell whether it is whole, but few pixels are
    computed.
    """
    with contextlib.suppress(Exception):  # decode_image names the cause
        header = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        width, height = header.size
        if width * height <= MAX_PIXELS and header.mode in _PLAIN["JPEG"]:
            small = _read_plain(data, "JPEG", header, cv2.IMREAD_REDUCED_GRAYSCALE_8)
            if small.shape == (-(-height // 8), -(-width // 8)):
                turned = orientation(data, "JPEG", header) in TRANSPOSED
                return (width, height) if turned else (height, width)
    height, width = decode_image(data).shape[:2]
    return height, width


def as_rgb(image: Any, *, bgr: bool = False) -> np.ndarray:
    """What a program holds as an image -> (H, W, 3) uint8 RGB.

    A path, the bytes of an image file, a PIL image (its EXIF orientation applied), or a uint8 array
    of (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA; with `bgr` arrays are BGR or BGRA, as
    OpenCV's are.  Alpha is dropped.
    Raises ImageError for a file's content, ValueError for anything else that is not an image.
    """
    if isinstance(image, str | Path):
        if not str(image):
            raise ValueError("the file name is empty")
        if "://" in str(image):
            raise ValueError("a URL goes to stream()")
        return read_image(Path(image))
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise ValueError("there are no bytes")
        return decode_image(bytes(image))
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"a PIL image of mode {image.mode} has no defined range; use RGB or L")
        return _array_rgb(np.array(ImageOps.exif_transpose(image).convert("RGB")), bgr=False)
    if isinstance(image, np.ndarray):
        return _array_rgb(image, bgr=bgr)
    raise ValueError(
        "an image is a path, an array, a PIL image or the bytes of a file, not"
        f" {type(image).__name__}; several of them go to batch()"
    )


def _array_rgb(image: np.ndarray, *, bgr: bool) -> np.ndarray:
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in {2, 3} or channels not in {1, 3, 4}:
        raise ValueError(
            "an image is uint8 of (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), not"
            f" {image.dtype} {image.shape}"
        )
    if not image.size:
        raise ValueError(f"an image of shape {image.shape} has no pixels")
    if channels == 1:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_GRAY2RGB)
    if channels == 4:
        image = image[..., :3]
    return np.ascontiguousarray(image[..., ::-1]) if bgr else image


def _not_an_image(data: bytes) -> str:
    if not data:
        return "empty file"
    if data[4:8] == b"ftyp":
        return "HEIF, AVIF or video; not a supported image format"
    if not data[:512].strip(b"\0"):
        return "starts with zero bytes; not an image"
    return "not an image (no known signature)"


def _has_16_bits(data: bytes, kind: str, header: ImageFile) -> bool:
    if kind == "PNG":
        return data[24] == 16  # the bit depth in IHDR, which is always the first chunk
    if kind == "TIFF":
        bits: Any = getattr(header, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
        return 16 in bits
    return False


def _read_16_bits(data: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16:
        raise ImageError("corrupt or truncated 16-bit data")
    image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(image[..., 2::-1])


def _read_plain(data: bytes, kind: str, header: ImageFile, flags: int) -> np.ndarray:
    # Older OpenCV fills what is missing with grey. Pillow's parser has stopped at the first pixels,
    # so that a thumbnail's end in the header does not count.
    start = header.fp.tell() if header.fp else 0
    if data.rfind(_END_MARKERS[kind], start) < 0:
        raise ImageError(f"{kind} data is truncated (no end marker)")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ImageError(f"corrupt {kind} data")
    return image


def _read_by_pillow(header: ImageFile) -> np.ndarray:
    if header.mode in {"I", "F"}:
        raise ImageError("32-bit samples have no defined range; store 8 or 16 bits")
    header.load()
    # no transparency: Pillow would warn, and the alpha is dropped anyway
    header.info.pop("transparency", None)
    return np.array(ImageOps.exif_transpose(header).convert("RGB"))


def _upright(image: np.ndarray, data: bytes, kind: str, header: ImageFile) -> np.ndarray:
    turn = orientation(data, kind, header)
    if turn in TRANSPOSED:
        image = cv2.transpose(image)
    return cv2.flip(image, _FLIPS[turn]) if turn in _FLIPS else image


def orientation(data: bytes, kind: str, header: ImageFile) -> Any:
    """The camera's (Exif 2.3, tag 0x0112) that is yet to be undone; 1 where it cannot be read."""
    late = kind == "PNG" and b"eXIf" in data  # this chunk may follow the pixels
    if kind == "TIFF" or not (late or EXIF_KEYS & header.info.keys()):
        return 1  # OpenCV has applied the tag of a TIFF itself
    try:
        return header.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1

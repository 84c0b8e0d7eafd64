"""The size of an image whose file is whole by its structure, without decoding it."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable
from typing import BinaryIO

from PIL import JpegImagePlugin

from utils.images import EXIF_KEYS, MAX_PIXELS, TRANSPOSED, image_format, orientation

_HEAD = 64  # bytes
_MAX_CHUNKS = 100_000
_IEND_SUM = b"\xaeB`\x82"  # the last bytes of every PNG
_EXIF_TEXTS = tuple(key.encode() for key in EXIF_KEYS)
_BMP_BITS = (1, 4, 8, 16, 24, 32)
_UNCOMPRESSED = (0, 3)  # of BMP: BI_RGB, BI_BITFIELDS
_HAS_EXIF = 0b1100  # flags of a WebP: EXIF, XMP


def size_by_header(file: BinaryIO, tail: bytes) -> tuple[int, int] | None:
    """Height and width of `decode_image`, if the header states them and nothing is cut off.

    That is an end marker in the `tail` of a JPEG, the chunks of a PNG up to IEND, and as many bytes
    as the header of a WebP or BMP promises.  None for any other file: only decoding tells its size,
    or its fault.  Damage between the ends is not seen.
    """
    with contextlib.suppress(Exception):  # decoding names the cause
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_HEAD)
        found = _READERS[image_format(head) or ""](file, head, tail, size)
        if found is not None and min(found) > 0 and found[0] * found[1] <= MAX_PIXELS:
            return found
    return None


def _jpeg(file: BinaryIO, head: bytes, tail: bytes, size: int) -> tuple[int, int] | None:
    file.seek(0)
    header = JpegImagePlugin.JpegImageFile(file)
    width, height = header.size
    turned = orientation(head, "JPEG", header) in TRANSPOSED
    # Pillow's parser has stopped at the first pixels: a thumbnail's end in the header is before
    if tail.rfind(b"\xff\xd9", max(0, file.tell() - (size - len(tail)))) < 0:
        return None
    return (width, height) if turned else (height, width)


def _png(file: BinaryIO, head: bytes, tail: bytes, size: int) -> tuple[int, int] | None:
    width, height = struct.unpack(">II", head[16:24])
    at = 8
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        length, kind, content = struct.unpack(">I4s22s", file.read(30).ljust(30))
        at += 12 + length
        if kind == b"eXIf" or content.startswith(_EXIF_TEXTS) or at > size:
            return None
        if kind == b"IEND":
            return (height, width) if content.startswith(_IEND_SUM) else None
    return None


def _webp(file: BinaryIO, head: bytes, tail: bytes, size: int) -> tuple[int, int] | None:
    if 8 + int.from_bytes(head[4:8], "little") > size:
        return None
    kind, content = head[12:16], head[20:]
    if kind == b"VP8X" and not content[0] & _HAS_EXIF:  # 24 bits each, less one
        width, height = (1 + int.from_bytes(content[i : i + 3], "little") for i in (4, 7))
    elif kind == b"VP8L" and content[0] == 0x2F:  # 14 bits each, less one
        bits = int.from_bytes(content[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":  # 14 bits each, two of scaling
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", content[6:10]))
    else:
        return None
    return height, width


def _bmp(file: BinaryIO, head: bytes, tail: bytes, size: int) -> tuple[int, int] | None:
    start, header, width, height, _, bits, compression = struct.unpack("<10xIIiiHHI", head[:34])
    row = (width * bits + 31) // 32 * 4
    known = header >= 40 and compression in _UNCOMPRESSED and bits in _BMP_BITS
    return (abs(height), width) if known and start + row * abs(height) <= size else None


_READERS: dict[str, Callable[[BinaryIO, bytes, bytes, int], tuple[int, int] | None]] = {
    "BMP": _bmp,
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
}

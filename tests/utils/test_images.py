from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from utils.headers import size_by_header
from utils.images import ImageError, decode_image, image_format, image_size, read_image

GENERATOR = np.random.default_rng(0)
PIXELS = cv2.resize(GENERATOR.integers(0, 255, (6, 8, 3), np.uint8), (80, 60))
RGB = Image.fromarray(PIXELS)
SIXTEEN = np.int64(PIXELS) * 257 + GENERATOR.integers(-300, 300, PIXELS.shape)
SIXTEEN = SIXTEEN.clip(0, 65535).astype(np.uint16)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, body: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def files() -> dict[str, bytes]:
    palette = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
    alpha = RGB.convert("RGBA")
    alpha.putalpha(Image.fromarray(PIXELS[..., 0]))
    png, late = encode(RGB, "PNG"), chunk(b"eXIf", turned(6).tobytes()[6:])
    return {
        "jpeg": encode(RGB, "JPEG"),
        "progressive": encode(RGB, "JPEG", progressive=True),
        "grey jpeg": encode(RGB.convert("L"), "JPEG"),
        "cmyk jpeg": encode(RGB.convert("CMYK"), "JPEG"),
        "png": png,
        "png with exif after its pixels": png[:-12] + late + png[-12:],
        "grey png": encode(RGB.convert("L"), "PNG"),
        "1-bit png": encode(RGB.convert("1"), "PNG"),
        "palette": encode(palette, "PNG"),
        "palette, one clear colour": encode(palette, "PNG", transparency=3),
        "palette with alpha": encode(palette, "PNG", transparency=bytes(range(256))),
        "rgba": encode(alpha, "PNG"),
        "grey with alpha": encode(alpha.convert("LA"), "PNG"),
        "rgb, one clear colour": encode(RGB, "PNG", transparency=(1, 2, 3)),
        "bmp": encode(RGB, "BMP"),
        "gif": encode(palette, "GIF"),
        "two images in a gif": encode(palette, "GIF", save_all=True, append_images=[RGB.rotate(9)]),
        "webp": encode(RGB, "WEBP"),
        "webp with alpha": encode(alpha, "WEBP", lossless=True),
        "tiff": encode(RGB, "TIFF"),
        "cmyk tiff": encode(RGB.convert("CMYK"), "TIFF"),
        **{
            f"{kind}, orientation {number}": encode(RGB, kind, exif=turned(number))
            for kind in ("JPEG", "PNG", "TIFF", "WEBP")
            for number in range(1, 9)
        },
    }


FILES = files()


def reference(data: bytes) -> np.ndarray:
    """Pillow's own way from a file to RGB, the right way up, alpha dropped."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image.info.pop("transparency", None)
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.parametrize("name", FILES)
def test_every_mode_and_orientation_equals_pillow(name: str) -> None:
    image = decode_image(FILES[name])
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    sideways = name.endswith(("5", "6", "7", "8", "after its pixels"))
    assert image.shape == ((80, 60, 3) if sideways else (60, 80, 3))
    np.testing.assert_array_equal(image, reference(FILES[name]))


@pytest.mark.parametrize("name", FILES)
def test_the_size_without_the_pixels(name: str) -> None:
    assert image_size(FILES[name]) == decode_image(FILES[name]).shape[:2]


def by_header(data: bytes) -> tuple[int, int] | None:
    return size_by_header(io.BytesIO(data), data[-2000:])


@pytest.mark.parametrize("name", FILES)
def test_the_size_of_a_whole_file_is_in_its_header(name: str) -> None:
    """Not of formats that are left to the decoder, nor where metadata may turn the image."""
    data, left = FILES[name], ("gif", "tiff", "TIFF", "exif", "PNG, ", "WEBP, ")
    size = None if any(word in name for word in left) else decode_image(data).shape[:2]
    assert by_header(data) == size


@pytest.mark.parametrize("name", ["jpeg", "progressive", "cmyk jpeg", "png", "palette", "bmp"])
def test_a_file_that_ends_too_early_is_left_to_the_decoder(name: str) -> None:
    data = FILES[name]
    assert by_header(data) == by_header(data + bytes(30)) == (60, 80)
    for end in (*range(0, len(data) - 9, 7), len(data) - 1):
        assert by_header(data[:end]) is None, end
        if name != "bmp":  # to which zeros are pixels
            assert by_header(data[:end].ljust(len(data), b"\0")) is None, end


def test_a_webp_that_ends_too_early_is_left_to_the_decoder() -> None:
    for options in ({}, {"lossless": True}):
        data = encode(RGB, "WEBP", **options)
        assert by_header(data) == (60, 80)
        assert [by_header(data[:end]) for end in (10, 100, len(data) - 1)] == [None] * 3


@pytest.mark.parametrize("progressive", [False, True])
def test_damage_is_seen_without_the_pixels(
    progressive: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """What libjpeg prints, or the error, is that of the whole image."""
    whole = encode(RGB.resize((203, 157)), "JPEG", progressive=progressive)
    start = whole.index(b"\xff\xda") + 14
    complaints = set()

    def outcome(read: Callable[[bytes], Any], data: bytes) -> tuple[object, object]:
        try:
            found: object = np.shape(read(data))[:2] if read is decode_image else read(data)
        except ImageError as error:
            found = str(error)
        return found, sorted(set(capfd.readouterr().err.splitlines()))

    for i in range(80):
        at, length = GENERATOR.integers(start, len(whole) - 100), GENERATOR.integers(1, 90)
        middle = (b"", b"\0" * length, GENERATOR.bytes(length))[i % 3]
        data = whole[:at] + middle + whole[at + length if i % 2 else -2 :]
        expected = outcome(decode_image, data)
        assert outcome(image_size, data) == expected, i
        complaints.update(expected[1])
    assert any("Corrupt JPEG data" in line for line in complaints), complaints


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_become_rounded_8_bits(suffix: str, channels: int) -> None:
    full = np.dstack((SIXTEEN[..., ::-1], SIXTEEN[..., 0]))
    _, data = cv2.imencode(suffix, full[..., :channels])
    expected = np.rint(SIXTEEN / 257)
    if channels == 1:
        expected = np.repeat(expected[..., 2:], 3, axis=2)
    np.testing.assert_array_equal(decode_image(data.tobytes()), expected)


def test_16_bit_tiff_obeys_its_orientation() -> None:
    exif = turned(6)
    exif[700] = b"<xmp/>"  # whose key has Pillow look for an orientation again
    data = encode(Image.fromarray(SIXTEEN[..., 0]), "TIFF", exif=exif)
    expected = np.rot90(np.rint(SIXTEEN[..., 0] / 257), -1)
    np.testing.assert_array_equal(decode_image(data)[..., 1], expected)


@pytest.mark.parametrize(
    "name", ["jpeg", "cmyk jpeg", "png", "rgba", "palette", "tiff", "bmp", "webp", "gif"]
)
@pytest.mark.parametrize("part", [0.5, 0.02])
def test_cut_off_data_is_an_error(name: str, part: float) -> None:
    with pytest.raises(ImageError):
        decode_image(FILES[name][: int(len(FILES[name]) * part)])


def test_jpeg_without_its_end_marker_is_an_error_even_with_a_thumbnail() -> None:
    thumbnail = encode(Image.fromarray(PIXELS[:8, :8]), "JPEG")
    whole = encode(RGB, "JPEG", exif=b"Exif\0\0" + thumbnail)
    assert whole.count(b"\xff\xd9") == 2
    for data in (whole[:-2], whole[:-400], whole[:-400] + b"\0" * 400):
        with pytest.raises(ImageError, match="no end marker"):
            decode_image(data)
    np.testing.assert_array_equal(decode_image(whole + b"camera's notes"), decode_image(whole))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty file"),
        (b"hello, this is text", "no known signature"),
        (b"RIFF\0\0\0\0AVI LIST", "no known signature"),
        (b"\0" * 4096, "zero bytes"),
        (b"\0\0\0\x18ftypheic", "HEIF"),
        (b"\xff\xd8\xff" + b"x" * 50, "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (encode(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF"), "32-bit"),
    ],
)
def test_the_cause_is_said(data: bytes, cause: str) -> None:
    with pytest.raises(ImageError, match=cause):
        decode_image(data)


def bomb(side: int) -> bytes:
    """A 1-bit PNG of side x side zeros: huge when decoded, small as a file."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(((side + 7) // 8 + 1) * side), 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_too_many_pixels_are_refused_from_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    header = bytearray(bomb(16))
    header[16:24] = struct.pack(">II", 34_000, 34_000)  # over a thousand million
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
    start = time.process_time()
    for data, side in ((bomb(14_000), 14_000), (bytes(header), 34_000)):
        with pytest.raises(ImageError, match=f"{side}x{side} pixels; more than 100000000"):
            decode_image(data)
    assert time.process_time() - start < 0.5
    monkeypatch.setattr("utils.images.MAX_PIXELS", 400)
    assert decode_image(bomb(20)).shape == (20, 20, 3)
    with pytest.raises(ImageError, match="more than 400"):
        decode_image(bomb(21))


def test_format_is_by_content() -> None:
    assert [image_format(FILES[name]) for name in ("gif", "webp")] == ["GIF", "WEBP"]
    assert image_format(b"text") is None


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, cause in {
        "loop.jpg": "dangling or looping",
        "gone.jpg": "dangling or looping",
        "pipe.jpg": "not a regular file",
        "missing.jpg": "No such file",
        ".": "not a regular file",
    }.items():
        with pytest.raises(ImageError, match=cause):
            read_image(tmp_path / name)
    path = tmp_path / "a b #1 ä 图.jpg"
    path.write_bytes(FILES["jpeg"])
    np.testing.assert_array_equal(read_image(path), reference(FILES["jpeg"]))


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_a_reduced_jpeg_shows_the_same(reduce: int) -> None:
    smooth = cv2.resize(PIXELS[:2, :2], (81, 61), interpolation=cv2.INTER_LINEAR)
    data = encode(Image.fromarray(smooth), "JPEG", quality=98, exif=turned(6))
    small = decode_image(data, reduce=reduce)
    assert small.shape == (-(-81 // reduce), -(-61 // reduce), 3)
    whole = cv2.resize(decode_image(data), small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - whole).mean() < 2
    assert decode_image(FILES["png"], reduce=reduce).shape == (60, 80, 3)

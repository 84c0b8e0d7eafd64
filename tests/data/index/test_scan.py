from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from data.index.scan import DecoderLog, check_image
from utils.errors import UserError

Make = Callable[..., Path]
BOX = "0 0.5 0.5 0.25 0.5\n"


def scan(file: Path, **options: float) -> DataIndex:
    return load_split(load_dataset_config(str(file)), "train", progress=False, **options)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def good(count: int) -> dict[str, str]:
    return {f"good{i}.jpg": BOX for i in range(count)}


@pytest.fixture
def images(yolo_set: Make) -> tuple[Path, Path]:
    """A set of eight good images, and the folder they lie in."""
    file = yolo_set(good(8))
    return file, file.parent / "set" / "images" / "train"


def whole_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    return cv2.imencode(".jpg", noise)[1].tobytes()


def zeroed(jpeg: bytes) -> bytes:
    return jpeg[:1200] + bytes(2000) + jpeg[3200:]


def huge_png() -> bytes:
    stream = BytesIO()
    Image.new("1", (11_000, 11_000)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("bad.jpg", b"", "empty file"),
        ("bad.jpg", b"no image", "not an image"),
        ("bad.jpg", whole_jpeg()[:1500], "truncated"),
        ("bad.jpg", whole_jpeg()[:-2], "truncated"),
        ("bad.jpg", b"GIF89a" + b"\0" * 50, "GIF"),
        ("bad.gif", b"GIF89a" + b"\0" * 50, "GIF"),
        ("bad.heic", b"\0\0\0\x18ftypheic", "HEIC"),
        ("bad.png", cv2.imencode(".png", np.zeros((1, 1, 3), np.uint8))[1].tobytes(), "1x1 pixels"),
        (
            "bad.png",
            cv2.imencode(".png", np.zeros((50, 50, 3), np.uint8))[1].tobytes()[:90],
            "truncated",
        ),
        ("bad.jpg", whole_jpeg()[:1500] + b"\xff\xd9", "premature end of data segment"),
        ("bad.png", huge_png(), "11000x11000 pixels; more than 100000000"),
    ],
    ids=[
        "empty",
        "text",
        "half",
        "no end",
        "GIF as .jpg",
        "gif",
        "heic",
        "1x1",
        "half png",
        "half with an end",
        "huge",
    ],
)
def test_a_bad_image_is_skipped_named_and_left_alone(
    images: tuple[Path, Path],
    name: str,
    data: bytes,
    cause: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, folder = images
    (folder / name).write_bytes(data)
    before = digests(file.parent)
    index = scan(file)
    (problem,) = index.problems
    assert problem.where == str(folder / name)
    assert cause in problem.cause
    assert len(index.records) == 8
    assert index.skipped() == 1
    error = capsys.readouterr().err
    assert f"{folder / name}: {problem.cause}; image skipped\n" in error
    assert "skipped: 1 images, 0 boxes" in error
    assert digests(file.parent) == before
    assert scan(file).problems == index.problems  # again, from the cache


@pytest.mark.parametrize("change", [zeroed, lambda jpeg: jpeg[:-2] + b"extra" * 20 + jpeg[-2:]])
def test_a_jpeg_with_bytes_left_over_is_named_and_used(
    images: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
    change: Callable[[bytes], bytes],
) -> None:
    file, folder = images
    (folder / "odd.jpg").write_bytes(change(whole_jpeg()))
    index = scan(file)
    assert len(index.records) == 9
    (problem,) = index.problems
    assert problem.text.startswith(f"{folder / 'odd.jpg'}: Corrupt JPEG data: ")
    assert problem.text.endswith(" extraneous bytes before marker 0xd9; used as decoded")
    assert not [line for line in capfd.readouterr().err.splitlines() if line.startswith("Corrupt")]
    assert scan(file).problems == index.problems  # again, from the cache


def test_what_others_print_during_a_scan_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with DecoderLog() as log:
        os.write(2, b"first\n")
        start = log.size()
        os.write(2, b"Corrupt JPEG data: premature end of data segment\nlast\n")
        assert log.complaint(start) == "Corrupt JPEG data: premature end of data segment"
        assert log.complaint(log.size()) is None
    assert capfd.readouterr().err == "first\nlast\n"


def test_links_that_lead_nowhere(images: tuple[Path, Path]) -> None:
    file, folder = images
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    os.mkfifo(folder / "pipe.jpg")
    index = scan(file)
    assert [problem.cause for problem in index.problems] == [
        "dangling or looping symbolic link",
        "dangling or looping symbolic link",
        "not a regular file",
    ]


def test_a_name_too_long_in_a_list_is_named(images: tuple[Path, Path]) -> None:
    file, folder = images
    (file.parent / "set" / "list.txt").write_text(f"{folder}/good0.jpg\n{'x' * 300}.jpg\n")
    file.write_text(file.read_text().replace("train: images/train", "train: list.txt"))
    index = scan(file)
    assert len(index.records) == 1
    assert index.problems[0].cause == "File name too long"


def test_a_folder_that_cannot_be_read_is_named(
    images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = images
    (folder / "locked").mkdir()
    listing = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):  # as root, rights do not stop anybody
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    index = scan(file)
    assert index.problems[0].text == f"{folder}/locked: folder: Permission denied; image skipped"


def test_long_thin_images_and_strange_names_are_used(tmp_path: Path, write_image: Make) -> None:
    for name, size in (
        ("thin.png", (12, 4000)),
        ("a b #1 ä 图.jpg", (64, 48)),
        ("UP.JPG", (64, 48)),
    ):
        write_image(tmp_path / "t" / name, *size)
    file = tmp_path / "d.yaml"
    file.write_text("train: t\nnames: [a]\n")
    (tmp_path / "t" / "thin.txt").write_text(BOX)
    index = scan(file)
    assert [(r.path.name, r.height, r.width) for r in index.records] == [
        ("UP.JPG", 48, 64),
        ("a b #1 ä 图.jpg", 48, 64),
        ("thin.png", 4000, 12),
    ]
    assert not index.problems


def test_names_that_are_no_text(images: tuple[Path, Path], write_image: Make) -> None:
    file, folder = images
    name = os.fsdecode(b"\xff\xfe.jpg")
    (folder / name).write_bytes(b"")
    index = scan(file)
    assert index.problems[0].cause == "empty file"
    write_image(folder / "x.jpg").replace(folder / name)
    assert len(scan(file).records) == 9
    assert len(scan(file).records) == 9


def test_other_files_are_passed_over(images: tuple[Path, Path]) -> None:
    file, folder = images
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    (folder / "._good0.jpg").write_text("attributes of a file, as macOS keeps them")
    assert not scan(file).problems


def test_many_bad_files_stop_unless_allowed(
    images: tuple[Path, Path], cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = images
    for i in range(200):
        (folder / f"bad{i:03}.jpg").write_bytes(b"text")
    with pytest.raises(
        UserError, match=r"200 of 208 images are unusable \(limit 50%\); the first: .*bad000\.jpg"
    ):
        scan(file)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert "bad009.jpg" in lines[9]
    (report,) = (cache_home / "featherdet").glob("*.txt")
    assert lines[10] == f"... and 190 more; all in {report}"
    assert len(report.read_text().splitlines()) == 200
    assert len(scan(file, max_bad=0.97).records) == 8


def test_limit_is_a_share(images: tuple[Path, Path]) -> None:
    file, folder = images
    (folder / "bad.jpg").write_bytes(b"")
    assert len(scan(file, max_bad=1 / 9).records) == 8
    with pytest.raises(UserError, match="1 of 9 images"):
        scan(file, max_bad=0.1)


def test_nothing_usable_stops(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    file = tmp_path / "d.yaml"
    file.write_text("train: t\nnames: [a]\n")
    with pytest.raises(UserError, match="train: no images found"):
        scan(file)
    (tmp_path / "t" / "a.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"1 of 1 images are unusable .*a\.jpg: not an"):
        scan(file)


def test_no_box_at_all_is_said_loudly(yolo_set: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan(yolo_set({"a.jpg": "", "b.jpg": None})).backgrounds == 2
    assert "WARNING" in (error := capsys.readouterr().err)
    assert "NOT ONE BOX in 2 images" in error


def test_a_report_goes_when_its_problems_have_gone(
    images: tuple[Path, Path], cache_home: Path
) -> None:
    file, folder = images
    (folder / "bad.jpg").write_bytes(b"")
    scan(file)
    assert len(list((cache_home / "featherdet").glob("*.txt"))) == 1
    (folder / "bad.jpg").unlink()
    scan(file)
    assert not list((cache_home / "featherdet").glob("*.txt"))


def test_only_the_first_rank_speaks(
    images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = images
    (folder / "bad.jpg").write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    assert len(load_split(load_dataset_config(str(file)), "train").records) == 8
    assert capsys.readouterr().err == ""


def test_progress_bar_counts_images(
    images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    load_split(load_dataset_config(str(images[0])), "train")
    assert "8/8" in capsys.readouterr().err


def test_known_images_are_not_decoded_again(
    tmp_path: Path, write_image: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_image(tmp_path / "a.jpg")
    first = check_image(path)
    assert (first.height, first.width, first.cause) == (48, 64, None)
    monkeypatch.setattr(
        "data.index.scan.decode_image", lambda data: np.zeros((99, 98, 3), np.uint8)
    )
    assert check_image(path, first) is first
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-3] + b"x\xff\xd9")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert check_image(path, first).height == 99

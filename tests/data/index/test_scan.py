import hashlib
import os
import threading

import cv2
import numpy as np
import pytest

from data.index.__main__ import main as check
from data.index.decoder import DecoderLog
from data.index.scan import check_image
from data.loading.store import ImageStore
from utils.errors import PartlyDoneError, UserError

BOX = "0 0.5 0.5 0.25 0.5\n"


@pytest.fixture
def images(yolo_set):
    """A set of eight good images, and the folder they lie in."""
    file = yolo_set({f"good{i}.jpg": BOX for i in range(8)})
    return file, file.parent / "set" / "images" / "train"


def encoded(suffix, side):
    noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
    return cv2.imencode(suffix, noise)[1].tobytes()


JPEG = encoded(".jpg", 56)
BAD = {
    "empty": ("bad.jpg", b"", "empty file"),
    "text": ("bad.jpg", b"no image", "not an image"),
    "half": ("bad.jpg", JPEG[:1500], "truncated"),
    "no end": ("bad.jpg", JPEG[:-2], "truncated"),
    "GIF as .jpg": ("bad.jpg", b"GIF89a" + b"\0" * 50, "GIF"),
    "gif": ("bad.gif", b"GIF89a" + b"\0" * 50, "GIF"),
    "heic": ("bad.heic", b"\0\0\0\x18ftypheic", "HEIC"),
    "1x1": ("bad.png", encoded(".png", 1), "1x1 pixels"),
    "half png": ("bad.png", encoded(".png", 50)[:90], "truncated"),
    "half with an end": ("bad.jpg", JPEG[:1500] + b"\xff\xd9", "premature end of data segment"),
    "undecodable name": (os.fsdecode(b"\xff\xfe.jpg"), b"", "empty file"),
}


@pytest.fixture
def large(monkeypatch):
    """Every set counts as large: images are not decoded."""
    monkeypatch.setattr("data.index.scan.DECODED", -1)


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_skipped_named_and_left_alone(scan, images, kind, size, capfd, request):
    file, folder = images
    name, data, cause = BAD[kind]
    options = {"decode": True} if kind == "half with an end" else {}  # needs that in a large set
    if size == "large":
        request.getfixturevalue("large")
    (folder / name).write_bytes(data)

    def digests():
        paths = filter(os.path.isfile, file.parent.rglob("*"))
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}

    before = digests()
    index = scan(file, **options)
    (problem,) = index.problems
    assert problem.where == str(folder / name)
    assert cause in problem.cause
    assert (len(index), index.skipped()) == (8, 1)
    error = capfd.readouterr().err
    shown = str(folder / name).encode("utf-8", "backslashreplace").decode()
    assert f"{shown}: {problem.cause}; image skipped\n" in error
    assert "skipped: 1 images, 0 boxes" in error
    assert digests() == before
    assert scan(file).problems == index.problems  # again, from the cache


@pytest.mark.parametrize(
    "data", [JPEG[:1200] + bytes(2000) + JPEG[3200:], JPEG[:-2] + b"extra" * 20 + JPEG[-2:]]
)
def test_a_jpeg_with_bytes_left_over_is_named_and_used(scan, images, capfd, data):
    file, folder = images
    (folder / "odd.jpg").write_bytes(data)
    index = scan(file)
    assert len(index) == 9
    (problem,) = index.problems
    assert problem.text.startswith(f"{folder / 'odd.jpg'}: Corrupt JPEG data: ")
    assert problem.text.endswith(" extraneous bytes before marker 0xd9; used as decoded")
    assert not [line for line in capfd.readouterr().err.splitlines() if line.startswith("Corrupt")]
    assert scan(file).problems == index.problems  # again, from the cache


def test_damage_that_only_decoding_shows_is_found_by_training_and_on_demand(
    scan, images, large, capfd
):
    file, folder = images
    bad = folder / "bad.jpg"
    bad.write_bytes(BAD["half with an end"][1])
    index = scan(file)
    assert (len(index), index.problems) == (9, ())
    (position,) = [i for i, record in enumerate(index.records) if record.path == bad]
    cause = "Corrupt JPEG data: premature end of data segment"
    with pytest.raises(UserError, match=rf"bad\.jpg: unreadable: {cause}; .* data\.index"):
        ImageStore(index.records, 64)[position]
    capfd.readouterr()
    with pytest.raises(PartlyDoneError, match="images left out: 1"):
        check(["--data", str(file)])
    assert f"{bad}: {cause}; image skipped\n" in capfd.readouterr().err
    assert [problem.cause for problem in scan(file).problems] == [cause]  # as it was found
    bad.unlink()
    check(["--data", str(file)])
    assert len(scan(file)) == 8


def test_what_others_print_during_a_scan_is_passed_on(capfd):
    with DecoderLog() as log:
        os.write(2, b"first\n")
        start = log.size()
        os.write(2, b"Corrupt JPEG data: premature end of data segment\nlast\n")
        assert log.complaint(start) == "Corrupt JPEG data: premature end of data segment"
        assert log.complaint(log.size()) is None
    assert capfd.readouterr().err == "first\nlast\n"


def test_threads_take_turns_with_the_error_stream(capfd):
    """Two at once would leave descriptor 2 in the file of one of them."""
    entered, leave = threading.Event(), threading.Event()

    def second():
        with DecoderLog():
            entered.set()
            leave.wait()

    with DecoderLog():
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    leave.set()
    thread.join()
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "seen\n"


def test_paths_that_cannot_be_read_are_named(scan, images, monkeypatch):
    file, folder = images
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.jpg").symlink_to("nothing.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "locked").mkdir()
    (folder / "list.txt").write_text(f"good0.jpg\n{'x' * 300}.jpg\n")
    listing = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):  # as root, rights do not stop anybody
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    text = file.read_text()
    file.write_text(
        text.replace("train: images/train", "train: [images/train, images/train/list.txt]")
    )
    assert [problem.text.removeprefix(f"{folder}/") for problem in scan(file).problems] == [
        "locked: folder: Permission denied; image skipped",
        "list.txt:1: " + f"{folder}/good0.jpg is listed twice; used once",
        "gone.jpg: dangling or looping symbolic link; image skipped",
        "loop.jpg: dangling or looping symbolic link; image skipped",
        "pipe.jpg: not a regular file; image skipped",
        f"{'x' * 300}.jpg: File name too long; image skipped",
    ]


def test_long_thin_images_and_strange_names_are_used_and_other_files_passed_over(
    scan, tmp_path, write_image, yaml_file
):
    folder = tmp_path / "t"
    write_image(folder / "thin.png", 12, 4000).with_suffix(".txt").write_text(BOX)
    for name in ("a b #1 ä 图.jpg", "UP.JPG", os.fsdecode(b"\xff.jpg")):
        write_image(folder / "x.jpg").rename(folder / name)
    for name in ("Thumbs.db", "notes.txt", "._UP.JPG"):
        (folder / name).write_text("x")
    for _ in range(2):  # again, from the cache
        index = scan(yaml_file("train: t\nnames: [a]\n"))
        assert [(r.path.name, r.height, r.width) for r in index.records] == [
            ("UP.JPG", 48, 64),
            ("a b #1 ä 图.jpg", 48, 64),
            ("thin.png", 4000, 12),
            (os.fsdecode(b"\xff.jpg"), 48, 64),
        ]
        assert not index.problems


def test_many_bad_files_stop_unless_allowed_and_are_all_in_the_report(
    scan, images, cache_home, monkeypatch, capsys
):
    file, folder = images
    bad = [folder / f"bad{i:03}.jpg" for i in range(200)]
    for path in bad:
        path.write_bytes(b"text")
    found = r"200 of 208 images are unusable \(limit 50%\); the first: .*bad000\.jpg"
    with pytest.raises(UserError, match=found):
        scan(file)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "image skipped" in line]) == 10
    assert "bad009.jpg" in lines[-2]
    (report,) = (cache_home / "featherdet").glob("*.txt")
    assert lines[-1] == f"... and 190 more; all in {report}"
    assert len(report.read_text().splitlines()) == 200
    monkeypatch.setattr("data.index.dataset.MAX_BAD", 200 / 208)
    assert len(scan(file)) == 8
    for path in bad:
        path.unlink()
    scan(file)
    assert not report.exists()


def test_nothing_usable_stops_and_no_box_at_all_is_said_loudly(scan, tmp_path, yaml_file, capsys):
    (tmp_path / "t").mkdir()
    file = yaml_file("train: t\nnames: [a]\n")
    with pytest.raises(UserError, match="train: no images found"):
        scan(file)
    (tmp_path / "t" / "a.jpg").write_bytes(b"text")
    with pytest.raises(UserError, match=r"1 of 1 images are unusable .*a\.jpg: not an"):
        scan(file)
    (tmp_path / "t" / "a.jpg").write_bytes(JPEG)
    assert scan(file).backgrounds == 1
    assert "no box in any of the 1 images" in capsys.readouterr().err
    yaml_file("train: t\nnames: [a, b, c]\n")
    (tmp_path / "t" / "a.txt").write_text("1 .5 .5 .5 .5\n")
    assert scan(file).boxes == 1
    assert "train: no box of a, c\n" in capsys.readouterr().err


def test_only_the_first_rank_speaks_and_shows_a_bar(scan, images, monkeypatch, capsys):
    file, folder = images
    (folder / "bad.jpg").write_bytes(b"")
    monkeypatch.setenv("RANK", "1")
    assert len(scan(file)) == 8
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    scan(file)
    assert "9/9" in capsys.readouterr().err


def test_known_images_are_not_decoded_again(tmp_path, write_image, monkeypatch):
    path = write_image(tmp_path / "a.jpg")
    first = check_image(str(path), decode=True)
    assert (first.height, first.width, first.cause) == (48, 64, None)
    assert check_image(str(path), decode=False) == first
    monkeypatch.setattr("data.index.scan.image_size", lambda data: (99, 98))
    assert check_image(str(path), first, decode=True) is first
    status = path.stat()
    path.write_bytes(path.read_bytes()[:-3] + b"x\xff\xd9")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert check_image(str(path), first, decode=True).height == 99

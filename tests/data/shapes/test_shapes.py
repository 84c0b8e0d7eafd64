"""The embedded data set: the same bits every time, true annotations, safe to make at any moment."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data.shapes import files
from data.shapes.outlines import OUTLINES, Pose, place, rasterize
from data.shapes.paint import Canvas
from data.shapes.scene import NAMES, Figure, Item, paint_figures, run_lengths
from utils.errors import UserError
from utils.seeding import generator

# pycocotools 2.0.11 decodes masks through a NumPy call that NumPy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Of pixels and boxes before any encoder. Another drawing needs another files.VERSION.
GOLDEN = {
    ("train", 0): "66b0eeb8d0fd13cfa6808aa5e78f2e8d0e8d06b603305c19ccb7a1748a743ba5",
    ("train", 1): "e344e169102ac96528d2de73a4bf8d5523d009d4f99b25f10d2ef22565b45ccd",
    ("val", 0): "a03517ee6bc3c823a6cc4ecf22bf709a312a3713192dd8f1e794d2d711982207",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.ensure_shapes(tmp_path_factory.mktemp("sets") / "shapes", progress=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SPLITS", {"train": 3, "val": 2})


def annotations(folder: Path, split: str) -> COCO:
    return COCO(folder / "annotations" / f"instances_{split}.json")


def digest(scene: files.Scene) -> str:
    numbers = [(item.label, *item.box, item.area) for item in scene.items]
    return hashlib.sha256(scene.image.tobytes() + json.dumps(numbers).encode()).hexdigest()


@pytest.mark.parametrize(("split", "index"), GOLDEN)
def test_scene_is_the_same_on_every_machine(split: str, index: int) -> None:
    assert digest(files.scene(split, index)) == GOLDEN[split, index]


def test_files_hold_what_the_scenes_say(folder: Path) -> None:
    for split, count in files.SPLITS.items():
        coco = annotations(folder, split)
        assert len(coco.imgs) == count
        assert len(list((folder / split).iterdir())) == count
        for index, (image_id, entry) in enumerate(list(coco.imgs.items())[:9]):
            scene = files.scene(split, index)
            bgr = cv2.imread(str(folder / split / entry["file_name"]))
            assert bgr.shape == scene.image.shape == (entry["height"], entry["width"], 3)
            difference = np.abs(bgr[..., ::-1].astype(int) - scene.image)
            lossless = entry["file_name"].endswith("png")
            assert difference.max() == 0 if lossless else difference.mean() < 12
            boxes = [tuple(a["bbox"]) for a in coco.imgToAnns[image_id]]
            expected = [
                (b[0], b[1], b[2] - b[0], b[3] - b[1]) for b in (i.box for i in scene.items)
            ]
            assert boxes == expected


def test_promised_variety(folder: Path) -> None:
    coco = annotations(folder, "train")
    objects = [a for a in coco.anns.values() if not a["iscrowd"]]
    sides = np.array([max(a["bbox"][2:]) for a in objects])
    assert len(NAMES) >= 8
    per_class = {c: sum(a["category_id"] == c for a in objects) for c in coco.cats}
    assert min(per_class.values()) >= 100
    assert sides.min() <= 8
    assert np.count_nonzero(sides < 16) >= 200
    assert sides.max() >= 200
    empty = sum(not coco.imgToAnns[i] for i in coco.imgs)
    assert 0.04 <= empty / len(coco.imgs) <= 0.13
    assert sum(a["iscrowd"] for a in coco.anns.values()) >= 10
    assert list(coco.cats) != list(range(len(NAMES)))
    assert {c["name"] for c in coco.cats.values()} == set(NAMES)
    assert len({(i["height"], i["width"]) for i in coco.imgs.values()}) > 100


def test_boxes_and_regions_agree_with_pycocotools(folder: Path) -> None:
    coco = annotations(folder, "val")
    ratios: list[float] = []
    offsets: list[int] = []
    for note in coco.anns.values():
        entry = coco.imgs[note["image_id"]]
        left, top, width, height = note["bbox"]
        assert left >= 0
        assert top >= 0
        assert left + width <= entry["width"]
        assert top + height <= entry["height"]
        region = coco.annToMask(note)
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        expected = (left, top, left + width, top + height)
        offsets.append(np.abs(np.subtract(found, expected)).max())
        name = coco.cats[note["category_id"]]["name"]
        if note["iscrowd"]:
            assert int(region.sum()) == note["area"]
        elif name != "ring" and note["area"] > 150:
            ratios.append(int(region.sum()) / note["area"])
    assert max(offsets) <= 6  # a needle's tip may fall between rasterised pixels
    assert np.mean(np.array(offsets) <= 1) > 0.98
    # A polygon cannot hold the hole that an object in front leaves; it never is too small.
    assert min(ratios) > 0.88
    assert np.mean(np.array(ratios) < 1.1) > 0.8


@pytest.mark.parametrize(
    "rows", ["0000\n0000", "1111\n1111", "0110\n1001", "1000\n0000", "0000\n0001", "1", "0"]
)
def test_run_lengths_decode_to_the_mask(rows: str) -> None:
    mask = np.array([[value == "1" for value in row] for row in rows.split()])
    region = {"size": list(mask.shape), "counts": list(run_lengths(mask))}
    decoded = coco_mask.decode(coco_mask.frPyObjects(region, *mask.shape))
    assert np.array_equal(decoded.astype(bool), mask)


@pytest.mark.parametrize("name", NAMES)
def test_outline_has_the_asked_size_and_place(name: str) -> None:
    outline = place(OUTLINES[name](), Pose((50.0, 40.0), 30.0, 0.7, 0.8))
    low, high = outline[0].min(0), outline[0].max(0)
    assert (high - low).max() == pytest.approx(30.0)
    assert (low + high) / 2 == pytest.approx([50.0, 40.0])


def test_mask_areas_by_hand() -> None:
    disc = rasterize(place(OUTLINES["disc"](), Pose((30.0, 30.0), 40.0, 0.0)))
    ring = rasterize(place(OUTLINES["ring"](), Pose((30.0, 30.0), 40.0, 0.0)))
    rectangle = rasterize(place(OUTLINES["rectangle"](), Pose((30.0, 30.0), 40.0, 0.0, 0.5)))
    shrunk = rasterize(place(OUTLINES["rectangle"](), Pose((30, 30), 40.0, 0.0, 0.5)), inset=2.0)
    assert disc.alpha.sum() == pytest.approx(math.pi * 400, rel=0.02)
    assert ring.alpha.sum() == pytest.approx(math.pi * 400 * (1 - 0.52**2), rel=0.03)
    assert rectangle.alpha.sum() == pytest.approx(40 * 20, rel=0.02)
    assert shrunk.alpha.sum() == pytest.approx(36 * 16, rel=0.03)


def flat_items(*figures: Figure, size: tuple[int, int] = (100, 120)) -> tuple[Item, ...]:
    canvas = Canvas(np.full((*size, 3), 128.0), np.zeros(size, np.int64))
    return paint_figures(NoScribbles(), canvas, figures)  # type: ignore[arg-type]


class NoScribbles:
    """A generator that draws the number of scribbles as 0."""

    def integers(self, low: int, high: int) -> int:
        return low


def rectangle(x: float, y: float, side: float) -> Figure:
    return Figure(NAMES.index("rectangle"), Pose((x, y), side, 0.0), 1)


def test_box_is_that_of_the_visible_part() -> None:
    whole, covered = rectangle(50, 50, 40), rectangle(70, 50, 40)
    items = flat_items(whole, covered)
    assert [item.box for item in items] == [(30, 30, 50, 70), (50, 30, 90, 70)]
    assert [item.area for item in items] == [20 * 40, 40 * 40]


def test_mostly_hidden_objects_are_dropped() -> None:
    assert [i.box for i in flat_items(rectangle(50, 50, 20), rectangle(50, 50, 60))] == [
        (20, 20, 80, 80)
    ]
    barely, hardly = rectangle(-3, 50, 20), rectangle(-5, 50, 20)  # 35 % and 25 % inside
    assert [item.box for item in flat_items(barely)] == [(0, 40, 7, 60)]
    assert flat_items(hardly) == ()


def test_second_call_changes_nothing(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert files.ensure_shapes(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.usefixtures("small")
def test_two_at_once_share_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_drew = threading.Barrier(2, timeout=60)
    draw = files._draw

    def draw_then_wait(folder: Path, *, progress: bool) -> None:
        draw(folder, progress=progress)
        both_drew.wait()

    monkeypatch.setattr(files, "_draw", draw_then_wait)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            files.ensure_shapes(tmp_path / "shapes", progress=False)
        except Exception as error:  # reported by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(list((tmp_path / "shapes" / "train").iterdir())) == 3


@pytest.mark.usefixtures("small")
def test_a_failed_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, image: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_image", full_disk)
    with pytest.raises(UserError, match=r"shapes: cannot draw .* No space left on device"):
        files.ensure_shapes(tmp_path / "shapes", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(UserError, match="not the data set 'shapes'"):
        files.ensure_shapes(tmp_path)
    assert (tmp_path / "holiday.jpg").read_text() == "mine"


@pytest.mark.usefixtures("small")
def test_older_version_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "shapes"
    files.ensure_shapes(root, progress=False)
    (root / "train" / "0000.png").unlink()
    monkeypatch.setattr(files, "VERSION", files.VERSION + 1)
    files.ensure_shapes(root, progress=False)
    assert (root / "train" / "0000.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.usefixtures("small")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert files.main(["--root", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out == f"shapes: {tmp_path / 'here'}\n"


def test_video_reads_back_and_moves(folder: Path) -> None:
    capture = cv2.VideoCapture(str(folder / files.VIDEO_NAME))
    frames = []
    while True:
        read, frame = capture.read()
        if not read:
            break
        frames.append(frame.astype(int))
    capture.release()
    assert len(frames) == 30
    assert frames[0].shape == (240, 320, 3)
    assert np.abs(frames[0] - frames[-1]).mean() > 2 * np.abs(frames[0] - frames[1]).mean() > 0


def test_generator_is_not_shared_between_images() -> None:
    first, second = (generator(files.SEED, 0, index).random() for index in (0, 1))
    assert first != second

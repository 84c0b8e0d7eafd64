"""The embedded data set: the same bits every time, true annotations, safe to make at any moment."""

import hashlib
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from data.shapes import files, scene
from data.shapes.scene import NAMES, Canvas, annotate, paint_object, place, rasterize
from utils.errors import UserError
from utils.seeding import generator

# pycocotools 2.0.11 decodes masks through a NumPy call that NumPy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# Of pixels and boxes before any encoder. Another drawing needs another files.VERSION.
GOLDEN = {
    ("train", 0): "6e1ed225641daf6d60b768f98e74301c22ee95f67aac3215b4dcd5201ce39a64",
    ("train", 35): "cc0aa4d5ec195e161621a4ec5ebbf8f77c442790b464e1e2859b0dd0d8c7f5bf",
    ("val", 0): "3eb1d620997e11f3627e83e8658c8ff02021284342b5aeb2d9f3e677c8970faf",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return files.ensure_shapes(tmp_path_factory.mktemp("sets") / "shapes")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Where a data set of five images can be drawn."""
    monkeypatch.setattr(files, "SPLITS", {"train": 3, "val": 2})
    return tmp_path / "shapes"


def annotations(folder, split):
    return COCO(folder / "annotations" / f"instances_{split}.json")


def digest(split, index):
    image, notes = files.scene(split, index)
    numbers = [(note["category_id"], *note["bbox"], note["area"]) for note in notes]
    return hashlib.sha256(image.tobytes() + json.dumps(numbers).encode()).hexdigest()


@pytest.mark.parametrize(("split", "index"), GOLDEN)
def test_scene_is_the_same_on_every_machine(split, index, monkeypatch):
    assert digest(split, index) == GOLDEN[split, index]
    noise = np.random.default_rng(0)

    def other_machine(*args, **kwargs):  # whose sines and products differ in their last bits
        return [p + noise.uniform(-1e-10, 1e-10, p.shape) for p in place(*args, **kwargs)]

    monkeypatch.setattr(scene, "place", other_machine)
    assert digest(split, index) == GOLDEN[split, index]


def test_files_hold_the_scenes(folder):
    for split, count in files.SPLITS.items():
        coco = annotations(folder, split)
        assert len(coco.imgs) == count
        assert len(list((folder / split).iterdir())) == count
        for index, (image_id, entry) in enumerate(list(coco.imgs.items())[:9]):
            image, notes = files.scene(split, index)
            bgr = cv2.imread(str(folder / split / entry["file_name"]))
            assert bgr.shape == image.shape == (entry["height"], entry["width"], 3)
            difference = np.abs(bgr[..., ::-1].astype(int) - image)
            lossless = entry["file_name"].endswith("png")
            assert difference.max() == 0 if lossless else difference.mean() < 12
            assert [a["bbox"] for a in coco.imgToAnns[image_id]] == [n["bbox"] for n in notes]


def test_promised_variety(folder):
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


def test_boxes_and_regions_agree_with_pycocotools(folder):
    coco = annotations(folder, "val")
    ratios, offsets = [], []
    for note in coco.anns.values():
        entry = coco.imgs[note["image_id"]]
        left, top, width, height = note["bbox"]
        assert 0 <= left <= entry["width"] - width
        assert 0 <= top <= entry["height"] - height
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


@pytest.mark.parametrize("share", [0.9, 1])  # 1: one run, which is all of the image
@pytest.mark.parametrize("corner", [0, 1])  # whether the first pixel is seen
def test_run_lengths_decode_to_the_mask(corner, share):
    seen = np.random.default_rng(0).random((30, 40)) < share
    seen[0, 0] = corner
    entry = annotate(0, seen, np.full(seen.shape, 255, np.uint8), crowd=True)
    assert entry is not None
    decoded = coco_mask.decode(coco_mask.frPyObjects(entry["segmentation"], *seen.shape))
    assert np.array_equal(decoded.astype(bool), seen)


@pytest.mark.parametrize("name", NAMES)
def test_outline_has_the_asked_size_and_position(name):
    outline = place(name, (50, 40), 30, degrees=40, squeeze=0.8)
    low, high = outline[0].min(0), outline[0].max(0)
    assert (high - low).max() == pytest.approx(30)
    assert (low + high) / 2 == pytest.approx([50, 40])


@pytest.mark.parametrize("x", [30, 0])  # 0: half of it outside
@pytest.mark.parametrize(
    ("name", "area"),
    [("disc", math.pi * 400), ("ring", math.pi * 400 * (1 - 0.52**2)), ("rectangle", 1600)],
)
def test_mask_areas_by_hand(name, area, x):
    mask = rasterize(place(name, (x, 30), 40), (70, 60))
    assert mask.sum() / 255 == pytest.approx(area if x else area / 2, rel=0.04)


@pytest.mark.parametrize(
    ("squares", "boxes"),
    [
        ([(50, 50, 40), (70, 50, 40)], [[30, 30, 20, 40], [50, 30, 40, 40]]),
        ([(50, 50, 20), (50, 50, 60)], [[20, 20, 60, 60]]),
        ([(64, 50, 20), (47, 50, 40)], [[67, 40, 7, 20], [27, 30, 40, 40]]),  # 35 % visible
        ([(62, 50, 20), (47, 50, 40)], [[27, 30, 40, 40]]),  # 25 %
    ],
)
def test_box_is_that_of_the_visible_part_if_that_is_enough(squares, boxes):
    size = (100, 120)
    canvas = Canvas(np.full((*size, 3), 128, np.int32), np.zeros(size, np.uint8))
    masks = [rasterize(place("rectangle", (x, y), side), size) for x, y, side in squares]
    for owner, mask in enumerate(masks, 1):  # the later over the earlier
        paint_object(generator(owner), canvas, 3, mask, owner=owner)
    notes = [annotate(3, canvas.owner == i, mask) for i, mask in enumerate(masks, 1)]
    notes = [note for note in notes if note]
    assert [note["bbox"] for note in notes] == boxes
    assert [note["area"] for note in notes] == [width * height for *_, width, height in boxes]


def test_two_at_once_share_one_whole_folder(small, monkeypatch):
    both_drew = threading.Barrier(2, timeout=60)
    draw = files._draw

    def draw_then_wait(folder):
        draw(folder)
        both_drew.wait()

    monkeypatch.setattr(files, "_draw", draw_then_wait)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(files.ensure_shapes, small) for _ in range(2)]
        assert {future.result() for future in asked} == {small}
    assert list(small.parent.iterdir()) == [small]
    assert len(list((small / "train").iterdir())) == 3


def test_a_failed_drawing_leaves_nothing(small, monkeypatch):
    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_video", full_disk)
    with pytest.raises(UserError, match=r"shapes: cannot draw .* No space left on device"):
        files.ensure_shapes(small)
    assert list(small.parent.iterdir()) == []


def test_foreign_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "holiday.jpg").write_text("mine")
    with pytest.raises(UserError, match="not the data set 'shapes'"):
        files.ensure_shapes(tmp_path)
    assert (tmp_path / "holiday.jpg").read_text() == "mine"


def test_the_command_draws_once_and_anew_after_a_change(small, monkeypatch, capsys):
    assert files.main(["--root", str(small)]) == 0
    assert capsys.readouterr().out == f"shapes: {small}\n"
    (small / "train" / "0000.png").unlink()
    files.ensure_shapes(small)
    assert not (small / "train" / "0000.png").exists()
    monkeypatch.setattr(files, "VERSION", files.VERSION + 1)
    files.ensure_shapes(small)
    assert (small / "train" / "0000.png").is_file()
    assert list(small.parent.iterdir()) == [small]


def test_video_reads_back_and_moves(folder):
    capture = cv2.VideoCapture(str(folder / files.VIDEO_NAME))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1].astype(int))
    assert len(frames) == 30
    assert frames[0].shape == (240, 320, 3)
    assert np.abs(frames[0] - frames[-1]).mean() > 2 * np.abs(frames[0] - frames[1]).mean() > 0

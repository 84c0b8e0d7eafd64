"""Images come at the asked scale, from file, memory or disk alike."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

import data.loading.store as store_module
from data.loading.store import ImageStore, SharedImages, choose_cache, free_memory
from utils.boxes import Letterbox
from utils.errors import UserError
from utils.seeding import generator


class Payload:
    """What a pickle in a cache file might do."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def make_image(make_record):
    """make_image(path, height, width): write a smooth image; its record and pixels."""

    def make(path, height, width, seed=0):
        rng = generator(seed)
        small = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(path), image[..., ::-1])
        return make_record(path, height, width), image

    return make


@pytest.mark.parametrize("cache", ["auto", "none", "ram", "disk"])
@pytest.mark.parametrize("area", [False, True])
def test_images_equal_the_letterbox_without_padding(tmp_path, cache, area, make_image):
    shapes = [(40, 60), (90, 31), (64, 64), (9, 400)]
    made = [make_image(tmp_path / f"{i}.png", *shape, seed=i) for i, shape in enumerate(shapes)]
    store = ImageStore([item for item, _ in made], 64, cache=cache, area=area)
    for _ in range(2):
        for i, (item, image) in enumerate(made):
            whole, (height, width) = Letterbox(image.shape[:2], (64, 64)), store.shapes[i]
            assert whole.size == (height, width)
            way = cv2.INTER_AREA if area and whole.scale < 1 else cv2.INTER_LINEAR
            expected = cv2.resize(image, (width, height), interpolation=way)
            np.testing.assert_array_equal(store[i], expected)
            assert not store[i].flags.writeable
            if cache in {"auto", "ram"}:
                item.path.unlink(missing_ok=True)


@pytest.mark.parametrize(("height", "width"), [(400, 300), (301, 403), (250, 799), (205, 111)])
def test_large_jpegs_are_read_reduced_and_look_the_same(tmp_path, height, width, make_record):
    rows, columns = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin((rows * a + columns * b) / 40) for a, b in ((1, 2), (3, 1), (0, 2))]
    cv2.imwrite(str(tmp_path / "large.jpg"), np.stack(waves, -1).astype(np.uint8))
    item = make_record(tmp_path / "large.jpg", height, width)
    full = ImageStore([item], 100, area=True)[0].astype(int)
    fast = ImageStore([item], 100)[0].astype(int)
    assert fast.shape == full.shape
    assert np.abs(fast - full).mean() < 1.5


def test_none_reads_again(tmp_path, make_image):
    item, _ = make_image(tmp_path / "a.png", 64, 48)
    store = ImageStore([item], 64)
    assert store[0].shape == (64, 48, 3)
    make_image(tmp_path / "a.png", 30, 48)
    with pytest.raises(UserError, match=r"a\.png: was 48x64 pixels at the scan and has changed"):
        store[0]
    item.path.unlink()
    with pytest.raises(UserError, match=r"a\.png: unreadable: No such file"):
        store[0]


def test_what_libjpeg_complains_about_is_said_once_with_the_name(tmp_path, capfd, make_image):
    item, _ = make_image(tmp_path / "a.jpg", 64, 48)
    data = item.path.read_bytes()
    item.path.write_bytes(data[:-2] + b"extra" * 20 + data[-2:])
    store = ImageStore([item], 64)
    shape = store[0].shape
    assert (shape, store[0].shape) == ((64, 48, 3), (64, 48, 3))
    cause = "Corrupt JPEG data: 98 extraneous bytes before marker 0xd9"
    assert capfd.readouterr().err == f"warning: {item.path}: {cause}; used as decoded\n"


def test_ram_that_does_not_fit_warns_and_goes_on(tmp_path, monkeypatch, capsys, make_image):
    monkeypatch.setattr(store_module, "free_memory", lambda: 10_000)
    monkeypatch.setattr(store_module, "DISK_LIMIT", 0)
    item, image = make_image(tmp_path / "a.png", 64, 64)
    store = ImageStore([item], 64, cache="ram")
    warning = "--cache ram needs 0.0 GiB in memory, 0.0 GiB free; continuing with --cache none"
    assert warning in capsys.readouterr().err
    np.testing.assert_array_equal(store[0], image)
    make_image(tmp_path / "a.png", 64, 64, seed=1)
    assert (store[0] != image).any()


GIB = 1 << 30


@pytest.mark.parametrize(
    ("asked", "device", "memory", "disk", "expected"),
    [
        # 1,000 images of 1024 x 1024: 2.93 GiB
        ("auto", 3 * GIB, 100 * GIB, 100 * GIB, "device"),
        ("auto", 2 * GIB, 8 * GIB, 100 * GIB, "ram"),
        ("auto", 0, 7 * GIB, 30 * GIB, "disk"),
        ("auto", 0, 7 * GIB, 29 * GIB, "none"),
        ("ram", 0, 4 * GIB, 0, "ram"),
        ("ram", 0, 3 * GIB, 30 * GIB, "disk"),
        ("device", 2 * GIB, 8 * GIB, 0, "ram"),
        ("disk", 3 * GIB, 8 * GIB, 0, "disk"),
        ("none", 3 * GIB, 8 * GIB, 0, "none"),
    ],
)
def test_the_cache_is_the_first_that_fits(
    monkeypatch, capsys, asked, device, memory, disk, expected
):
    monkeypatch.setattr(store_module, "free_memory", lambda: memory)
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=disk))
    shapes = np.full((1000, 2), 1024, np.int32)
    chosen, line = choose_cache(asked, shapes, 1024, device)
    assert (chosen, line[: 7 + len(chosen)]) == (expected, f"cache: {chosen}")
    assert "2.9" in line
    assert (f"--cache {asked} needs 2.9" in capsys.readouterr().err) == (chosen != asked != "auto")


def test_ranks_of_other_machines_do_not_count(tmp_path, monkeypatch, make_image):
    free = free_memory()
    assert 2**20 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    items = [make_image(tmp_path / f"{i}.png", 64, 64)[0] for i in range(2)]
    monkeypatch.setattr(store_module, "free_memory", lambda: 3 * 2 * 64 * 64 * 3)
    monkeypatch.setattr(store_module, "DISK_LIMIT", 0)
    monkeypatch.setenv("WORLD_SIZE", "64")
    for local, kept in (("1", "ram"), ("2", "none")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert ImageStore(items, 64, cache="auto").cache == kept


def test_disk_cache_is_outside_the_set_follows_the_file_and_mends_itself(
    tmp_path, monkeypatch, cache_home, make_image
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    item, image = make_image(folder / "a.png", 64, 48)
    np.testing.assert_array_equal(ImageStore([item], 64, cache="disk")[0], image)
    assert [file.name for file in folder.iterdir()] == ["a.png"]
    (kept,) = cache_home.rglob("*.npy")
    np.testing.assert_array_equal(np.load(kept, allow_pickle=False), image)
    whole = kept.read_bytes()
    for damage in (
        lambda: kept.write_bytes(whole[:-100]),
        lambda: kept.write_bytes(b""),
        lambda: np.save(kept, np.array([Payload()], dtype=object), allow_pickle=True),
        lambda: np.save(kept, image[:10]),
    ):
        damage()
        np.testing.assert_array_equal(ImageStore([item], 64, cache="disk")[0], image)
        assert kept.read_bytes() == whole
    assert not (tmp_path / "ran").exists()
    np.save(kept, image + 1)  # what is whole is not read again
    np.testing.assert_array_equal(ImageStore([item], 64, cache="disk")[0], image + 1)
    other, changed = make_image(folder / "a.png", 64, 48, seed=1)
    os.utime(other.path, ns=(1, 1))
    np.testing.assert_array_equal(ImageStore([other], 64, cache="disk")[0], changed)


def test_a_disk_cache_that_cannot_be_written_warns_once(tmp_path, monkeypatch, capsys, make_image):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    item, image = make_image(tmp_path / "a.png", 64, 48)
    store = ImageStore([item], 64, cache="disk")
    for _ in range(2):
        np.testing.assert_array_equal(store[0], image)
    assert capsys.readouterr().err.count("not cached") == 1


def test_shared_images_are_shared_with_a_pickled_copy_and_vanish():
    images = SharedImages(np.array([18, 60]))
    copy = pickle.loads(pickle.dumps(images))  # what spawning a worker does
    assert images.get(1, 0, (4, 5)) is None
    copy.put(1, 0, np.full((4, 5, 3), 7, np.uint8))
    assert (images.get(1, 0, (4, 5)) == 7).all()
    assert images.get(1, 3, (4, 5)) is None
    assert images.get(0, 0, (2, 3)) is None
    images.put(1, 3, np.full((2, 3, 3), 8, np.uint8))  # another image at the same slot
    assert (copy.get(1, 3, (2, 3)) == 8).all()
    assert copy.get(1, 0, (4, 5)) is None
    with pytest.raises(ValueError, match="read-only"):
        images.get(1, 3, (2, 3))[0] = 1
    path = Path(images._block.file)
    assert path.exists()
    del images
    assert not path.exists()

"""Batches: the same for any number of workers, dealt out evenly, and errors in one line."""

from __future__ import annotations

import contextlib
import gc
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import data.loading.store as store_module
from data.index.records import DataIndex
from data.loading.augment import to_sample
from data.loading.device import DeviceImages
from data.loading.loader import LoaderConfig, TrainLoader, ValLoader
from data.loading.store import ImageStore
from utils.boxes import Letterbox
from utils.errors import UserError
from utils.hyp import Hyperparameters, load_hyp
from utils.seeding import generator

ALL = Hyperparameters(
    degrees=10.0, shear=5.0, perspective=0.0005, mixup=0.5, copy_paste=0.5, flipud=0.5
)
SHAPES = [(48, 64), (64, 48), (43, 140), (64, 64), (30, 80), (100, 70), (64, 33)]


@pytest.fixture
def make_index(tmp_path, make_record):
    """Images of noise with three boxes: one with a polygon, one with that of a part, a crowd."""

    def make(count=7):
        records = []
        for i in range(count):
            height, width = SHAPES[i % len(SHAPES)]
            rng = generator(9, i)
            path = tmp_path / f"{i}.png"
            cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            low = rng.uniform(0, 0.5, (3, 2)) * (width, height)
            boxes = np.hstack((low, low + np.array([width / 3, height / 3])))
            outline = boxes[0][[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2).astype(np.float32)
            part = (
                outline[:3] + boxes[1][:2].astype(np.float32) - outline[0] + 2
            )  # of the second box
            changes = {"segments": (outline, part, None), "crowd": np.arange(3) == 2}
            records.append(make_record(path, height, width, boxes, image_id=i, **changes))
        return DataIndex(tuple(records), ("a", "b", "c"), (1, 2, 3), (), "fingerprint")

    return make


def config(**changes):
    values = {"image_size": 64, "batch_size": 3, "stride": 32, "workers": 0, "seed": 0}
    return LoaderConfig(**{**values, **changes})


def epoch_of(loader, epoch=0, start_step=0):
    return list(loader.batches(epoch, start_step))


def tensors(batch):
    return [batch.images, *vars(batch.targets).values()]


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a.image_ids, a.letterboxes) == (b.image_ids, b.letterboxes)
        assert all(map(torch.equal, tensors(a), tensors(b)))


def ids(batches):
    return [batch.image_ids for batch in batches]


def assert_letterboxed(index, batches, geometry_of, area=False):
    """Every image by the expected letterbox, with the boxes that are no crowd regions."""
    for batch in batches:
        for row, i in enumerate(batch.image_ids):
            record = index.records[i]
            geometry = geometry_of((record.height, record.width))
            image = cv2.imread(str(record.path))[..., ::-1]
            if area and geometry.scale < 1:
                image = cv2.resize(image, geometry.size[::-1], interpolation=cv2.INTER_AREA)
            found = batch.images[row].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(found, geometry.apply(image))
            mine = batch.targets.image_index == row
            expected = geometry.to_network(record.boxes[:2])
            np.testing.assert_allclose(batch.targets.boxes[mine].numpy(), expected, atol=1e-3)
            assert batch.targets.labels[mine].tolist() == [0, 1]


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(make_index, workers):
    index = make_index()
    alone = TrainLoader(index, config(), ALL)
    many = TrainLoader(index, config(workers=workers), ALL)
    for epoch in (0, 1):
        assert_equal(epoch_of(alone, epoch), epoch_of(many, epoch))
    # an epoch left early, a later one, then an epoch that was there before
    next(many.batches(2))
    for epoch in (3, 1):
        assert_equal(epoch_of(alone, epoch), epoch_of(many, epoch))


def test_epochs_and_seeds_differ(make_index):
    index = make_index()
    loader, other = (TrainLoader(index, config(seed=seed), ALL) for seed in (0, 1))
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert ids(first) != ids(second)
    assert ids(first) != ids(epoch_of(other, 0))
    once, again = (
        {i: b.images[k] for b in e for k, i in enumerate(b.image_ids)} for e in (first, second)
    )
    assert once.keys() == again.keys() == set(range(7))
    assert not any(torch.equal(once[i], again[i]) for i in once)


def test_a_batch_has_the_promised_types(make_index):
    index = make_index()
    assert ValLoader(index, config(pin_memory=True))._loader.pin_memory
    loader = TrainLoader(index, config(), ALL)
    assert not loader._loader.pin_memory
    batch = epoch_of(loader)[0]
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    targets = batch.targets
    assert targets.boxes.dtype == torch.float32
    assert targets.labels.dtype == targets.image_index.dtype == torch.int64
    assert targets.boxes.shape == (len(targets), 4)
    assert targets.boxes.min() >= 0
    assert targets.boxes.max() <= 64
    assert (targets.boxes[:, 2:] - targets.boxes[:, :2]).min() > 2
    assert targets.image_index.max() < 3
    assert targets.image_index.diff().min() >= 0
    assert 2 not in targets.labels  # the crowd regions


def test_no_augmentation_is_the_letterboxed_image(make_index):
    index = make_index()
    batches = epoch_of(TrainLoader(index, config(), load_hyp("no-augmentation")))
    assert sorted(sum(ids(batches), ())) == list(range(7))
    assert_letterboxed(index, batches, lambda size: Letterbox(size, (64, 64)))


@pytest.mark.parametrize("canvas", [None, (64, 64), (96, 80)])
def test_polygons_follow_their_boxes_onto_the_canvas(make_index, canvas):
    index = make_index()
    store = ImageStore(index.records, 64)
    for i, record in enumerate(index.records):
        sample = to_sample(store, i, canvas, store[i])
        geometry = Letterbox((record.height, record.width), canvas or store.shape(i), 64)
        assert sample.size == geometry.dst
        np.testing.assert_array_equal(sample.boxes, geometry.to_network(record.boxes[:2]))
        outline, none = sample.segments
        assert none is None
        extent = np.hstack((outline.min(0), outline.max(0)))
        np.testing.assert_allclose(extent, sample.boxes[0], atol=1e-4)


def test_mosaic_off_means_no_mosaic(make_index):
    index = make_index()
    never = replace(ALL, mosaic=0.0)
    off = epoch_of(TrainLoader(index, config(), never, mosaic_epochs=0), 2)
    assert [len(batch) for batch in off] == [3, 3, 1]
    with_some = TrainLoader(index, config(workers=1), ALL)
    closed = TrainLoader(index, config(workers=1), ALL, mosaic_epochs=2)
    assert_equal(epoch_of(with_some, 1), epoch_of(closed, 1))
    assert_equal(off, epoch_of(closed, 2))
    assert not torch.equal(epoch_of(with_some, 2)[0].images, off[0].images)
    rect, plain = (TrainLoader(index, config(rect=True), hyp) for hyp in (ALL, never))
    assert_equal(epoch_of(rect, 2), epoch_of(plain, 2))


GEOMETRIC = ("degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr")


@pytest.mark.parametrize("name", [*GEOMETRIC, "hsv_v", "mixup", "copy_paste"])
def test_every_amount_changes_the_samples(make_index, name):
    hyp = replace(load_hyp("no-augmentation"), mosaic=float(name in {"mixup", "copy_paste"}))
    largest = replace(hyp, **{name: 0.001 if name == "perspective" else 1.0})
    plain, changed = (TrainLoader(make_index(), config(), h) for h in (hyp, largest))
    assert not torch.equal(epoch_of(plain)[0].images, epoch_of(changed)[0].images)


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_two_ranks_share_the_set_evenly(make_index, count, rect):
    index = make_index(count)
    loaders = [
        TrainLoader(index, config(batch_size=2, rank=r, world_size=2, rect=rect), ALL)
        for r in range(2)
    ]
    whole = TrainLoader(index, config(batch_size=4, rect=rect), ALL)
    for epoch in range(2):
        first, second = (epoch_of(loader, epoch) for loader in loaders)
        assert len(first) == len(loaders[0]) == len(loaders[1])
        assert [b.images.shape for b in first] == [b.images.shape for b in second]
        together = [sorted(a + b) for a, b in zip(ids(first), ids(second), strict=True)]
        dealt = [i for batch in together for i in batch]
        assert set(dealt) == set(range(count))
        assert len(dealt) == count + count % 2
        if count % 2 == 0:  # together they are what one rank would see
            assert together == [sorted(batch) for batch in ids(epoch_of(whole, epoch))]


@pytest.mark.parametrize(("workers", "rect"), [(0, False), (0, True), (2, False)])
def test_start_step_is_the_tail_of_the_epoch(make_index, workers, rect):
    loader = TrainLoader(make_index(), config(workers=workers, batch_size=2, rect=rect), ALL)
    full = epoch_of(loader, 4)
    assert len(loader) == len(full) == 4
    assert_equal(full[2:], epoch_of(loader, 4, start_step=2))
    assert epoch_of(loader, 4, start_step=4) == []
    assert_equal(full, epoch_of(loader, 4))
    with pytest.raises(ValueError, match="start_step 5 of an epoch of 4 batches"):
        epoch_of(loader, 0, start_step=5)


@pytest.mark.parametrize(("count", "world_size"), [(1, 1), (7, 1), (7, 2), (6, 1)])
def test_the_last_batch_is_filled_up_from_the_epochs_beginning(make_index, count, world_size):
    index = make_index(count)
    dealt, plain = [], []
    for rank in range(world_size):
        own = config(batch_size=3, rank=rank, world_size=world_size)
        filled = epoch_of(TrainLoader(index, replace(own, fill=True), ALL))
        others = epoch_of(TrainLoader(index, own, ALL))
        assert [len(batch) for batch in filled] == [3] * len(others)
        assert_equal(filled[:-1], others[:-1])
        dealt.append(np.concatenate([batch.image_ids for batch in filled]))
        plain.append(np.concatenate([batch.image_ids for batch in others]))
    order, once = (np.stack(item, 1).ravel().tolist() for item in (dealt, plain))
    assert order == (once[:count] * len(order))[: len(order)]
    assert set(order) == set(range(count))


def test_no_image_one_image_and_a_batch_larger_than_the_set(make_index):
    with pytest.raises(UserError, match="no usable image"):
        TrainLoader(DataIndex((), ("a",), (1,), (), ""), config(), ALL)
    (batch,) = epoch_of(TrainLoader(make_index(1), config(batch_size=16), ALL))
    assert batch.images.shape == (1, 3, 64, 64)
    (batch,) = epoch_of(TrainLoader(make_index(5), config(batch_size=16), ALL))
    assert sorted(batch.image_ids) == [0, 1, 2, 3, 4]


def test_rect_batches_have_like_aspects_and_the_least_canvas(make_index):
    index = make_index(14)
    rect = config(batch_size=4, rect=True, stride=16)
    loader = TrainLoader(index, rect, load_hyp("no-augmentation"))
    first, second = epoch_of(loader, 0), epoch_of(loader, 1)
    assert sorted(ids(first)) == sorted(ids(second))
    assert any(ids(epoch_of(loader, e)) != ids(first) for e in range(1, 5))
    order = sorted(range(14), key=lambda i: index.records[i].height / index.records[i].width)
    by_aspect = [set(order[start : start + 4]) for start in range(0, 14, 4)]
    for batch in first:
        assert set(batch.image_ids) in by_aspect
        records = [index.records[i] for i in batch.image_ids]
        sides = [Letterbox((r.height, r.width), (64, 64)).size for r in records]
        canvas = tuple(batch.images.shape[2:])
        assert canvas == tuple(-(-max(s) // 16) * 16 for s in zip(*sides, strict=True))
        assert_letterboxed(index, [batch], partial(Letterbox, dst=canvas, long_side=64))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_file_is_a_one_line_user_error(make_index, workers):
    index = make_index()
    index.records[4].path.unlink()
    loader = TrainLoader(index, config(workers=workers), load_hyp("no-augmentation"))
    with pytest.raises(UserError, match=r"4\.png: unreadable: No such file") as caught:
        epoch_of(loader)
    assert "\n" not in str(caught.value)
    del caught  # its traceback would keep the loader in a cycle
    with pytest.raises(UserError, match=r"4\.png"):
        list(ValLoader(index, config(workers=workers)))


def test_workers_end_at_once_after_an_error(make_index):
    """Torch waits ten seconds for each where its iterator is in a reference cycle."""
    index = make_index()
    index.records[4].path.unlink()
    loader = TrainLoader(index, config(workers=1), ALL)
    gc.collect()
    with contextlib.suppress(UserError):
        epoch_of(loader)
    workers = list(loader._loader._iterator._workers)
    start = time.monotonic()
    del loader
    gc.collect()
    assert time.monotonic() - start < 5
    assert not any(worker.is_alive() for worker in workers)


def wait_for_a_batch(loader):
    assert loader._loader._iterator._worker_result_queue._reader.poll(60)


def test_workers_go_on_with_the_next_epoch_two_batches_each(make_index, monkeypatch):
    monkeypatch.setattr(store_module, "free_memory", lambda: 0)  # no image is kept
    index = make_index(12)
    loader = TrainLoader(index, config(workers=1, batch_size=2), ALL, epochs=2)
    for epoch in range(2):
        expected = epoch_of(TrainLoader(index, config(batch_size=2), ALL), epoch)
        assert_equal(expected, epoch_of(loader, epoch))
    assert loader._loader._iterator._tasks_outstanding == 0  # nothing for an epoch that is not run
    assert len(epoch_of(loader, 0)) == 6
    wait_for_a_batch(loader)
    for record in index.records:
        record.path.unlink()
    made = []
    with pytest.raises(UserError, match="unreadable: No such file"):
        made.extend(loader.batches(1))  # its batches up to the error
    assert 1 <= len(made) <= 2
    assert_equal(expected[: len(made)], made)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
@pytest.mark.slow
def test_other_start_methods_give_the_same(make_index, start):
    index = make_index()
    loader = TrainLoader(index, config(workers=1, cache="ram"), ALL)
    loader._loader.multiprocessing_context = start
    assert_equal(epoch_of(TrainLoader(index, config(), ALL), 1), epoch_of(loader, 1))
    assert_equal([*ValLoader(index, config())], [*ValLoader(index, config(workers=1))])


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_has_each_image_once_letterboxed(make_index, rect, workers):
    def geometry(size):
        return Letterbox.rect(size, 64, 32) if rect else Letterbox(size, (64, 64))

    index = make_index(9)
    batches = ValLoader(index, config(rect=rect, batch_size=2, workers=workers))
    first = list(batches)
    assert len(first) == len(batches)
    assert max(map(len, first)) == 2
    assert sorted(sum(ids(first), ())) == list(range(9))
    assert_letterboxed(index, first, geometry, area=True)
    for batch in first:
        sources = [(index.records[i].height, index.records[i].width) for i in batch.image_ids]
        assert batch.letterboxes == tuple(map(geometry, sources))
    assert_equal(first, list(batches))


def test_validation_can_start_ahead(make_index):
    index = make_index(2)
    loader, expected = ValLoader(index, config(workers=1)), list(ValLoader(index, config()))
    for _ in range(2):
        loader.start()
        loader.start()
        assert_equal(expected, list(loader))
    loader.start()
    wait_for_a_batch(loader)
    index.records[0].path.unlink()
    assert_equal(expected, list(loader))


def test_validation_deals_images_to_ranks_and_fills_batches(make_index):
    index = make_index(9)
    assert ids(ValLoader(index, config(batch_size=4))) == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    for rank, expected in ((0, [0, 2, 4, 6, 8]), (1, [1, 3, 5, 7])):
        share = ids(ValLoader(index, config(rank=rank, world_size=2, rect=True)))
        assert sorted(sum(share, ())) == expected
    empty = ValLoader(make_index(1), config(rank=1, world_size=2, workers=1))
    assert len(empty) == 0
    assert list(empty) == []


# images decoded once, and composed on the device


def pooled(monkeypatch, pool=4):
    """Mosaics of the last 4 samples; the list of files that this process reads from now on."""
    monkeypatch.setattr("data.loading.loader.POOL", pool)
    files = []
    read = store_module.read_bytes
    monkeypatch.setattr(
        store_module, "read_bytes", lambda file: files.append(Path(file).stem) or read(file)
    )
    return files


@pytest.mark.parametrize("workers", [1, 3])
def test_mosaics_of_recent_images_are_the_same_for_any_workers_and_start(
    make_index, monkeypatch, workers
):
    pooled(monkeypatch)
    index = make_index(11)
    alone = TrainLoader(index, config(), ALL)
    many = TrainLoader(index, config(workers=workers), ALL)
    for epoch in (0, 1, 2):
        full = epoch_of(alone, epoch)
        assert_equal(full, epoch_of(many, epoch))
        fresh = TrainLoader(index, config(workers=workers), ALL)
        assert_equal(full[2:], epoch_of(fresh, epoch, start_step=2))


def test_each_image_is_decoded_once_per_epoch(make_index, monkeypatch):
    files = pooled(monkeypatch)
    loader = TrainLoader(make_index(50), config(batch_size=5), replace(ALL, mosaic=1.0))
    for epoch in range(3):
        files.clear()
        epoch_of(loader, epoch)
        assert sorted(files) == sorted(map(str, range(50)))


AMOUNTS = {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}  # noise: HSV turns one level into many
WHOLE = replace(ALL, copy_paste=0.0, **AMOUNTS)


@pytest.mark.parametrize(
    "hyp", [WHOLE, replace(WHOLE, mixup=0.0, perspective=0.0, degrees=0, shear=0)]
)
@pytest.mark.parametrize(("cache", "slots"), [("none", 4), ("device", 11)])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_composed_on_the_device_are_the_same(
    make_index, monkeypatch, device, hyp, cache, slots, workers
):
    files = pooled(monkeypatch)
    index = make_index(11)
    plain = TrainLoader(index, config(cache="none"), hyp)
    expected = {epoch: epoch_of(plain, epoch) for epoch in range(3)}
    files.clear()
    settings = config(cache=cache, workers=workers, on_device=True, device_memory=1 << 20)
    loader = TrainLoader(index, settings, hyp, mosaic_epochs=2)
    assert loader.slots == slots
    images = DeviceImages(loader.slots, 64, device)
    for epoch, start in ((0, 0), (1, 0), (0, 1), (1, 2)):
        sources = (batch.to(device) for batch in loader.batches(epoch, start))
        found = [batch.to(torch.device("cpu")) for batch in images.composed(sources)]
        assert ids(found) == ids(expected[epoch][start:])
        for ours, theirs in zip(found, expected[epoch][start:], strict=True):
            assert all(map(torch.equal, vars(ours.targets).values(), vars(theirs.targets).values()))
            difference = (ours.images.int() - theirs.images.int()).abs()
            assert (difference > 2).float().mean() < 0.02
            assert difference.float().mean() < 0.5
    if not workers:  # the whole set once, or each image once in an epoch and those before a start
        assert len(files) <= 2 * 11 + 11 if cache == "device" else 4 * 11 + 2 * 4

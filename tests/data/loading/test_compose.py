"""compose draws what the transforms on the CPU draw, by the same draws."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from benchmarks.launches import Operators
from data.loading import compose as module
from data.loading.compose import Plan, compose, inverse_of
from data.loading.sample import Sample
from data.loading.transforms import (
    flip,
    hsv,
    hsv_gains,
    mixup,
    mosaic4,
    mosaic_centre,
    random_matrix,
    warp,
)
from utils.boxes import GREY, Letterbox
from utils.hyp import load_hyp
from utils.images import read_image
from utils.seeding import generator

NONE = load_hyp("no-augmentation")
HSV = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4}
ZOOM = {"scale": 0.5, "translate": 0.1}
SIZE = 128
CASES = {
    "letterbox": {},
    "letterbox zoomed": {"scale": 0.9, "translate": 0.5},
    "letterbox tilted": {"perspective": 0.001, "degrees": 180.0, "translate": 0.5},
    "mosaic": {"mosaic": 1.0},
    "mosaic zoomed": {"mosaic": 1.0, **ZOOM},
    "mosaic enlarged and shrunk": {"mosaic": 1.0, "scale": 0.99, "translate": 0.1},
    "mosaic out of view": {"mosaic": 1.0, "scale": 0.9, "translate": 1.0},
    "turned": {"mosaic": 1.0, "degrees": 45.0, **ZOOM},
    "sheared": {"mosaic": 1.0, "shear": 30.0, **ZOOM},
    "tilted": {"mosaic": 1.0, "perspective": 0.001, "degrees": 20.0, "scale": 0.9},
    "mixup": {"mosaic": 1.0, "mixup": 1.0, **ZOOM},
    "mixup turned": {"mosaic": 1.0, "mixup": 1.0, "degrees": 10.0},
    "hsv": HSV,
    "hsv large": {"mosaic": 1.0, "hsv_h": 0.5, "hsv_s": 0.9, "hsv_v": 0.9},
    "hsv largest": {"hsv_h": 1.0, "hsv_s": 1.0, "hsv_v": 1.0},
    "default": {"mosaic": 1.0, **ZOOM, **HSV},
    "all": {"mosaic": 1.0, "mixup": 1.0, "degrees": 10.0, "shear": 5.0, **ZOOM, **HSV},
}


def synthetic():
    """Images of long side SIZE: smooth colours, and noise as the hardest to interpolate."""
    rng, images = generator(0), []
    for number, (height, width) in enumerate([(128, 96), (77, 128), (128, 128), (51, 128)]):
        cells = (height, width) if number == 2 else (height // 16, width // 16)
        pixels = rng.integers(0, 256, (*cells, 3), dtype=np.uint8)
        images.append(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC))
    return images


@pytest.fixture(scope="module")
def real(shared):
    files = sorted((shared / "datasets" / "coco128").rglob("*.jpg"))[:12]
    if not files:
        pytest.skip("../shared has no coco128")
    images = [read_image(file) for file in files]
    geometries = [Letterbox(image.shape[:2], (SIZE, SIZE)).size for image in images]
    return [cv2.resize(i, g[::-1]) for i, g in zip(images, geometries, strict=True)]


def slots_of(images):
    """(R, SIZE, SIZE, 3), noise where no image lies."""
    slots = generator(1).integers(0, 256, (len(images), SIZE, SIZE, 3), dtype=np.uint8)
    for slot, image in zip(slots, images, strict=True):
        slot[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(slots)


class Recipe:
    """The loader's recipe on pixels alone, which also writes down its plan."""

    def __init__(self, images, hyp, size, samples, seed=0):
        self.images, self.hyp, self.size = images, hyp, size
        self.plan = Plan.blank(samples, 2 if hyp.mixup else 1)
        self.rng = generator(seed)
        rows = [self.draw(row, ud=row % 2 == 1, lr=row % 4 > 1) for row in range(samples)]
        self.expected = np.stack(rows)

    def draw(self, row, *, ud, lr):
        flips = {"ud": ud, "lr": lr}
        sample = self.mosaic(row, 0, flips) if self.hyp.mosaic else self.letterboxed(row, flips)
        if self.hyp.mixup:
            second = self.mosaic(row, 1, flips)
            share = self.plan.shares[row] = self.rng.beta(32, 32)
            sample = mixup(sample, second, float(share))
        gains = hsv_gains(self.rng, self.hyp)
        self.plan.gains[row] = torch.from_numpy(gains)
        sample = hsv(sample, gains, np.empty_like(sample.image))
        sample = flip(sample, 1) if ud else sample
        return (flip(sample, 0) if lr else sample).image

    def mosaic(self, row, canvas, flips):
        chosen = self.rng.integers(len(self.images), size=4).tolist()
        centre, sides = mosaic_centre(SIZE, self.rng), (2 * SIZE, 2 * SIZE)
        whole = mosaic4([sample_of(self.images[i]) for i in chosen], SIZE, centre)
        tiles = [(i, self.images[i].shape[:2]) for i in chosen]
        return self.warped(row, canvas, whole.image, tiles, centre, flips, sides)

    def letterboxed(self, row, flips):
        chosen = int(self.rng.integers(len(self.images)))
        letterbox = Letterbox(self.images[chosen].shape[:2], self.size, SIZE)
        image = letterbox.apply(self.images[chosen])
        (left, top), (height, width) = letterbox.offset, letterbox.size
        tiles, corner = [(chosen, (height, width))], (left + width, top + height)
        return self.warped(row, 0, image, tiles, corner, flips, self.size)

    def warped(self, row, canvas, image, tiles, centre, flips, sides):
        matrix = random_matrix(sides, self.size, self.rng, self.hyp)
        image = warp(image, matrix, self.size)
        inverse = inverse_of(matrix, self.size, **flips)
        self.plan.place(row, canvas, tiles=tiles, centre=centre, size=sides, inverse=inverse)
        return sample_of(image)


def sample_of(image):
    return Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), 0)


def levels(result):
    """(B, 3, H, W) uint8 -> (B, H, W, 3) as numbers."""
    assert result.dtype == torch.uint8
    return result.cpu().permute(0, 2, 3, 1).numpy().astype(float)


def assert_same_pixels(images, hyp, size, device, samples=8):
    recipe = Recipe(images, hyp, size, samples)
    result = compose(
        slots_of(images).to(device), recipe.plan.each(lambda item: item.to(device)), size
    )
    assert result.shape == (samples, 3, *size)
    assert result.is_contiguous(memory_format=torch.channels_last)
    apart = np.abs(levels(result) - recipe.expected)
    assert np.percentile(apart, 99.5) <= 1
    assert (apart > 2).mean() < 2e-4
    assert apart.mean() < 0.05
    assert (recipe.expected != GREY).mean() > 0.05  # there was something to see
    return apart


@pytest.mark.parametrize("case", CASES)
def test_equals_the_transforms(case, device):
    assert_same_pixels(synthetic(), replace(NONE, **CASES[case]), (SIZE, SIZE), device)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_transforms_on_real_images(case, real, device):
    assert_same_pixels(real, replace(NONE, **CASES[case]), (SIZE, SIZE), device)


@pytest.mark.parametrize("size", [(128, 160), (224, 160)])
@pytest.mark.parametrize("case", ["letterbox zoomed", "default", "turned", "tilted"])
def test_equals_the_transforms_on_rectangles(case, size, device):
    assert_same_pixels(synthetic(), replace(NONE, **CASES[case]), size, device)


@pytest.mark.parametrize("case", ["letterbox", "mosaic"])
def test_what_only_moves_by_whole_pixels_is_an_exact_copy(case, device):
    assert not assert_same_pixels(
        synthetic(), replace(NONE, **CASES[case]), (SIZE, SIZE), device
    ).any()


def test_four_tiles_by_hand(device):
    """A canvas of 4 x 6 with the centre (2, 1); two tiles too small, one missing, one cut."""
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 4, 4, 3) * 10 + 10
    plan = Plan.blank(1)
    tiles = [(0, (4, 1)), (1, (1, 4)), (-1, (3, 3)), (2, (2, 2))]
    plan.place(0, 0, tiles=tiles, centre=(2, 1), size=(4, 6), inverse=np.eye(3))
    result = compose(images.to(device), plan.each(lambda item: item.to(device)), (5, 7))
    expected = [
        [GREY, 10, 20, 20, 20, 20, GREY],
        [GREY, GREY, 30, 30, GREY, GREY, GREY],
        [GREY, GREY, 30, 30, GREY, GREY, GREY],
        [GREY] * 7,
        [GREY] * 7,
    ]
    assert levels(result)[0, ..., 1].tolist() == expected


def test_samples_without_mixup_or_hsv_stay_exact_beside_others():
    images = synthetic()
    plain = Recipe(images, replace(NONE, mosaic=1.0), (SIZE, SIZE), 2)
    mixed = Recipe(images, replace(NONE, **CASES["all"]), (SIZE, SIZE), 2)
    both = mixed.plan
    for name, item in vars(plain.plan).items():
        rows = getattr(both, name)[:1]
        (rows if item.ndim < 3 else rows[:, :1])[:] = item[:1]
    result = levels(compose(slots_of(images), both, (SIZE, SIZE)))
    np.testing.assert_array_equal(result[0], plain.expected[0])
    assert np.abs(result[1] - mixed.expected[1]).mean() < 0.05


def test_the_horizon_is_grey(device):
    """Depth 0 in the first column; others see the image, far or mirrored."""
    plan = Plan.blank(1)
    inverse = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, -0.5]])
    plan.place(0, 0, tiles=[(0, (4, 4))], centre=(4, 4), size=(4, 4), inverse=inverse)
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    result = levels(compose(images.to(device), plan.each(lambda item: item.to(device)), (4, 4)))
    assert (result[0, :, 0] == GREY).all()
    assert (result[0, 1:, 1:] < GREY).all()


def test_pieces_equal_the_whole(monkeypatch):
    images = synthetic()
    plan = Recipe(images, replace(NONE, **CASES["all"]), (64, 96), 5).plan
    whole = compose(slots_of(images), plan, (64, 96))
    monkeypatch.setattr(module, "CHUNK", 2 * 2 * 64 * 96)
    pieces = compose(slots_of(images), plan, (64, 96))
    assert torch.equal(pieces, whole)
    assert pieces.is_contiguous(memory_format=torch.channels_last)


def test_compiles_to_one_graph(monkeypatch):
    """Nothing in it depends on a value, and pieces are for eager use only."""
    images = synthetic()
    plan = Recipe(images, replace(NONE, **CASES["all"]), (48, 64), 3).plan
    expected = compose(slots_of(images), plan, (48, 64))
    monkeypatch.setattr(module, "CHUNK", 1)
    compiled = torch.compile(compose, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(slots_of(images), plan, (48, 64)), expected)


def test_few_operators():
    images = synthetic()
    plan = Recipe(images, replace(NONE, **CASES["all"]), (48, 64), 3).plan
    with Operators() as operators:
        compose(slots_of(images), plan, (48, 64))
    assert sum(operators.names.values()) <= 160
    assert not {"aten._local_scalar_dense.default", "aten.nonzero.default"} & {*operators.names}

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.index.columns import ImageRecord
from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from data.loading.loader import LoaderConfig, ValLoader
from engine.checkpoint import load_detector
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from engine.evaluate.metrics import DetectionMetrics, save_labels, save_metrics, save_predictions
from engine.evaluate.plots import BatchImages, _plot_confusion, save_plots
from engine.evaluate.tta import decode_augmented
from models.builder import build_detector
from models.losses.anchor import AnchorLoss
from models.yaml.parser import load_spec
from utils.drawing import SMALLEST_TILE, color
from utils.errors import UserError
from utils.hyp import Hyperparameters

CPU = torch.device("cpu")
SIZE = 64
COLOURS = ((255, 0, 0), (0, 255, 0))
# (height, width), [(label, x1, y1, x2, y2)]: sizes that scale by whole numbers
IMAGES = (
    ((64, 64), [(0, 8, 8, 40, 48)]),
    ((64, 64), [(0, 0, 0, 30, 20), (1, 32, 32, 60, 62)]),
    ((128, 64), [(1, 4, 40, 60, 100)]),
    ((64, 128), []),
    ((64, 64), [(1, 10, 20, 50, 60)]),
    ((32, 64), [(0, 10, 4, 30, 28)]),
    ((64, 64), [(1, 2, 2, 40, 12)]),
)


class Finder(nn.Module):
    """Stands in for a detector: finds the extent of what is red (0) or green (1), surely.

    Its boxes and scores are multiplied by `broken`.
    """

    names: tuple[str, ...] = ("red", "green")
    max_stride = 32
    end_to_end = False

    def __init__(self, broken: tuple[float, float] = (1, 1)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.broken = broken
        self.batches: list[Tensor] = []

    @property
    def head(self) -> Finder:
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        assert not self.training
        self.batches.append(images)
        return [images]

    @property
    def input_type(self) -> torch.dtype:
        return self.weight.dtype

    def detect(self, images: Tensor, conf: float) -> tuple[Tensor, Tensor, Tensor]:
        return self.decode(self(images), conf)

    def decode(self, raw: list[Tensor], conf: float) -> tuple[Tensor, Tensor, Tensor]:
        images = raw[0]
        boxes = images.new_zeros(len(images), 2, 4)
        scores = images.new_zeros(len(images), 2, 2)
        for number, image in enumerate(images):
            for label in (0, 1):
                rows, columns = torch.where((image[label] > 0.7) & (image[1 - label] < 0.3))
                if len(rows):
                    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    boxes[number, label] = torch.stack(box).float()
                    scores[number, label, label] = 0.9 - number / 100
        number = torch.arange(len(images), device=images.device).repeat_interleave(2)
        boxes, scores = (item.flatten(0, 1).float() for item in (boxes, scores))
        return number, boxes * self.broken[0], scores * self.broken[1]


def make_index(
    folder: Path, *, labels: tuple[int, ...] = (0, 1), crowd: tuple[int, int] | None = None
) -> DataIndex:
    """The images as files, ids 10, 20, ... backwards, and their boxes of these labels.

    `crowd` (image, box) is a region.
    """
    records = []
    for number, ((height, width), objects) in enumerate(IMAGES):
        pixels = np.full((height, width, 3), 40, dtype=np.uint8)
        for label, x1, y1, x2, y2 in objects:
            pixels[y1:y2, x1:x2] = COLOURS[label]
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), pixels[..., ::-1])
        rows = [row for row in objects if row[0] in labels]
        table = np.array(rows, dtype=np.float32).reshape(-1, 5)
        record = ImageRecord(
            file=str(path),
            height=height,
            width=width,
            image_id=10 * (len(IMAGES) - number),
            boxes=table[:, 1:],
            labels=table[:, 0].astype(np.int64),
            crowd=np.array([crowd == (number, box) for box in range(len(rows))], dtype=bool),
            areas=(table[:, 3:] - table[:, 1:3]).prod(1),
            segments=(None,) * len(rows),
        )
        records.append(record)
    return DataIndex(tuple(records), ("red", "green"), (7, 3), (), "print")


@pytest.fixture
def index(tmp_path):
    (tmp_path / "images").mkdir()
    return make_index(tmp_path / "images")


def loader(index: DataIndex, **changes):
    config = LoaderConfig(image_size=SIZE, batch_size=4, stride=32, workers=0, seed=0)
    return ValLoader(index, replace(config, **changes))


def evaluate_on(device: torch.device, index: DataIndex, **more) -> DetectionMetrics:
    model = (more.pop("model", None) or Finder()).to(device)
    batches = more.pop("batches", None) or loader(index)
    config = more.pop("config", EvalConfig())
    return evaluate(model, batches, index, config=config, device=device, progress=False, **more)


@pytest.fixture
def run(device):
    """evaluate() with the stand-in, the index's own batches and the defaults."""
    return partial(evaluate_on, device)


class TestMetrics:
    def test_everything_found(self, run, index):
        metrics = run(index, model=Finder().train())  # put into eval mode
        assert (metrics.map, metrics.map50, metrics.fitness) == pytest.approx((1, 1, 1))
        assert (metrics.precision, metrics.recall) == (1, 1)
        assert (metrics.images, metrics.instances, metrics.losses) == (7, 7, {})
        assert all(value > 0 for value in metrics.speed)
        ones = ["1.000"] * 4
        assert [line.split() for line in metrics.table().splitlines()] == [
            ["Class", "Images", "Instances", "P", "R", "mAP50", "mAP50-95"],
            ["all", "7", "7", *ones],
            ["red", "3", "3", *ones],
            ["green", "4", "4", *ones],
        ]
        assert len({len(line) for line in metrics.table().splitlines()}) == 1
        records = sorted(index.records, key=lambda record: record.image_id)
        found = metrics.detections  # in the files' own pixels
        for image, label, box in zip(found.image, found.labels, found.boxes, strict=True):
            expected = records[image].boxes[records[image].labels == label][0]
            np.testing.assert_allclose(box, expected, atol=1.01)

    @pytest.mark.parametrize("rect", [False, True])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_metrics_do_not_depend_on_the_batch(self, run, index, batch_size, rect):
        changed = run(index, batches=loader(index, batch_size=batch_size, rect=rect))
        whole = run(index, batches=loader(index, batch_size=7, rect=rect))
        # the stand-in's scores depend on the position in the batch: only the boxes are compared
        np.testing.assert_array_equal(changed.detections.boxes, whole.detections.boxes)
        assert changed.map == whole.map

    def test_classes_without_a_box_are_listed_on_demand_and_in_no_mean(self, run, tmp_path):
        metrics = run(make_index(tmp_path, labels=(0,)))
        assert (metrics.map, metrics.precision) == pytest.approx((1, 1))
        assert len(metrics.table().splitlines()) == 3
        assert metrics.table(absent=True).splitlines()[3].split() == ["green", "0", "0", *"----"]

    def test_a_detection_on_a_crowd_counts_neither_way(self, run, tmp_path):
        metrics = run(make_index(tmp_path, crowd=(1, 1)))
        assert (metrics.instances, metrics.precision) == (6, 1)
        assert metrics.map == pytest.approx(1)

    def test_no_box_in_the_data(self, run, tmp_path, capsys):
        metrics = run(make_index(tmp_path, labels=()))
        assert (metrics.map, metrics.map50, metrics.precision, metrics.fitness) == (0, 0, 0, 0)
        assert metrics.coco["AP"] == -1
        assert "no ground-truth box" in capsys.readouterr().err

    def test_single_class_text_ids_and_augmentation(self, run, index, tmp_path):
        records = tuple(
            replace(r, labels=np.zeros_like(r.labels), image_id=f"b{r.image_id}")
            for r in index.records
        )
        one = replace(index, names=("object",), category_ids=(1,), records=records)
        metrics = run(one, config=EvalConfig(single_cls=True))
        assert metrics.map == pytest.approx(1)
        assert metrics.per_class[0].instances == 7
        save_predictions(metrics, one, tmp_path / "predictions.json")
        rows = json.loads((tmp_path / "predictions.json").read_text())
        assert {row["image_id"] for row in rows} == {f"b{n}0" for n in (1, 2, 3, 5, 6, 7)}
        metrics = run(index, config=EvalConfig(augment=True))
        assert metrics.map50 == pytest.approx(1)
        assert metrics.recall == 1


def test_augmented_views_come_back_to_their_positions(index):
    model = Finder().eval()
    images = next(iter(loader(index))).images.float() / 255
    plain = model.decode([images], 0.0)
    decoded = decode_augmented(model, images, plain, 0.0)
    assert decoded[1].shape == (3 * 8, 4)
    assert [tuple(batch.shape) for batch in model.batches] == [(4, 3, 64, 64)] * 2  # padded
    seen = plain[2].amax(1) > 0
    for view in (1, 2):
        image, boxes, scores = (item[8 * view : 8 * view + 8] for item in decoded)
        assert torch.equal(image, plain[0])
        torch.testing.assert_close(scores, plain[2])
        torch.testing.assert_close(boxes[seen], plain[1][seen], atol=2.5, rtol=0)


class TestModel:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_images_come_in_the_type_of_the_weights(self, run, index, dtype):
        """Half precision is a model of float16: nothing is cast again in each forward pass."""
        model = Finder().to(dtype)
        assert run(index, model=model).map == pytest.approx(1)
        assert {images.dtype for images in model.batches} == {dtype}

    def test_losses_are_means_over_images(self, run, index, device):
        torch.manual_seed(0)
        model = build_detector(load_spec("yolov5n"), classes=2, names=index.names).eval().to(device)
        loss = AnchorLoss(model, Hyperparameters(), image_size=SIZE)
        sums = torch.zeros(3)
        with torch.no_grad():
            for batch in loader(index):  # of 4 and 3 images
                there = batch.to(device)
                _, parts = loss(model(there.images.float() / 255), there.targets)
                sums += parts.cpu() * len(batch)
        metrics = run(index, model=model, loss=loss)
        means = dict(zip(("box", "obj", "cls"), (sums / 7).tolist(), strict=True))
        assert metrics.losses == pytest.approx(means, rel=1e-4)

    def test_what_is_not_finite_is_named(self, run, index):
        model = Finder()
        model.weight.data[:] = torch.nan
        with pytest.raises(UserError, match="non-finite weights"):
            run(index, model=model)
        for broken in (Finder((torch.inf, 1)), Finder((1, torch.nan))):
            with pytest.raises(UserError, match=r"images/0\.png: the model's outputs are not fin"):
                run(index, model=broken)

    def test_other_names_are_reported_and_a_loader_that_forgets_images(self, run, index, capsys):
        for names, text in (
            (("red", "blue"), "first 'blue' and 'green'; classes are compared by their numbers\n"),
            (("green", "red"), "the metrics are wrong: the same names are in another order"),
            (("0", "1"), ""),
        ):
            model = Finder()
            model.names = names  # numbers: a model without names
            assert run(index, model=model).map == pytest.approx(1)
            error = capsys.readouterr().err
            assert text in error
            assert bool(text) == bool(error)
        with pytest.raises(RuntimeError, match="delivered 4 of 7 images"):
            run(index, batches=list(loader(index))[:1])


class TestFiles:
    @pytest.fixture
    def metrics(self, index):
        return evaluate_on(CPU, index)

    def test_predictions_and_metrics(self, metrics, index, tmp_path):
        save_predictions(metrics, index, tmp_path / "predictions.json")
        rows = json.loads((tmp_path / "predictions.json").read_text())
        assert len(rows) == 7
        first = next(row for row in rows if row["image_id"] == 70)  # the first file
        assert first["category_id"] == 7  # red
        assert first["bbox"] == pytest.approx([8, 8, 32, 40], abs=0.01)
        assert 0 < first["score"] <= 1
        nothing = evaluate_on(CPU, index, config=EvalConfig(conf=0.95))
        assert len(nothing.detections) == 0
        save_metrics(nothing, tmp_path / "metrics.json", {"conf": 0.95})
        document = json.loads((tmp_path / "metrics.json").read_text())
        assert (document["map"], document["precision"], document["recall"]) == (0, 0, 0)
        assert (document["settings"], document["losses"]) == ({"conf": 0.95}, None)
        assert document["per_class"][0]["name"] == "red"
        assert len(document["coco"]) == 12
        assert set(document["speed_ms"]) == {"pre", "inference", "nms"}
        losses = replace(nothing, losses={"box": 1, "side": 2}).to_dict()["losses"]
        assert losses == {"box": 1, "side": 2}

    def test_labels(self, metrics, index, tmp_path):
        folder = tmp_path / "labels"
        save_labels(metrics, index, folder, scores=True)
        assert sorted(p.name for p in folder.iterdir()) == [f"{number}.txt" for number in range(7)]
        label, *values, score = (folder / "0.txt").read_text().split()
        assert label == "0"
        expected = [24 / 64, 28 / 64, 32 / 64, 40 / 64]
        assert [float(value) for value in values] == pytest.approx(expected, abs=1e-4)
        assert float(score) == pytest.approx(0.9, abs=0.05)
        assert (folder / "3.txt").read_text() == ""
        save_labels(metrics, index, folder)
        assert len((folder / "0.txt").read_text().split()) == 5

    def test_labels_stay_in_their_folder_whatever_the_images_are_called(
        self, metrics, index, tmp_path
    ):
        """Equal names in different folders stay apart, too."""
        before = sorted(tmp_path.iterdir())
        paths = [tmp_path / "set" / folder / "same.jpg" for folder in "abcdefg"]
        paths[0] = tmp_path / "set" / ".." / ".." / tmp_path.name / "mine" / "a.jpg"
        moved = [replace(r, file=str(p)) for r, p in zip(index.records, paths, strict=True)]
        save_labels(metrics, replace(index, records=tuple(moved)), tmp_path / "run" / "labels")
        assert len(list((tmp_path / "run" / "labels").rglob("*.txt"))) == 7
        assert (tmp_path / "run" / "labels" / "mine" / "a.txt").is_file()
        assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "run"])

    def test_a_class_name_cannot_forge_a_row(self, metrics):
        named = replace(metrics.per_class[0], name="a\nb\x1b[31m", instances=1)
        table = replace(metrics, per_class=(named,)).table()
        assert len(table.splitlines()) == 3
        assert "a b [31m" in table

    def test_plots(self, index, tmp_path):
        """Also of a class whose letters the plots' font lacks, without a warning."""
        named = replace(index, names=("red", "\u884c\u4eba"))
        images = BatchImages(named)
        metrics = evaluate_on(CPU, named, images=images, batches=loader(index, batch_size=2))
        save_plots(metrics, named, images, tmp_path)
        curves = [f"{name}_curve.png" for name in ("PR", "P", "R", "F1")]
        batches = [f"val_batch{n}_{kind}.jpg" for n in range(3) for kind in ("labels", "pred")]
        for name in (*curves, "confusion_matrix.png", *batches):
            assert cv2.imread(str(tmp_path / name)).std() > 5, name
        _plot_confusion(np.eye(4), ("RBC", "WBC", "Platelets"), tmp_path / "matrix.png")
        matrix = cv2.imread(str(tmp_path / "matrix.png"))
        assert all((edge == 255).all() for edge in (matrix[:, :3], matrix[:, -3:]))  # nothing cut
        drawn = cv2.imread(str(tmp_path / "val_batch0_labels.jpg")).astype(int)[..., ::-1]
        assert drawn.shape[0] > SMALLEST_TILE  # enlarged, and with the names of the files
        curve = cv2.imread(str(tmp_path / "PR_curve.png")).astype(int)[..., ::-1]
        for picture in (drawn, curve):  # a class has one colour everywhere
            assert (np.abs(picture - color(0)).max(2) < 60).sum() > 100
        assert (curve == 0).all(2).sum() > 1000  # the mean
        assert not (tmp_path / "val_batch3_pred.jpg").exists()

    def test_thousands_of_classes_have_no_plots(self, metrics, index, tmp_path, capsys):
        """The confusion matrix of 30,000 classes alone would take 7 GB."""
        many = replace(index, names=tuple(map(str, range(30_000))))
        save_plots(metrics, many, BatchImages(many), tmp_path / "none")
        assert "30000 classes" in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


def summary(metrics: DetectionMetrics) -> str:
    return repr((metrics.coco, metrics.precision, metrics.table()))


def one_rank(rank: int, folder: Path) -> None:
    """One of two processes: a good evaluation, then one that fails on rank 1."""
    torch.set_num_threads(1)
    store, timeout = f"file://{folder / 'store'}", timedelta(seconds=120)
    dist.init_process_group("gloo", store, timeout=timeout, rank=rank, world_size=2)
    (folder / str(rank)).mkdir()
    index, answers = make_index(folder / str(rank)), []
    for model in (Finder(), Finder((torch.inf if rank == 1 else 1, 1))):
        batches = loader(index, rank=rank, world_size=2, batch_size=2)
        try:
            metrics = evaluate_on(CPU, index, model=model, batches=batches)
            boxes = metrics.detections.image.tolist()
            answers += [len(batches), summary(metrics), boxes, metrics.curves is None]
        except UserError as error:
            answers.append(str(error))
    (folder / f"{rank}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def test_two_ranks(index, tmp_path):
    """Seven images: each once, the same metrics on both ranks; then a failure on one ends both."""
    torch.multiprocessing.spawn(one_rank, (tmp_path,), nprocs=2)
    alone = evaluate_on(CPU, index)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for answer in answers:
        assert answer[:2] == [2, summary(alone)]
        assert answer[4].endswith("1/1.png: the model's outputs are not finite")
    assert answers[0][2:4] == [alone.detections.image.tolist(), False]
    assert answers[1][2:4] == [[], True]  # rank 0 alone has them


def test_bf16_autocast_keeps_ap(shared, tmp_path, monkeypatch):
    """The network in bfloat16, the head's 1x1 in float32: a genuine checkpoint's AP stays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = {"images": "val2017", "annotations": "annotations/instances_val2017.json"}
    path = tmp_path / "coco_tiny.yaml"
    path.write_text(json.dumps({"path": str(shared / "datasets" / "coco_tiny"), "val": source}))
    index = load_split(load_dataset_config(str(path)), "val")
    model = load_detector(str(shared / "weights" / "yolov5n.pt"), device=CPU, fuse=False)
    full = evaluate_on(CPU, index, model=model, batches=loader(index, image_size=320))
    with torch.autocast("cpu", torch.bfloat16):
        raw = model(torch.zeros(1, 3, 64, 64))
        mixed = evaluate_on(CPU, index, model=model, batches=loader(index, image_size=320))
    assert {level.dtype for level in raw} == {torch.float32}
    assert mixed.map == pytest.approx(full.map, abs=0.001)
    assert mixed.map != full.map


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_half_precision_is_close(index):
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = build_detector(load_spec("yolov5n"), classes=2, names=index.names).to(device)
    full = evaluate(model, loader(index), index, config=EvalConfig(), device=device)
    half = evaluate(model.to_half(), loader(index), index, config=EvalConfig(), device=device)
    assert half.map == pytest.approx(full.map, abs=0.01)
    assert all(value > 0 for value in half.speed)

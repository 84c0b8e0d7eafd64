from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import val
from engine.checkpoint import load_checkpoint, model_payload, save_checkpoint
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.errors import UserError

PART = 24  # images of COCO's val2017
# Measured on these images with this evaluator; the whole of coco_tiny val has 0.307.
PART_AP = 0.310
NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def part_of_coco(shared, tmp_path) -> Path:
    """The data set YAML of the first images of coco_tiny's val split, copied."""
    source = shared / "datasets" / "coco_tiny"
    document = json.loads((source / "annotations" / "instances_val2017.json").read_text())
    images = sorted(document["images"], key=lambda image: image["id"])[:PART]
    kept = {image["id"] for image in images}
    document["images"] = images
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    root = tmp_path / "coco"
    (root / "images").mkdir(parents=True)
    for image in images:
        shutil.copy(source / "val2017" / image["file_name"], root / "images")
    (root / "val.json").write_text(json.dumps(document))
    (root / "coco.yaml").write_text("val: {images: images, annotations: val.json}\n")
    return root / "coco.yaml"


def test_genuine_weights_on_real_images(part_of_coco, shared, tmp_path, capsys):
    flags = ["--weights", shared / "weights" / "yolov5n.pt", "--data", part_of_coco, "--img", 640]
    flags += ["--batch", 8, "--workers", 0, "--device", "cpu", "--project", tmp_path / "runs"]
    assert val.main([*map(str, flags), "--save-json", "--noplots"]) == 0
    folder = tmp_path / "runs" / "exp"
    document = json.loads((folder / "metrics.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        reference = COCO(str(part_of_coco.parent / "val.json"))
        found = reference.loadRes(str(folder / "predictions.json"))
        evaluation = COCOeval(reference, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    np.testing.assert_allclose(list(document["coco"].values()), evaluation.stats, rtol=0, atol=1e-9)
    assert document["map"] == pytest.approx(PART_AP, abs=0.004)
    assert (document["settings"]["image_size"], document["settings"]["conf"]) == (640, 0.001)
    assert document["images"] == PART
    out = capsys.readouterr().out
    assert lines.getvalue()[lines.getvalue().index(" Average") :] in out
    assert "ms pre-process" in out
    assert str(folder) in out


@pytest.fixture
def small(tmp_path) -> list[str]:
    """Flags for a random detector of 3 classes and five noisy images with YOLO labels."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(5):
        pixels = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / f"{number}.png"), pixels)
        (root / "labels" / f"{number}.txt").write_text(f"{number % 2} 0.5 0.5 0.4 0.4\n")
    names = ", ".join(NAMES)
    (root / "data.yaml").write_text(f"val: images\ntest: images\nnames: [{names}]\n")
    flags = ["--weights", save_random(tmp_path / "weights.pt", NAMES), "--data", root / "data.yaml"]
    flags += ["--img", 64, "--workers", 0, "--device", "cpu", "--batch", 2]
    return [*map(str, flags), "--project", str(tmp_path / "runs")]


def save_random(path: Path, names: tuple[str, ...]) -> Path:
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n"), classes=len(names), names=names)
    save_checkpoint(path, model_payload(model))
    return path


def test_size_and_data_of_the_checkpoint(small, tmp_path, monkeypatch, capsys):
    """Without --img and --data; the path of the data is that of the run's opt.yaml."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "train" / "exp"
    (run / "weights").mkdir(parents=True)
    content = load_checkpoint("weights.pt")
    best = run / "weights" / "best.pt"
    save_checkpoint(best, {**content, "config": {"imgsz": 96, "data": "data.yaml"}})
    flags = ["--weights", str(best), "--workers", "0", "--device", "cpu", "--noplots"]
    with pytest.raises(
        UserError, match=r"trained on data\.yaml, which is not found here; name .* --data"
    ):
        val.main(flags)
    data = tmp_path / "data" / "data.yaml"
    (run / "opt.yaml").write_text(f"data: {data}\n")
    val.main(flags)
    out = capsys.readouterr().out
    expected = f"--img 96 (the size of its training), --data {data} (the data of its training)"
    assert f"{best}: {expected}\n" in out
    settings = json.loads((tmp_path / "runs/val/exp/metrics.json").read_text())["settings"]
    assert (settings["image_size"], settings["data"]) == (96, str(data))
    with pytest.raises(UserError, match=r"weights\.pt: it does not state what it was trained on"):
        val.main(["--weights", "weights.pt", "--device", "cpu"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):  # before the weights are read
        val.main(["--weights", "missing.pt", "--project", "file", "--device", "cpu"])


def test_all_files(small, tmp_path, capsys):
    val.main([*small, "--save-txt", "--save-conf", "--save-json", "--verbose", "--task", "test"])
    folder = tmp_path / "runs" / "exp"
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.json", "predictions.json", "labels", "confusion_matrix.png"),
        *(f"{name}_curve.png" for name in ("PR", "P", "R", "F1")),
        *(f"val_batch{n}_{kind}.jpg" for n in range(3) for kind in ("labels", "pred")),
    }
    document = json.loads((folder / "metrics.json").read_text())
    assert [row["name"] for row in document["per_class"]] == list(NAMES)
    assert document["per_class"][2]["ap"] is None  # no object of class c
    assert document["settings"]["split"] == "test"
    assert len(document["settings"]["fingerprint"]) > 8
    predictions = json.loads((folder / "predictions.json").read_text())
    texts = [path.read_text() for path in (folder / "labels").iterdir()]
    rows = [line.split() for line in "".join(texts).splitlines()]
    assert len(rows) == len(predictions)
    assert {len(row) for row in rows} == {6}
    out = capsys.readouterr().out
    assert ["c", "0", "0", *"----"] in [line.split() for line in out.splitlines()]  # --verbose
    assert "task=test" in out  # what is not the default


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_plot_and_keeps_the_numbers(small, tmp_path):
    folder = tmp_path / "runs" / "exp"
    folder.mkdir(parents=True)
    (folder / "F1_curve.png").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"F1_curve\.png: cannot write: No space left"):
        val.main([*small, "--exist-ok", "--save-json"])
    assert json.loads((folder / "metrics.json").read_text())["images"] == 5
    assert isinstance(json.loads((folder / "predictions.json").read_text()), list)


def test_speed_without_a_folder_and_on_a_cpu_without_warm_up(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.evaluate.run.warm_up", None)  # calling it would fail
    val.main([*small, "--task", "speed"])
    out = capsys.readouterr().out
    assert "ms inference" in out
    assert "conf 0.25, iou 0.45" in out
    assert not (tmp_path / "runs").exists()


def test_study(small, tmp_path, capsys):
    val.main([*small, "--task", "study", "--study-sizes", "64", "90"])
    with (tmp_path / "runs" / "exp" / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["size"]) for row in rows] == [64, 96]
    assert all(float(row["inference ms"]) > 0 for row in rows)
    assert cv2.imread(str(tmp_path / "runs" / "exp" / "study.png")) is not None
    assert "90 is not a multiple of the stride 32: 96 is used" in capsys.readouterr().err


def test_single_class_of_a_model_with_three(small, tmp_path):
    val.main([*small, "--single-cls", "--noplots", "--save-json"])
    predictions = json.loads((tmp_path / "runs" / "exp" / "predictions.json").read_text())
    assert len({row["category_id"] for row in predictions}) <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--save-conf"], "--save-txt"),
        (["--conf-thres", "1.5"], "conf-thres"),
        (["--task", "study", "--save-json"], "--task study"),
        (["--study-sizes", "64"], "--task study"),
        (["--half"], "CUDA"),
        (["--task", "train"], "train"),
        (["--batch", "0"], "batch-size"),
        (["--weights", "five.pt"], r"5 classes \(v, w, x, \.\.\.\).*3 classes \(a, b, c\)"),
    ],
)
def test_refusals_leave_no_folder(small, tmp_path, flags, message):
    save_random(tmp_path / "five.pt", ("v", "w", "x", "y", "z"))
    flags = [str(tmp_path / item) if item == "five.pt" else item for item in flags]
    with pytest.raises(UserError, match=message):
        val.main([*small, *flags])
    assert not (tmp_path / "runs").exists()

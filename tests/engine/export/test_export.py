"""Exported files give what PyTorch gives, and say what they are."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

import detect
import export
import val
from data.index.dataset import load_dataset_config, load_split
from engine.checkpoint import load_detector, model_payload, save_checkpoint
from engine.export import cached, int8, runtime
from engine.export.config import FORMATS
from engine.export.metadata import Metadata
from engine.export.runtime import load_network, open_exported, without_telemetry
from engine.export.suppression import suppressed
from engine.predict import run as detect_run
from engine.predict.predictor import Predictor
from models.builder import build_detector
from models.detector import Detector
from models.yaml.parser import load_spec
from utils.errors import UserError
from utils.nms import NmsConfig, nms
from utils.seeding import generator

onnxruntime, openvino = map(without_telemetry, ("onnxruntime", "openvino"))
RUNTIMES = {
    "onnx": "onnxruntime float32",
    "openvino": "openvino float32",
    "torchscript": "torchscript float32",
}
CPU = torch.device("cpu")
NAMES = {"onnx": "tiny.onnx", "openvino": "tiny_openvino_model", "torchscript": "tiny.torchscript"}
ALL = NmsConfig(conf=0.001, iou=1.0, max_det=50)  # random weights have near ties


@pytest.fixture(scope="module")
def weights(tmp_path_factory, tiny_model):
    """A checkpoint of random weights with statistics that are not those of the start."""
    torch.manual_seed(0)
    model = build_detector(load_spec(str(tiny_model)), classes=3, names=("a", "b", "c")).train()
    model(torch.rand(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("export") / "tiny.pt"
    save_checkpoint(path, model_payload(model.eval()))
    return path


@pytest.fixture(scope="module")
def files(weights):
    """Fixed files of all formats, for two images of 64 x 96."""
    export.main(
        ["--weights", str(weights), "--include", *FORMATS, "--img", "64", "96", "--batch", "2"]
    )
    return weights.parent


def test_outputs_are_those_of_the_detector(weights, files):
    images = torch.from_numpy(generator(0).random((5, 3, 64, 96), dtype=np.float32))
    model = load_detector(weights, device=CPU)
    with torch.inference_mode():
        boxes, scores = model.head.dense(model(images))
    for name in FORMATS:
        network = open_exported(files / NAMES[name], CPU)  # 5 images, two at a time
        found_boxes, found_scores = network.outputs(images)
        torch.testing.assert_close(found_boxes, boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found_scores, scores, rtol=1e-4, atol=1e-5)
        assert network.names == ("a", "b", "c")
        assert network.runtime == RUNTIMES[name]
        assert (network.metadata.size, network.metadata.batch) == ((64, 96), 2)
        with pytest.raises(UserError, match="takes images of 64 x 96 pixels, not 64 x 64"):
            network.outputs(images[..., :64])
    exact = open_exported(files / NAMES["openvino"], CPU).outputs(images)[0]
    rounded = open_exported(files / NAMES["openvino"], CPU, openvino_precision="bf16")
    assert rounded.runtime == "openvino float32, bf16"
    torch.testing.assert_close(rounded.outputs(images)[0], exact, rtol=0, atol=8)
    assert b"forward" not in (files / "tiny.onnx").read_bytes()  # source lines, with paths


IDENTITY = """
<ir_version: 10, opset_import: ["" : 18]>
network (float[B, N, 4] raw_boxes, float[B, N, C] raw_scores)
=> (float[B, N, 4] boxes, float[B, N, C] scores)
{ boxes = Identity (raw_boxes) scores = Identity (raw_scores) }
"""


@pytest.mark.parametrize(
    ("cells", "conf", "iou", "most"), [(900, 0.4, 0.5, 40), (60, 0.9, 0.3, 300)]
)
def test_suppression_in_the_graph_is_our_own(tmp_path, cells, conf, iou, most):
    random = generator(0)
    corners = random.random((3, cells, 2)) * 90
    boxes = np.concatenate((corners, corners + 5 + 40 * random.random((3, cells, 2))), 2)
    scores = random.random((3, cells, 4)) * (random.random((3, cells, 1)) < 0.7)
    scores[2] = 0  # an image of nothing
    arrays = [boxes.astype(np.float32), scores.astype(np.float32)]
    config = NmsConfig(conf=conf, iou=iou, max_det=most, multi_label=False)
    model = suppressed(onnx.parser.parse_model(IDENTITY), config)
    onnx.save(model, tmp_path / "nms.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "nms.onnx")
    (found,) = session.run(None, dict(zip(("raw_boxes", "raw_scores"), arrays, strict=True)))
    image = torch.arange(3).repeat_interleave(cells)
    own = nms(image, *(torch.from_numpy(a).flatten(0, 1) for a in arrays), config, images=3)
    assert found.shape == (3, min(most, cells), 6)
    assert len(own[0]) == most if cells == 900 else 10 < len(own[0]) < cells
    for rows, kept in zip(found, own, strict=True):
        columns = (kept.boxes, kept.scores[:, None], kept.labels[:, None])
        np.testing.assert_array_equal(rows[: len(kept)], torch.cat(columns, 1).numpy())
        assert not rows[len(kept) :].any()
    opened = openvino.compile_model(
        tmp_path / "nms.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_array_equal(opened(arrays)[0], found)


def test_files_with_suppression_inside_run_everywhere(weights, rectangles, tmp_path, capsys):
    copy = tmp_path / "tiny.pt"
    copy.write_bytes(weights.read_bytes())
    flags = ["--nms", "in-graph", "--conf", "0.001", "--iou", "0.5", "--max-det", "20"]
    export.main(["--weights", str(copy), "--include", "onnx", "openvino", "--img", "64", *flags])
    pictures = [generator(1, i).integers(0, 256, (50, 64, 3), dtype=np.uint8) for i in range(3)]
    settings = replace(ALL, iou=0.5, max_det=20, multi_label=False)
    ours = Predictor(copy, image_size=(64, 64), device="cpu", nms=settings).batch(pictures)
    for file in (NAMES["onnx"], NAMES["openvino"]):
        theirs = Predictor(tmp_path / file, device="cpu", nms=settings).batch(pictures)
        for a, b in zip(ours, theirs, strict=True):
            assert len(a.detections) == 20
            torch.testing.assert_close(a.detections.scores, b.detections.scores, rtol=1e-4, atol=0)
            torch.testing.assert_close(a.detections.boxes, b.detections.boxes, rtol=0, atol=0.01)
    command = ["--weights", str(tmp_path / "tiny.onnx"), "--data", str(rectangles), "--noplots"]
    command += ["--workers", "0", "--project", str(tmp_path / "runs")]
    val.main(command)
    assert " all " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"keeps nothing under 0\.001, so AP would differ"):
        val.main([*command, "--conf", "0.0001"])
    for wrong, cause in (
        (["--conf", "0.4"], "--conf-thres does nothing without --nms in-graph"),
        (["--nms", "in-graph", "--include", "torchscript"], "is for onnx and openvino"),
    ):
        with pytest.raises(UserError, match=cause):
            export.main(["--weights", str(copy), *wrong])


def test_runtimes_report_nothing_to_their_makers():
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    assert "openvino_telemetry.main" not in sys.modules
    assert openvino.tools.ovc.telemetry.__module__ == "openvino.tools.ovc.telemetry_stub"


def test_int8_files_are_near_and_tell_their_ap(weights, rectangles, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "tiny.pt"
    copy.write_bytes(weights.read_bytes())
    formats = ["onnx", *["openvino"] * bool(importlib.util.find_spec("nncf"))]
    words = ["--weights", str(copy), "--img", "64", "--int8", "--data", str(rectangles)]
    export.main([*words, "--include", *formats, "--max-ap-loss", "0.3"])
    told = [float(x) for x in re.findall(r"yaml: (0\.\d{4}), in float32", capsys.readouterr().out)]
    model = load_detector(weights, device=CPU)
    index = load_split(load_dataset_config(str(rectangles)), "val")
    images = (
        torch.stack([batch.images[0] for batch in int8._loader(index, 64, 1, 32)]).float() / 255
    )
    with torch.inference_mode():
        boxes, scores = model.head.dense(model(images))
    for name, ap in zip(formats, told, strict=True):
        network = open_exported(tmp_path / NAMES[name].replace("tiny", "tiny_int8"), CPU)
        assert network.metadata.precision == "int8"
        found_boxes, found_scores = network.outputs(images)
        for found, exact, limit in ((found_boxes, boxes, 4), (found_scores, scores, 0.05)):
            apart = (found - exact).abs()
            assert 0 < apart.mean() < limit / 4
            assert apart.max() < limit
        assert ap == pytest.approx(int8.precision_at(network, index, 64, conf=0.001), abs=5e-5)
    values = iter((0.5, 0.45))
    monkeypatch.setattr(int8, "precision_at", lambda *_, conf: next(values))
    with pytest.raises(UserError, match=r"removed, since it loses 0\.0500 AP, more than --max-ap"):
        export.main([*words, "--max-ap-loss", "0.04"])
    assert not (tmp_path / "tiny_int8.onnx").exists()
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name != "nncf" or None)
    with pytest.raises(UserError, match="missing: pip install nncf"):
        export.main([*words, "--include", "openvino"])
    for wrong in (
        ["--int8"],
        ["--data", "x"],
        [*words[4:], "--half"],
        [*words[4:], "--img", "64", "96"],
    ):
        with pytest.raises(UserError, match="--int8"):
            export.main(["--weights", str(copy), *wrong])


def test_the_free_head_is_exported(tiny_model, tmp_path):
    model = build_detector(load_spec(str(tiny_model), head="free"), classes=3).eval()
    save_checkpoint(tmp_path / "tiny.pt", model_payload(model))
    words = ["--weights", str(tmp_path / "tiny.pt"), "--include", "onnx", "--img", "64"]
    export.main(words)
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        boxes, scores = model.head.dense(model(images))
    network = open_exported(tmp_path / "tiny.onnx", CPU)
    found_boxes, found_scores = network.outputs(images)
    torch.testing.assert_close(found_boxes, boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found_scores, scores, rtol=1e-4, atol=1e-5)


def test_an_end_to_end_head_is_exported_with_its_best_boxes(tiny_model, tmp_path):
    torch.manual_seed(0)
    model = build_detector(load_spec(str(tiny_model), head="free-e2e"), classes=3).eval()
    weights = tmp_path / "tiny.pt"
    save_checkpoint(weights, model_payload(model))
    words = ["--weights", str(weights), "--img", "64", "96", "--include"]
    pictures = [generator(1, i).integers(0, 256, (80, 70, 3), dtype=np.uint8) for i in range(2)]
    flags = {"image_size": (64, 96), "device": "cpu", "conf": 0.001}
    export.main([*words, *FORMATS, "--dynamic"])
    ours = Predictor(weights, **flags).batch(pictures)
    for file in NAMES.values():
        network = open_exported(tmp_path / file, CPU)
        (rows,) = network.outputs(torch.rand(2, 3, 256, 128))
        assert (rows.shape, network.end_to_end) == ((2, 300, 6), True)
        assert (rows[..., 4] > 0).all()
        (rows,) = network.outputs(torch.rand(1, 3, 64, 96))
        assert rows[0, :126, 4].gt(0).all()  # 96 + 24 + 6 points
        assert not rows[0, 126:].any()
        for a, b in zip(ours, Predictor(tmp_path / file, **flags).batch(pictures), strict=True):
            assert len(a.detections) == len(b.detections) == 126
            torch.testing.assert_close(a.detections.scores, b.detections.scores, rtol=1e-4, atol=0)
        with pytest.raises(UserError, match="the end-to-end branch only; export it with --nms"):
            load_network(tmp_path / file, device=CPU, nms=True)


@pytest.mark.parametrize("name", FORMATS)
def test_detections_are_those_of_the_detector(weights, files, name):
    pictures = [generator(1, i).integers(0, 256, (80, 70, 3), dtype=np.uint8) for i in range(3)]
    ours = Predictor(weights, image_size=(64, 96), device="cpu", nms=ALL).batch(pictures)
    theirs = Predictor(files / NAMES[name], device="cpu", nms=ALL).batch(pictures)
    for a, b in zip(ours, theirs, strict=True):
        assert len(a.detections) == 50
        torch.testing.assert_close(a.detections.scores, b.detections.scores, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.detections.boxes[0], b.detections.boxes[0], rtol=0, atol=0.01)
        assert (a.network_size, a.names) == (b.network_size, b.names)


def test_a_dynamic_file_takes_any_size_and_batch(weights, rectangles, tmp_path, capsys):
    copy = tmp_path / "tiny.pt"
    copy.write_bytes(weights.read_bytes())
    export.main(["--weights", str(copy), "--include", *FORMATS, "--dynamic", "--img", "64"])
    capsys.readouterr()
    network, _ = load_network(tmp_path / "tiny.onnx", device=CPU)
    for shape in ((1, 64, 64), (3, 128, 96)):
        boxes, scores = network.outputs(torch.rand(shape[0], 3, *shape[1:]))
        assert (
            boxes.shape[:2] == scores.shape[:2] == (shape[0], 3 * shape[1] * shape[2] * 21 // 1024)
        )
    tables = []
    for file in ("tiny.pt", *NAMES.values()):
        flags = ["--img", "96", "--noplots", "--workers", "0", "--project", str(tmp_path / "runs")]
        val.main(["--weights", str(tmp_path / file), "--data", str(rectangles), *flags, "--rect"])
        tables.append(
            [line.split() for line in capsys.readouterr().out.splitlines() if " all " in line]
        )
    assert tables[0]
    assert all(table == tables[0] for table in tables)


def test_half_takes_half_the_room(weights, files, tmp_path):
    copy = tmp_path / "tiny.pt"
    copy.write_bytes(weights.read_bytes())
    export.main(["--weights", str(copy), "--img", "64", "96", "--batch", "2", "--half"])
    sizes = [(folder / "tiny.onnx").stat().st_size for folder in (tmp_path, files)]
    assert sizes[0] < 0.6 * sizes[1]
    images = torch.rand(2, 3, 64, 96)
    exact, rounded = (
        open_exported(f / "tiny.onnx", CPU).outputs(images) for f in (files, tmp_path)
    )
    torch.testing.assert_close(rounded[1], exact[1], rtol=0, atol=0.02)


def test_mistakes_are_one_line(weights, files, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give --weights, or --cfg"):
        export.main([])
    with pytest.raises(UserError, match="--img 65: not a multiple of the stride 32; use --img 96"):
        export.main(["--weights", str(weights), "--img", "65"])
    with pytest.raises(UserError, match="no such file"):
        load_network(tmp_path / "missing.onnx", device=CPU)
    for name in ("a.onnx", "a.torchscript", "a.xml"):
        (tmp_path / name).write_text("rubbish")
        with pytest.raises(UserError, match=f"{name}: cannot be opened") as caught:
            load_network(tmp_path / name, device=CPU)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"0 \.xml files"):
        load_network(files.parent, device=CPU)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"; use .*weights.best\.pt$"):
        load_network(tmp_path / "weights", device=CPU)
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="missing: pip install onnx onnxscript openvino"):
        export.main(["--weights", str(weights), "--include", "openvino"])
    with pytest.raises(UserError, match="missing: pip install onnxruntime"):
        load_network(files / "tiny.onnx", device=CPU)


def test_metadata_of_others_is_refused():
    own = Metadata(("a",), 32, (64, 96), None, "Detect", "shapes", suppression=NmsConfig(conf=0.4))
    assert Metadata.from_text(own.to_text(), "f") == own
    assert Metadata.from_text(replace(own, size=None, batch=3).to_text(), "f").batch == 3
    values = json.loads(own.to_text())
    wrong = [json.dumps({**values, **change}) for change in ({"stride": "x"}, {"names": []})]
    for text in (None, "", "[]", "{", *wrong):
        with pytest.raises(UserError, match=r"f: not written by FeatherDet's export\.py"):
            Metadata.from_text(text, "f")
    del values["suppression"]  # files of the first format have none
    with pytest.raises(UserError, match="f: written by another version of FeatherDet; export it"):
        Metadata.from_text(json.dumps({**values, "format": "featherdet-export-1"}), "f")


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_detection_on_a_cpu_takes_the_fastest_runtime(
    weights, rectangles, tmp_path, monkeypatch, capsys, cache_home
):
    monkeypatch.setattr(detect_run, "MANY", 5)
    folder, columns = rectangles.parent / "val", []
    for chosen in ("torch", "onnxruntime", "openvino", "auto", "auto"):
        flags = [
            "--weights",
            str(weights),
            "--source",
            str(folder),
            "--img",
            "64",
            "--conf",
            "0.001",
        ]
        flags += ["--iou", "1", "--max-det", "9", "--runtime", chosen, "--nosave", "--save-csv"]
        detect.main([*flags, "--project", str(tmp_path), "--name", chosen, "--exist-ok"])
        rows = (tmp_path / chosen / "predictions.csv").read_text().splitlines()
        columns.append([float(row.split(",")[2]) for row in rows[1:]])
        np.testing.assert_allclose(columns[-1], columns[0], atol=2e-4)
    text = capsys.readouterr().out
    assert text.count("exporting once for onnxruntime (") == text.count("exporting once") == 1
    assert (
        len(
            re.findall(
                r"runs in \w+ \(an image of 64 pixels: \w+ \d+ ms, \w+ \d+ ms, \w+ \d+ ms", text
            )
        )
        == 2
    )
    assert len([*cache_home.rglob("*.onnx")]) == 1


def test_detection_goes_on_in_pytorch_where_the_export_fails(
    weights, tmp_path, monkeypatch, capsys, cache_home
):
    def fail(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(cached, "onnx_bytes", fail)
    assert isinstance(Predictor(weights, device="cpu", runtime="auto").model, Detector)
    assert (
        "runs in PyTorch, the export failed: RuntimeError: no such operator"
        in capsys.readouterr().err
    )
    with pytest.raises(RuntimeError, match="no such operator"):
        Predictor(weights, device="cpu", runtime="onnxruntime")
    built = load_detector(weights, device="cpu")
    with pytest.raises(UserError, match="--runtime openvino is for checkpoints on a CPU"):
        Predictor(built, device="cpu", runtime="openvino")
    monkeypatch.setattr(cached.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript openvino"):
        Predictor(weights, device="cpu", runtime="openvino")


def test_a_model_file_is_exported_with_random_weights(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export.main(["--cfg", str(tiny_model), "--img", "64"])
    assert (tmp_path / "tiny.onnx").is_file()
    assert "outputs differ from PyTorch's by" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        f"yolov5n{k}"
        for k in (
            "",
            "-ghost",
            "-osa",
            "-shuffle",
            "-mixconv",
            "-ghostnet",
            "-vovnet",
            "-shufflenetv2",
            "-mixnet",
        )
    ],
)
def test_the_shipped_n_models(name, tmp_path, monkeypatch):
    """export.py itself compares each file with PyTorch."""
    monkeypatch.chdir(tmp_path)
    export.main(["--cfg", name, "--include", *FORMATS, "--img", "128", "--dynamic"])

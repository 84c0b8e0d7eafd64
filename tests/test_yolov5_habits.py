"""The command lines of YOLOv5's README and wiki work, or are refused with what to type instead."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from data.sources.locate import resolve
from engine.compare.config import CompareConfig
from engine.evaluate.config import ValConfig
from engine.export.config import ExportConfig
from engine.predict.config import DetectConfig
from engine.train.config import TrainConfig
from models.weights.restricted import open_pickled
from utils.config import flag, parse_given
from utils.errors import UserError
from utils.foreign import INSTEAD
from utils.hyp import Hyperparameters, load_hyp

CONFIGS = {
    "train.py": TrainConfig,
    "val.py": ValConfig,
    "detect.py": DetectConfig,
    "compare.py": CompareConfig,
    "export.py": ExportConfig,
}

WORKING = """
train.py --data coco.yaml --epochs 300 --weights '' --cfg yolov5n.yaml --batch-size 128
train.py --img 640 --batch 16 --epochs 3 --data coco128.yaml --weights yolov5s.pt --cache
train.py --img 640 --epochs 3 --data coco128.yaml --weights yolov5s.pt --cache ram
train.py --data coco.yaml --weights yolov5s.pt --img 640 --device 0,1
train.py --batch 64 --data coco.yaml --weights yolov5s.pt --device 0 --sync-bn
train.py --data coco128.yaml --batch-size -1
train.py --batch 16 --weights yolov5m.pt --data coco.yaml --epochs 50 --freeze 10
train.py --data coco.yaml --weights yolov5m.pt --freeze 0 1 2 3 4 5 6 7 8 9
train.py --batch 64 --cfg yolov5x6.yaml --data Objects365.yaml --hyp hyp.Objects365.yaml
train.py --batch 32 --weights yolov5s.pt --data VOC.yaml --img 512 --epochs 50 --hyp hyp.VOC.yaml
train.py --data coco.yaml --cfg yolov5x.yaml --weights '' --hyp data/hyps/hyp.scratch-high.yaml
train.py --resume
train.py --resume runs/train/exp/weights/last.pt
train.py --rect --nosave --noval --noautoanchor --noplots --single-cls --exist-ok
train.py --multi-scale --data coco.yaml
train.py --optimizer AdamW --workers 4 --project runs/x --name y --cos-lr --label-smoothing 0.1
train.py --patience 50 --save-period 10 --seed 1
val.py --weights yolov5n.pt --data coco.yaml --img 640 --conf 0.001 --iou 0.65
val.py --weights yolov5n.pt --data coco.yaml --img 640 --task speed --batch 1
val.py --weights yolov5s.pt --data coco.yaml --img 832 --augment --half
val.py --weights yolov5x.pt --data coco.yaml --img 640 --half --save-json --verbose --task test
val.py --data coco128.yaml --weights yolov5s.pt --single-cls --max-det 300 --save-txt --save-conf
export.py --weights yolov5s.pt --include torchscript onnx openvino --img 640 --batch 1 --half
export.py --weights yolov5s.pt --include onnx --imgsz 480 640 --dynamic
detect.py --weights yolov5s.onnx --source 0
detect.py --weights yolov5s.pt --source 0
detect.py --weights yolov5s.pt --source img.jpg
detect.py --weights yolov5s.pt --source path/*.jpg --img 832 --augment
detect.py --weights yolov5s.pt --source rtsp://example.com/media.mp4 --view-img
detect.py --weights yolov5s.pt --img 640 --conf 0.25 --source data/images
detect.py --weights yolov5s.pt --source data/images --imgsz 640 480 --conf-thres 0.3 --iou 0.5
detect.py --weights yolov5s.pt --source data/images --classes 0 2 --agnostic-nms --max-det 10
detect.py --weights yolov5s.pt --source a --save-txt --save-conf --save-csv --save-crop --nosave
detect.py --weights yolov5s.pt --source a --line-thickness 2 --hide-labels --hide-conf --half
detect.py --weights yolov5s.pt --source a --vid-stride 3 --data coco128.yaml --exist-ok
""".strip().splitlines()

REFUSED = {
    "train.py --data coco128.yaml --weights yolov5s.pt --cache --evolve": "write a few --hyp files",
    "train.py --evolve 300": "not in FeatherDet",
    "train.py --image-weights --data coco.yaml": "each epoch takes each image once",
    "train.py --quad": "use --multi-scale",
    "train.py --adam": "use --optimizer Adam",
    "train.py --linear-lr": "decays linearly",
    "train.py --notest": "use --noval",
    "train.py --cache-images": "use --cache ram",
    "train.py --entity me --upload_dataset val --bbox_interval 1": "Weights & Biases",
    "train.py --artifact_alias latest": "Weights & Biases",
    "train.py --local_rank 0": "torchrun tells each process its rank",
    "train.py --lr0 0.1": "lr0 is set in a hyper-parameter file; name it with --hyp",
    "train.py --batch_size 8": ": use --batch-size (",
    "train.py --qwertz": "unknown argument '--qwertz' (see --help)",  # nothing is like it
    "train.py model=yolov5n.yaml data=coco128.yaml": "flags here; use --cfg yolov5n.yaml",
    "train.py data=coco128.yaml model=yolov5n.pt": "flags here; use --data coco128.yaml",
    "val.py --save-hybrid": "use --save-txt",
    "val.py --dnn": "OpenCV's networks are not used",
    "val.py model=yolov5n.pt": "flags here; use --weights yolov5n.pt",
    "export.py --weights yolov5s.pt --include onnx --simplify": "apply onnxsim",
    "export.py --weights yolov5s.pt --opset 12": "of opset 18",
    "detect.py --update": "nothing is uploaded or downloaded",
    "detect.py --visualize": "feature maps",
    "detect.py --line 2": "did you mean '--line-thickness'?",
    "detect.py --sorce a": "did you mean '--source'?",
    "detect.py predict model=yolov5n.pt": "unknown argument 'predict' (see --help)",
    "detect.py --weights a.pt b.pt --source c": "one checkpoint at a time",
    "detect.py show=True": "use --view-img",
    "train.py --data coco.yaml --img-size 640 640": "--img is one number here",
    "val.py --weights a.pt --imgsz 640 640": "--img is one number here",
    "val.py --weights a.pt b.pt --data coco.yaml": "one checkpoint at a time",
    "train.py --logdir runs": "use --project and --name",
    "detect.py --cfg yolov3.cfg --weights a.pt --source b": "a checkpoint holds its model",
    "detect.py --names coco.names": "a checkpoint holds its class names",
    "detect.py --save-img": "unless --nosave is given",
    "detect.py --save-json": "val.py has it",
    "export.py --weights yolov5s.pt --include onnx --device 0": "this runs on the CPU",
    "export.py --weights yolov5s.pt --topk-all 100": "no TensorFlow files",
    "detect.py half=True": "flags here; use --half (",
}


def parsed(line: str) -> tuple[object, frozenset[str]]:
    script, *argv = shlex.split(line)
    return parse_given(CONFIGS[script], argv, prog=script, description="")


PAGE = (Path(__file__).parent.parent / "docs" / "from-yolov5.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^(?:python|torchrun --nproc_per_node 2) (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", [*WORKING, *DOCUMENTED])
def test_these_lines_work(line: str) -> None:
    _, given = parsed(line)
    assert len(given) == sum(word.startswith("--") for word in line.split())


def test_the_errors_on_the_page_are_those_of_the_program() -> None:
    errors = re.findall(r"^error: (unknown argument '(.*?)'.*)$", PAGE, re.MULTILINE)
    assert (len(DOCUMENTED), len(errors)) == (5, 2)
    for message, argument in errors:
        with pytest.raises(UserError) as caught:
            parsed(f"val.py {argument}" if "model" in argument else f"train.py {argument}")
        assert str(caught.value) == message


@pytest.mark.parametrize("line", REFUSED)
def test_these_lines_are_refused_with_the_right_word(line: str) -> None:
    """Required flags are missing in most of them: the unknown one is named first."""
    with pytest.raises(UserError, match="unknown argument") as caught:
        parsed(line)
    assert REFUSED[line] in str(caught.value)
    assert "\n" not in str(caught.value)


# what a line's words mean, where that is not plain
VALUES = {
    "train.py --img 320 --batch 8 --cache": {"imgsz": 320, "batch_size": 8, "cache": "ram"},
    "train.py --img-size 320 --batch-size -1": {"imgsz": 320, "batch_size": -1},
    "train.py --resume": {"resume": "newest"},
    "train.py --resume a/last.pt": {"resume": "a/last.pt"},
    "train.py --weights '' --cfg yolov5s.yaml": {"weights": "", "cfg": "yolov5s.yaml"},
    "train.py --freeze 0 1 2 --device 0,1": {"freeze": ("0", "1", "2"), "device": "0,1"},
    "val.py --weights a --conf 0.1 --iou 0.5": {"conf_thres": 0.1, "iou_thres": 0.5},
    "val.py --weights a --batch 4 --task test": {"batch_size": 4, "task": "test"},
    "detect.py --weights a --source b --img 320": {"image_size": 320},
    "detect.py --weights a --source 0 --imgsz 384 640": {"image_size": (384, 640)},
    "detect.py --weights a --source b --conf 0.4 --iou 0.5": {"conf_thres": 0.4, "iou_thres": 0.5},
    "detect.py --weights a --source b --classes 0 2": {"classes": ("0", "2")},
    "export.py --weights a --img 320 --batch 2": {"imgsz": (320,), "batch_size": 2},
}


@pytest.mark.parametrize("line", VALUES)
def test_values(line: str) -> None:
    config, _ = parsed(line)
    assert {name: getattr(config, name) for name in VALUES[line]} == VALUES[line]


def test_a_canvas_has_two_sides() -> None:
    with pytest.raises(UserError, match=r"--imgsz takes a long side, or height and width, got \(1"):
        parsed("detect.py --weights a.pt --source b --imgsz 1 2 3")


def test_no_row_of_the_table_is_dead() -> None:
    """A flag that one script has and another lacks may be in it."""
    own = [
        {flag(field.name).lstrip("-") for field in dataclasses.fields(config)}
        for config in (TrainConfig, ValConfig, DetectConfig, ExportConfig)
    ]
    assert set.intersection(*own) & set(INSTEAD) == set()


def test_recipes_have_yolov5_s_values(shared) -> None:
    low = load_hyp("hyp.scratch-low.yaml")
    assert low == Hyperparameters()
    assert low == dataclasses.replace(load_hyp("default"), min_updates=0)
    med, high = load_hyp("hyp.scratch-med"), load_hyp("data/hyps/hyp.scratch-high.yaml")
    assert dataclasses.replace(med, copy_paste=0.1) == high
    with open_pickled(shared / "weights" / "yolov5n.pt") as pickled:  # its own, from its authors
        published = dict(pickled.root["model"].state["hyp"])
    assert published.pop("label_smoothing") == 0
    assert Hyperparameters.from_dict(published) == high
    voc, many = load_hyp("hyp.VOC.yaml"), load_hyp("hyp.Objects365.yaml")
    assert (voc.lr0, voc.momentum, voc.anchors) == (0.00334, 0.74832, 3.412)
    assert (many.lr0, many.momentum, many.anchors) == (0.00258, 0.779, 3.2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("screen", "screen: not in FeatherDet: no picture is taken of the screen"),
        ("screen 0 100 100 512 256", "no picture is taken of the screen"),
        ("https://youtu.be/LNwODJXcvt4", "a page, not a video: download the video"),
        ("https://www.youtube.com/watch?v=Zgi9g1ksQHc", "a page, not a video"),
    ],
)
def test_sources_that_are_not_read(source: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve([source], print)


@pytest.mark.parametrize("name", ["engine", "coreml", "tflite"])
def test_formats_that_are_not_written(name: str) -> None:
    with pytest.raises(UserError, match=r"'onnx', 'openvino', 'torchscript'"):
        parsed(f"export.py --weights yolov5s.pt --include {name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolov5s.pt", "YOLOv5's authors publish yolov5s.pt at https://.* .nothing is downloaded"),
        ("yolov5x6.pt", "YOLOv5's authors publish yolov5x6.pt at https://"),
        ("yolov8n.pt", "yolov8n.pt is no YOLOv5 detector"),
        ("yolo11n.pt", "yolo11n.pt is no YOLOv5 detector"),
        ("yolov5s-seg.pt", "yolov5s-seg.pt is no YOLOv5 detector"),
        ("best.pt", "best.pt: no such file .nothing is downloaded"),
    ],
)
def test_missing_weights_say_who_publishes_them(tmp_path, name: str, message: str) -> None:
    with (
        pytest.raises(UserError, match=message),
        open_pickled(tmp_path / name),
    ):
        pass

"""What users of YOLOv5 and Ultralytics type that FeatherDet names differently, or does not have."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from utils.errors import nearest
from utils.hyp import Hyperparameters

_NO_EVOLUTION = "not in FeatherDet: write a few --hyp files and train with each of them"
_NO_UPLOAD = "not in FeatherDet: nothing is uploaded or downloaded"
_NO_WANDB = (
    "not in FeatherDet: a setting of YOLOv5's Weights & Biases logger; use --loggers wandb, with"
    " WANDB_PROJECT and WANDB_ENTITY in the environment"
)
_NO_MASKS = "not in FeatherDet: it trains detectors, no masks and no classifiers"
# By name without dashes in front, '-' for '_'.  Some are flags of another script of FeatherDet.
INSTEAD = {
    "accumulate": "set nbs in a --hyp file: gradients accumulate up to that many images",
    "adam": "use --optimizer Adam",
    "agnostic-nms": "detect.py alone has it",
    "artifact-alias": _NO_WANDB,
    "bbox-interval": _NO_WANDB,
    "bucket": _NO_UPLOAD,
    "cache-images": "use --cache ram",
    "cfg": "leave it out: a checkpoint holds its model",
    "deterministic": "leave it out: training on a CPU repeats bit for bit anyway",
    "device": "leave it out: this runs on the CPU",
    "dnn": "not in FeatherDet: OpenCV's networks are not used; export.py writes ONNX files",
    "dropout": _NO_MASKS,
    "embed": "not in FeatherDet: feature maps are neither written nor drawn",
    "entity": _NO_WANDB,
    "evolve": _NO_EVOLUTION,
    "evolve-population": _NO_EVOLUTION,
    "format": "use --include onnx, openvino or torchscript",
    "fourcc": "not in FeatherDet: videos are written as mp4",
    "fraction": "not in FeatherDet: name fewer images in the data set's YAML, e.g. by a .txt list",
    "image-weights": "not in FeatherDet: each epoch takes each image once",
    "img-weights": "not in FeatherDet: each epoch takes each image once",
    "inplace": "leave it out: export.py has one form of each file",
    "keras": "use --include onnx, openvino or torchscript",
    "line-width": "use --line-thickness",
    "linear-lr": "leave it out: the learning rate decays linearly unless --cos-lr is given",
    "local-rank": "leave it out: torchrun tells each process its rank by the environment",
    "log-artifacts": _NO_WANDB,
    "log-imgs": _NO_WANDB,
    "logdir": "use --project and --name",
    "mask-ratio": _NO_MASKS,
    "merge": "not in FeatherDet: overlapping boxes are suppressed, never merged",
    "mode": "leave it out: train.py, val.py and detect.py are the modes",
    "model": "use --weights for a checkpoint, --cfg for a model file",
    "names": "leave it out: a checkpoint holds its class names",
    "ndjson-console": "not in FeatherDet: results.csv has a row for each epoch",
    "ndjson-file": "not in FeatherDet: results.csv has a row for each epoch",
    "notest": "use --noval",
    "opset": "leave it out: ONNX files are of opset 18",
    "optimize": "leave it out: export.py has one form of each file",
    "output": "use --project and --name",
    "overlap-mask": _NO_MASKS,
    "plots": "leave it out: plots are drawn unless --noplots is given",
    "pretrained": "use --weights",
    "quad": "not in FeatherDet: use --multi-scale, or a larger --img",
    "resume-evolve": _NO_EVOLUTION,
    "retina-masks": _NO_MASKS,
    "save": "leave it out: files are written unless --nosave is given",
    "save-format": "use --save-txt (YOLO's format) or --save-csv (pixels)",
    "save-frames": "use --save-txt or --save-crop: they name the frame of a video",
    "save-hybrid": "not in FeatherDet: labels among the detections score too high; use --save-txt",
    "save-img": "leave it out: files are written unless --nosave is given",
    "save-json": "val.py has it; in Python there is Result.to_coco",
    "show": "use --view-img",
    "show-boxes": "use --nosave, or --save-txt without drawing",
    "show-conf": "use --hide-conf",
    "show-labels": "use --hide-labels",
    "simplify": "not in FeatherDet: apply onnxsim to the file",
    "split": "use --task val, train or test",
    "stream-buffer": "leave it out: of a stream the newest frame is taken",
    "time": "not in FeatherDet: use --epochs, and --resume to go on",
    "topk-all": "not in FeatherDet: there are no TensorFlow files",
    "update": _NO_UPLOAD,
    "upload-dataset": _NO_UPLOAD,
    "verbose": "leave it out: val.py alone has more to print",
    "visualize": "not in FeatherDet: feature maps are neither written nor drawn",
    "workspace": "not in FeatherDet: there are no TensorRT files",
}


def advice(argument: str, known: Collection[str]) -> str:
    """What to type for an `argument` that no flag of `known` matches: the rest of the message."""
    key, equals, value = argument.partition("=")
    if not equals and not key.startswith("-"):
        number = ": the flag before it takes one value; --img is one number here"
        ensemble = ": one checkpoint at a time, there are no ensembles"
        return number if key.isdecimal() else ensemble if key.endswith(".pt") else ""
    name = key.lstrip("-").replace("_", "-").lower()
    spelled = f"--{name}"
    if equals and not key.startswith("-"):  # Ultralytics' key=value
        if name == "model":
            spelled = "--cfg" if value.endswith((".yaml", ".yml")) else "--weights"
        if spelled in known and value != "False":
            typed = spelled if value == "True" else f"{spelled} {value}"
            return f": settings are flags here; use {typed}"
    if spelled in known:
        return f": use {spelled}" if spelled != key else ""
    if name in INSTEAD:
        return f": {INSTEAD[name]}"
    recipe = {field.name.replace("_", "-") for field in dataclasses.fields(Hyperparameters)}
    if name in recipe and "--hyp" in known:
        return f": {name.replace('-', '_')} is set in a hyper-parameter file; name it with --hyp"
    longer = [flag for flag in known if flag.startswith(spelled) and name]
    return f"; did you mean {longer[0]!r}?" if len(longer) == 1 else nearest(spelled, known)

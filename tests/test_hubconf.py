"""torch.hub.load(FOLDER, "custom", path, source="local") from another folder."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import hubconf
from engine.checkpoint import model_payload, save_checkpoint
from engine.predict.predictor import Predictor
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.errors import UserError

REQUIRED = {  # what requirements.txt installs, as it is imported
    "cv2", "hotcoco", "matplotlib", "numpy", "PIL", "pycocotools", "torch", "torchvision", "tqdm", "yaml",
}  # fmt: skip
PROGRAM = """
import sys, numpy as np, torch
model = torch.hub.load(sys.argv[1], "custom", path="own.pt", source="local", conf=1e-5, device="cpu")
result = model(np.full((48, 64, 3), 90, np.uint8), classes=["cat"])
print(result.to_json())
print(*sys.modules)
"""


@pytest.fixture
def weights(tmp_path, tiny_model):
    torch.manual_seed(0)
    model = build_detector(load_spec(str(tiny_model)), classes=2, names=("cat", "dog")).eval()
    save_checkpoint(tmp_path / "own.pt", model_payload(model))
    return tmp_path / "own.pt"


def test_a_program_elsewhere_detects(weights, root) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        cwd=weights.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, loaded = done.stdout.splitlines()
    image = np.full((48, 64, 3), 90, np.uint8)
    own = Predictor(weights, conf=1e-5, device="cpu")(image, classes=["cat"])
    assert found.split('"detections"')[1] == own.to_json().split('"detections"')[1]
    assert len(own)
    assert set(loaded.split()) & REQUIRED == set(hubconf.dependencies)


def test_devices_as_hub_users_give_them(weights) -> None:
    for device in (None, "", "cpu", torch.device("cpu")):
        assert hubconf.custom(weights, device=device).device.type in ("cpu", "cuda")
    with pytest.raises(UserError, match=r"yolov5s.pt: no such file; YOLOv5's authors publish"):
        hubconf.custom(weights.with_name("yolov5s.pt"))


def test_thresholds_are_no_attributes(weights) -> None:
    """YOLOv5's `model.conf = 0.4` must not pass without effect."""
    with pytest.raises(AttributeError, match="conf"):
        hubconf.custom(weights).conf = 0.4

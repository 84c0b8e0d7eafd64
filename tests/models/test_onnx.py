"""Detectors stay plain enough to be exported: the raw maps survive ONNX."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from models.builder import build_detector
from models.yaml.parser import load_spec


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_onnxruntime_computes_the_same_maps() -> None:
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n-ghost"), classes=3, names=("a", "b", "c")).eval()
    images = torch.rand(1, 3, 64, 96)
    file = io.BytesIO()
    torch.onnx.export(model, (images,), file, dynamo=False, opset_version=17)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = onnxruntime.InferenceSession(file.getvalue())
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = model(images)
    assert [part.shape for part in found] == [(1, 3, 8, 12, 8), (1, 3, 4, 6, 8), (1, 3, 2, 3, 8)]
    for part, raw in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, raw.numpy(), atol=1e-5)

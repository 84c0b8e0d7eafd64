"""Threads around the network change nothing but the time: order, errors and an early end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.sources.frames import Frame
from engine.predict.pipeline import DEPTH, ReadAhead, WriteBehind
from engine.predict.predictor import Predictor
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.errors import UserError
from utils.nms import NmsConfig
from utils.seeding import generator


def numbered(count, report, *, then=None):
    for number in range(count):
        if number == 2:
            report("after two")
        yield number
    if then is not None:
        raise then


def test_frames_and_reports_come_in_turn_and_errors_last():
    seen = []
    with ReadAhead(seen.append, depth=2) as reader:
        reader.report("before")
        error = UserError("lost")
        with pytest.raises(UserError, match="lost"):
            seen.extend(reader.frames(numbered(9, reader.report, then=error)))
    assert seen == ["before", 0, 1, "after two", *range(2, 9)]


def test_leaving_early_ends_the_reading():
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield read[-1]

    with ReadAhead(print, depth=3) as reader:
        assert next(reader.frames(endless())) == 0
    assert not reader._thread.is_alive()
    assert len(read) <= 6


def test_calls_are_made_in_order_and_their_errors_are_raised():
    done = []
    with WriteBehind() as later:
        for number in range(3 * DEPTH):
            later(done.append, number)
    assert done == [*range(3 * DEPTH)]
    with pytest.raises(ZeroDivisionError), WriteBehind() as later:
        later(divmod, 1, 0)

    def failing():
        with WriteBehind() as later:
            later(divmod, 1, 0)
            later(done.append, "written all the same")
            raise KeyError

    with pytest.raises(KeyError):  # the first error counts
        failing()
    assert done[-1] == "written all the same"


def test_frames_in_batches_give_the_same(tiny_model):
    torch.manual_seed(0)
    model = build_detector(load_spec(str(tiny_model)), classes=3).eval()
    settings = NmsConfig(conf=0.001, iou=0.5, max_det=10, multi_label=False)
    predictor = Predictor(model, image_size=64, device="cpu", nms=settings)
    frames = [
        Frame(generator(0, n).integers(0, 256, (48, 64, 3), np.uint8), kind, str(n), None, 1, 1, n)
        for n, kind in enumerate(["image"] * 5 + ["stream", "image"])
    ]
    single, grouped = (list(predictor.on_frames(frames, batch=n)) for n in (1, 3))
    assert [r.frame.number for r in grouped] == [*range(7)]
    for a, b in zip(single, grouped, strict=True):
        assert len(a.detections) == 10
        torch.testing.assert_close(a.detections.scores, b.detections.scores)
        torch.testing.assert_close(a.detections.boxes, b.detections.boxes, rtol=0, atol=1e-3)

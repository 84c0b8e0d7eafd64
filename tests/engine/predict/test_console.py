"""What the user reads while detection runs."""

from __future__ import annotations

import numpy as np
import torch

from data.sources.frames import Frame
from engine.measure.bench import Speed
from engine.predict.console import Console
from engine.predict.predictor import Result
from utils.boxes import Detections

IMAGE = np.zeros((48, 64, 3), np.uint8)
ONE = Detections(torch.zeros(1, 4), torch.ones(1), torch.zeros(1, dtype=torch.int64))
NONE = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def result(kind: str, *, number: int = 1, item: int = 1, found: Detections = ONE) -> Result:
    frame = Frame(IMAGE, kind, f"in/{item}", None, item, 9, number, 4, 10.0)
    return Result(IMAGE, found, ("bus",), Speed(1.0, 12.34, 3.0), (480, 640), frame)


def test_a_line_per_image_video_and_stream_frame_and_the_mean_times(capsys):
    with Console():
        pass
    with Console() as console:
        console.show(result("image"))
        console.show(result("image", item=2, found=NONE))
        for number in range(1, 5):
            console.show(result("video", item=3, number=number))
        console.show(result("video", item=4, found=NONE))
        console.show(result("stream", item=5, number=17))
        console.problem("skipped: x: empty file")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "image 1/9 in/1: 480x640 1 bus, 12.3ms",
        "image 2/9 in/2: 480x640 (no detections), 12.3ms",
        "video 3/9 in/3: 4 frames 480x640 4 detections in 4 of them, 12.3ms per frame",
        "video 4/9 in/4: 1 frames 480x640 0 detections in 0 of them, 12.3ms per frame",
        "stream 5/9 in/5: frame 17 480x640 1 bus, 12.3ms",
        "Speed: 1.0 ms pre-process, 12.3 ms inference, 3.0 ms NMS per image",
    ]
    assert captured.err == "skipped: x: empty file\n"  # no bar where stderr is no terminal

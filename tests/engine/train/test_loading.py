"""Where training images are composed."""

from __future__ import annotations

import pytest
import torch

from engine.train.config import TrainConfig
from engine.train.loading import composes_on_device
from utils.errors import UserError
from utils.hyp import Hyperparameters

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN, PASTE = Hyperparameters(), Hyperparameters(copy_paste=0.1)


@pytest.mark.parametrize(
    ("device", "settings", "hyp", "expected", "text"),
    [
        (CPU, {}, PLAIN, False, ""),
        (CUDA, {}, PLAIN, True, ""),
        (CPU, {"augment": "device"}, PLAIN, True, ""),
        (CUDA, {"augment": "cpu"}, PASTE, False, ""),
        (CUDA, {}, PASTE, False, "composed on the CPU, because of copy_paste"),
        (CUDA, {"rect": True}, PLAIN, False, "composed on the CPU, because of --rect"),
    ],
)
def test_on_the_device_with_cuda_or_on_request(device, settings, hyp, expected, text, capsys):
    assert composes_on_device(TrainConfig(**settings), hyp, device) is expected
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "hyp", "message"),
    [
        (CPU, PLAIN, "needs --augment device; choose"),
        (CUDA, PASTE, "needs --augment device and excludes copy_paste; choose"),
    ],
)
def test_a_cache_on_the_device_needs_composing_there(device, hyp, message):
    with pytest.raises(UserError, match=message):
        composes_on_device(TrainConfig(cache="device"), hyp, device)

"""Where training images are composed."""

from __future__ import annotations

import pytest
import torch

from engine.train.config import TrainConfig
from engine.train.loading import composes_on_device
from engine.train.loop import fit
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


def test_where_images_are_composed_and_kept_changes_no_loss(settings, rows_of, tmp_path, device):
    where = "cpu" if device.type == "cpu" else "0"
    found = []
    for augment, cache in (("cpu", "none"), ("device", "none"), ("device", "device")):
        flags = ("--augment", augment, "--cache", cache, "--epochs", "2", "--device", where)
        fit(settings(*flags, "--name", f"{augment}-{cache}"))
        rows = rows_of(tmp_path / "runs" / f"{augment}-{cache}")
        found.append([float(row[f"train/{name}_loss"]) for row in rows for name in ("box", "obj")])
    composed, there, kept = found
    assert there == pytest.approx(composed, rel=0.01)  # rounding of pixels
    assert kept == pytest.approx(there, rel=1e-6 if device.type == "cpu" else 0.05)  # atomics

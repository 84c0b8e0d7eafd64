"""What only a CUDA device can show: mixed precision, memory formats, resume on the device.

Run by hand: pytest -m gpu
"""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from engine.train import step
from engine.train.model import largest_batch
from models.builder import build_detector
from models.losses.anchor import AnchorLoss
from models.yaml.parser import load_spec
from train import main
from utils.errors import TerminatedError
from utils.hyp import Hyperparameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(folder: Path) -> list[float]:
    lines = (folder / "results.csv").read_text().splitlines()
    column = [name.strip() for name in lines[0].split(",")].index("train/box_loss")
    return [float(line.split(",")[column]) for line in lines[1:]]


@pytest.mark.parametrize("amp", ["fp16", "bf16", "off"])
def test_mixed_precision_learns(train_flags: list[str], tmp_path: Path, amp: str) -> None:
    flags = [*train_flags, "--device", "0", "--amp", amp, "--epochs", "20"]
    main(flags)
    found = losses(tmp_path / "runs" / "exp")
    assert all(math.isfinite(value) for value in found)
    assert found[-1] < found[0]


def test_a_stopped_run_resumes_on_the_device(
    train_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*train_flags, "--device", "0", "--amp", "fp16", "--epochs", "6"]
    main([*flags, "--name", "whole"])

    def draw(run: object, batch: object) -> None:
        if run.state.epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(step, "draw_batch", draw)
    with pytest.raises(TerminatedError):
        main([*flags, "--name", "stopped"])
    monkeypatch.undo()
    main(["--resume", str(tmp_path / "runs" / "stopped")])
    whole, stopped = losses(tmp_path / "runs" / "whole"), losses(tmp_path / "runs" / "stopped")
    assert len(stopped) == 6
    assert stopped == pytest.approx(whole, rel=0.05)  # atomics make the last digits differ


def test_forward_equals_the_cpu() -> None:
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n-ghost"), classes=3).eval()
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        expected = model(images)
        found = model.cuda()(images.cuda().to(memory_format=torch.channels_last))
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b.cpu(), atol=1e-2, rtol=1e-2)  # TF32 convolutions


def test_a_batch_that_fits_is_found() -> None:
    model = build_detector(load_spec("yolov5n"), classes=3).cuda().train()
    loss = AnchorLoss(model, Hyperparameters(), image_size=128)
    batch = largest_batch(
        model, loss, image_size=128, device=torch.device("cuda", 0), autocast=torch.float16
    )
    assert batch >= 1


def test_a_compiled_run_has_the_losses_of_another(train_flags: list[str], tmp_path: Path) -> None:
    """Forward and loss as CUDA graphs, images composed by compiled code and kept on the device."""
    flags = [*train_flags, "--device", "0", "--amp", "off", "--epochs", "4"]
    main([*flags, "--augment", "cpu", "--name", "plain"])
    main([*flags, "--compile", "--cache", "device", "--name", "compiled"])
    plain, compiled = (losses(tmp_path / "runs" / name) for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=0.1)  # the last batch is filled up

"""The peak and what lies under it, by hand and with a clock of our own."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor, nn

from engine.measure import roofline as room
from engine.measure.bench import prepare, sample_images
from engine.measure.roofline import (
    COMPUTE,
    MEMORY,
    DevicePeak,
    PeakSizes,
    by_block,
    measure_peak,
    roofline,
    time_rows,
)
from models.builder import build_detector
from models.graph import RowGraph
from models.profile.cost import count
from models.profile.counting import profile
from models.spec import IMAGE, GraphSpec, LayerSpec
from models.yaml.parser import load_spec

CPU = torch.device("cpu")
PEAK = DevicePeak(
    flops_per_second=1e9, bytes_per_second=1e8, launch_seconds=1e-6
)  # ridge: 10 FLOP/B


@pytest.mark.parametrize(
    ("groups", "flops", "weights", "bound"),
    [(1, 2 * 256 * 9 * 64 * 64, 9 * 64 * 64, COMPUTE), (64, 2 * 256 * 9 * 64, 9 * 64, MEMORY)],
)
def test_dense_convolutions_are_compute_bound_and_depthwise_ones_memory_bound(
    groups, flops, weights, bound
):
    module = nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    (kernel,) = count(module, (1, 64, 16, 16)).kernels
    size = 4 * (2 * 256 * 64 + weights)
    assert (kernel.flops, kernel.bytes) == (flops, size)
    assert (flops / size > PEAK.ridge) == (bound == COMPUTE)
    assert PEAK.bound(kernel) == bound
    assert PEAK.seconds(kernel) == pytest.approx(max(flops / 1e9, size / 1e8))
    (relu,) = count(nn.ReLU(), (1, 4, 8, 8)).kernels
    assert DevicePeak(1.0, 1e30, 0.0).bound(relu) == MEMORY  # no FLOPs at all


class Slow(nn.Module):
    """A 1x1 that takes the next of these times on the clock."""

    def __init__(self, clock: list[float], seconds: list[float]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.clock, self.seconds = clock, seconds

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_meta:
            self.clock[0] += self.seconds.pop(0)
        return self.conv(x)


def test_rows_are_timed_by_the_median_after_warming_up_and_summed_by_block(monkeypatch):
    clock = [0.0]
    rows = [LayerSpec("backbone", (n,), 1, name) for n, name in ((IMAGE, "Conv"), (0, "C3"))]
    spec = GraphSpec((*rows, LayerSpec("neck", (1,), 1, "Conv")))
    times = ([9.0, 1.0, 2.0, 7.0], [9.0, 4.0, 4.0, 4.0], [9.0, 5.0, 1.0, 3.0])  # one to warm up
    model = RowGraph(spec, [Slow(clock, seconds) for seconds in times])
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock[0])
        timed = time_rows(model, torch.rand(1, 3, 8, 8), rounds=3, warm_up=1)
    assert timed == (2.0, 4.0, 3.0)
    assert not any(module._forward_hooks for module in model.modules())
    monkeypatch.setattr(room, "time_rows", lambda *_, **__: timed)
    found = roofline(model, torch.rand(2, 3, 8, 8), PEAK)
    conv, c3 = by_block(found)  # the longest first
    assert (conv.block, conv.rows, conv.measured) == ("Conv", (0, 2), 5.0)
    assert (c3.block, c3.rows, c3.measured) == ("C3", (1,), 4.0)
    kernel = count(nn.Conv2d(3, 3, 1), (2, 3, 8, 8)).kernels[0]
    assert conv.predicted == pytest.approx(2 * PEAK.seconds(kernel))
    assert conv.launch == pytest.approx(2 * PEAK.launch_seconds)
    assert (conv.flops, conv.kernels) == (2 * kernel.flops, 2)
    assert [row.bound for row in found] == [MEMORY] * 3


def test_a_row_is_predicted_kernel_by_kernel():
    model = build_detector(load_spec("yolov5n"), classes=3).eval().fuse()
    row = profile(model, 64).rows[2]
    found = roofline(model, torch.rand(1, 3, 64, 64), PEAK, rounds=1)[2]
    kernels = row.cost.kernels
    by_kernel = [max(k.flops / 1e9, k.bytes / 1e8) for k in kernels]
    assert found.predicted == pytest.approx(sum(by_kernel))
    assert found.predicted >= max(found.flops / 1e9, found.bytes / 1e8)
    compute = sum(k.flops / 1e9 for k in kernels if k.flops / 1e9 > k.bytes / 1e8)
    assert found.compute_bound == pytest.approx(compute)
    assert (found.kernels, found.rows, found.block) == (len(kernels), (2,), "C3")


def test_the_peaks_of_a_device_by_hand(monkeypatch):
    """Each reading of this clock is one second after the last."""
    monkeypatch.setitem(room.PEAK_SIZES, "cpu", PeakSizes(32, 8, 4096, repeats=2))
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    peak = measure_peak(CPU)
    assert peak.flops_per_second == 2 * 9 * 256 * 256 * 64  # the convolution is the larger
    assert peak.bytes_per_second == 2 * 4096
    assert peak.launch_seconds == pytest.approx(1 / 200)
    assert peak.to_dict()["ridge"] == peak.flops_per_second / 8192


def test_a_real_model_on_this_device(monkeypatch):
    monkeypatch.setitem(room.PEAK_SIZES, "cpu", PeakSizes(128, 8, 1 << 20, repeats=3))
    peak = measure_peak(CPU)
    assert min(peak.to_dict().values()) > 0
    model = prepare(build_detector(load_spec("yolov5n-ghost"), classes=3), CPU)
    found = roofline(model, sample_images(1, 64, CPU, like=model), peak, rounds=3)
    assert len(found) == len(model.layers)
    assert all(row.measured > 0 for row in found)
    assert sum(row.predicted for row in found) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_of_a_gpu_add_up_to_the_forward():
    device = torch.device("cuda", 0)
    peak = measure_peak(device)
    model = prepare(build_detector(load_spec("yolov5n"), classes=3), device)
    images = sample_images(8, 256, device, like=model)
    found = roofline(model, images, peak, rounds=20)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.inference_mode():
        start.record()
        for _ in range(20):
            model(images)
        end.record()
    torch.cuda.synchronize(device)
    whole = start.elapsed_time(end) / 20 / 1000
    assert whole / 2 < sum(row.measured for row in found) < whole * 3  # hooks cost time, too

"""Latency, rows and the device's peaks by a clock of our own; one order that is certain."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.measure import roofline as room
from engine.measure.bench import (
    LAYOUTS,
    TYPES,
    Stopwatch,
    forward_step,
    prepare,
    sample_images,
)
from engine.measure.exported import ONNXRUNTIME, OPENVINO, TORCH, exported_step
from engine.measure.latency import (
    MEASURED,
    MIN_ROUNDS,
    MODELLED,
    Candidate,
    Latency,
    LatencyConfig,
    _ExportedRun,
    interleave,
    measure_latency,
)
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
from models.detector import RowGraph
from models.profile.cost import count
from models.profile.counting import profile
from models.spec import IMAGE, GraphSpec, LayerSpec
from models.yaml.parser import load_spec

CPU = torch.device("cpu")
PEAK = DevicePeak(flops_per_second=1e9, bytes_per_second=1e8, launch_seconds=1e-6)  # 10 FLOP/B


class FakeClock:
    """Stands still but for what steps take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = ""

    def step(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.calls += name


@pytest.fixture
def clock(monkeypatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    return fake


class Waits(nn.Module):
    """A 1x1 that takes a known time for each image, the last of `seconds` again and again.

    `full` images are too many; call number `fails` fails, 0 is the copy to the device.
    """

    def __init__(self, clock: FakeClock, *seconds: float, full: int = 99, fails: int = -1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.clock, self.seconds, self.full, self.left = clock, list(seconds), full, fails

    def __deepcopy__(self, memo):
        self.count_down(0)
        return Waits(self.clock, *self.seconds, full=self.full, fails=self.left)

    def count_down(self, calls: int = 1) -> None:
        self.left -= calls
        if self.left == 0:
            raise RuntimeError("CUDA error: no more\nand so on")

    def forward(self, images: Tensor) -> Tensor:
        self.count_down()
        if len(images) >= self.full:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        if not images.is_meta:
            self.clock.now += self.seconds[0] * len(images)
            self.seconds = self.seconds[1:] or self.seconds
        return self.conv(images)


class Prefers(nn.Module):
    """Takes 1 s in one memory layout and 2 s in the other; batches of 4 prefer the other one."""

    def __init__(self, clock: FakeClock, layout: str, seen: set[torch.dtype]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.clock, self.layout, self.seen = clock, layout, seen

    def __deepcopy__(self, memo):
        return Prefers(self.clock, self.layout, self.seen)

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_meta:
            self.seen |= {images.dtype, self.conv.weight.dtype}
            order = {images.is_contiguous(memory_format=f) for f in (LAYOUTS[self.layout],)}
            assert order == {self.conv.weight.is_contiguous(memory_format=LAYOUTS[self.layout])}
            self.clock.now += 1 if order == {len(images) != 4} else 2
        return self.conv(images)


class TestStopwatch:
    def test_stages_are_summed_over_rounds_without_the_time_between(self, clock):
        watch = Stopwatch(CPU, stages=2)
        for clock.now in (0.0, 1.0, 3.0, 100.0, 101.0, 103.0):
            watch.mark()
        assert watch.seconds() == (2.0, 4.0)

    def test_cuda_events_are_recorded_on_the_models_device(self, monkeypatch):
        """With --device 1 the current device is still GPU 0: events there time nothing."""
        recorded, waited, ticks = [], [], itertools.count()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: object = "stream of the current device") -> None:
                recorded.append(stream)
                self.tick = next(ticks)

            def elapsed_time(self, other: Event) -> float:
                return 1000.0 * (other.tick - self.tick)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
        watch = Stopwatch(torch.device("cuda", 1), stages=2)
        for _ in range(3):
            watch.mark()
        assert watch.seconds() == (1.0, 1.0)
        assert recorded == ["stream of cuda:1"] * 3
        assert waited == [torch.device("cuda", 1)]


class TestLatency:
    @pytest.mark.parametrize(
        ("steps", "rounds", "budget", "calls"),
        [  # each round begins with another step
            ({"a": 1.0, "b": 2.0, "c": 4.0}, 6, 1e9, "abcbcacababcbcacab"),
            ({"a": 0.5, "b": 0.5}, 50, 10.5, "abba" * 5 + "ab"),
            ({"a": 10.0}, 50, 1.0, "a" * MIN_ROUNDS),  # the budget ends no round before these
            ({}, 50, 1.0, ""),
        ],
    )
    def test_rounds(self, clock, steps, rounds, budget, calls):
        config = LatencyConfig(rounds=rounds, seconds=budget)
        runs = [lambda item=item: clock.step(*item) for item in steps.items()]
        durations = interleave(runs, config, device=CPU)
        assert clock.calls == calls
        assert durations == [[seconds] * calls.count(name) for name, seconds in steps.items()]

    def test_metrics_by_hand(self):
        durations = [0.010 * i for i in range(1, 12)]  # 10 to 110 ms for two images
        found = Latency.of(2, durations, 3 * 10**9, 1, MODELLED)
        assert (found.p50_ms, found.p90_ms, found.least_ms) == pytest.approx((30, 50, 5))
        assert found.images_per_second == pytest.approx(1 / 0.030)
        assert found.gflops_per_second == pytest.approx(100)

    def test_all_models_and_batches_are_measured(self, clock):
        models = [Candidate("a", Waits(clock, 0.5), 8), Candidate("b", Waits(clock, 0.25), 16)]
        config = LatencyConfig(batches=(1, 4), rounds=7, warm_up=1)
        results, settings = measure_latency(models, config, device=CPU)
        assert list(results) == [(name, n, "torch") for n in (1, 4) for name in "ab"]
        assert [item.p50_ms for item in results.values()] == pytest.approx([500, 250, 500, 250])
        a, b = results["a", 4, "torch"], results["b", 4, "torch"]
        flops = [one.gflops_per_second * 1e9 / one.images_per_second for one in (a, b)]
        assert flops == pytest.approx([2 * 64 * 9, 2 * 256 * 9])
        assert a.memory_source == MODELLED
        assert a.memory_bytes == 4 * (12 + 4 * 64 * (3 + 3))  # weights, bias; images and result
        assert clock.now == pytest.approx(2 * (1 + 7) * 0.75 * (1 + 4))  # both layouts
        assert settings == json.loads(json.dumps(settings))
        assert settings["device"].startswith("cpu")
        assert settings["threads"] == torch.get_num_threads()

    def test_the_faster_layout_counts_for_each_model_and_batch(self, clock):
        seen: set[torch.dtype] = set()
        models = [Candidate(name, Prefers(clock, name, seen), 8) for name in LAYOUTS]
        config = LatencyConfig(batches=(1, 4), rounds=5, warm_up=1, dtype="bf16")
        results, settings = measure_latency(models, config, device=CPU)
        nchw, last = LAYOUTS
        assert [one.layout for one in results.values()] == [nchw, last, last, nchw]
        assert [one.p50_ms for one in results.values()] == [1000, 1000, 250, 250]
        assert [one.other_p50_ms for one in results.values()] == [2000, 2000, 500, 500]
        assert seen == {torch.bfloat16}
        assert (settings["dtype"], settings["graph"]) == ("bf16", False)
        assert results[nchw, 1, "torch"].memory_bytes == 2 * (84 + 3 * 64 + 3 * 36)

    def test_a_graph_is_captured_once_and_replayed(self, monkeypatch):
        """What torch.cuda is asked for, in order; every run shares one pool."""
        calls: list[str] = []

        class Graph:
            def replay(self) -> None:
                calls.append("replay")

        class Stream:
            def __init__(self, *_: object) -> None:
                pass

            def wait_stream(self, other: Stream) -> None:
                calls.append("wait")

        @contextlib.contextmanager
        def noted(*args: object, pool: object = None) -> Iterator[None]:
            calls.append(f"capture in {pool}" if pool else "")
            yield
            calls.append("end" if pool else "")

        class Counts(nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                calls.append("forward")
                return images

        for name, fake in (
            ("device", noted),
            ("stream", noted),
            ("graph", noted),
            ("Stream", Stream),
            ("CUDAGraph", Graph),
            ("current_stream", Stream),
        ):
            monkeypatch.setattr(torch.cuda, name, fake)
        step = forward_step(Counts(), torch.rand(1, 3, 8, 8), graph=True, pool="pool")
        step()
        step()
        done = [call for call in calls if call]
        assert done[:3] == ["wait", "forward", "wait"]
        assert done[3:] == ["capture in pool", "forward", "end", "replay", "replay"]

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("dtype", TYPES)
    def test_graphs_are_no_slower_than_python_at_batch_1(self, dtype):
        device = torch.device("cuda", 0)
        models = [Candidate("n", build_detector(load_spec("yolov5n"), classes=3), 320)]
        found = [
            measure_latency(models, LatencyConfig(dtype=dtype, graph=graph), device=device)[0]
            for graph in (False, True)
        ]
        eager, graph = (one["n", 1] for one in found)
        assert eager.cause is graph.cause is None
        assert graph.p50_ms < eager.p50_ms

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_graph_computes_what_the_model_does(self):
        device = torch.device("cuda", 0)
        model = prepare(build_detector(load_spec("yolov5n-ghost"), classes=3), device)
        images = sample_images(2, 128, device, like=model)
        kept: list[Tensor] = []
        layer = model.layers[-1]
        layer.register_forward_hook(lambda _, __, raw: kept.append(raw[0]))
        step = forward_step(model, images, graph=True)
        images.uniform_()
        step()
        with torch.inference_mode():
            expected = model(images)[0]
        assert torch.allclose(kept[1], expected, atol=1e-2, rtol=1e-2)

    @pytest.mark.parametrize(
        ("broken", "cause"),
        [
            *(({"fails": n}, "RuntimeError: CUDA error: no more") for n in (0, 2, 5, 9)),
            ({"full": 4}, "OutOfMemoryError: CUDA out of memory."),  # it fits later
        ],
        ids=["in the copy", "in the warm-up", "in a round", "for the memory", "too large a batch"],
    )
    def test_one_that_fails_does_not_end_the_rest(self, clock, broken, cause):
        models = [
            Candidate("bad", Waits(clock, 1, **broken), 8),
            Candidate("ok", Waits(clock, 1), 8),
        ]
        config = LatencyConfig(batches=(4, 1), warm_up=3, rounds=5)
        results, _ = measure_latency(models, config, device=CPU)
        assert results["bad", 4, "torch"] == Latency(4, cause)
        assert results["ok", 4, "torch"].p50_ms == results["ok", 1, "torch"].p50_ms == 1000
        assert (results["bad", 1, "torch"].cause is None) == (broken != {"fails": 0})

    def test_other_runtimes_take_part_with_one_exported_network(self, tiny_model, tmp_path):
        pytest.importorskip("onnxscript")
        names = [TORCH, *(one for one in (ONNXRUNTIME, OPENVINO) if find_spec(one))]
        model = build_detector(load_spec(str(tiny_model)), classes=3)
        plain = Candidate("plain", nn.Conv2d(3, 3, 1), 64, "none")  # cannot be exported
        models = [Candidate("tiny", model, 64, "abc"), plain]
        config = LatencyConfig(batches=(2,), rounds=5, warm_up=1, runtimes=tuple(names))
        results, settings = measure_latency(models, config, device=CPU, exports=tmp_path)
        assert list(results) == [(one.name, 2, name) for one in models for name in names]
        assert [one.runtime for one in results.values()] == names * 2
        assert all(results["tiny", 2, name].p50_ms > 0 for name in names)
        failed = [results["plain", 2, name].cause for name in names[1:]]
        assert all(cause.startswith("AttributeError") for cause in failed)
        assert (settings["runtimes"], list(settings["versions"])) == (names, names)
        (file,) = tmp_path.iterdir()
        assert file.name == "abc-64-batch2.onnx"
        written = file.stat().st_mtime_ns
        ready = prepare(model, CPU)
        images = sample_images(2, 64, CPU, like=ready)
        with torch.inference_mode():
            expected = ready.head.dense(ready(images))
        for name in names[1:]:  # by the same file, and equal to PyTorch
            found = exported_step(ready, images, name, file)()
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.from_numpy(ours) == pytest.approx(theirs, abs=1e-3)
        assert file.stat().st_mtime_ns == written

    def test_preparing_leaves_the_model_alone(self):
        torch.manual_seed(0)
        model = build_detector(load_spec("yolov5n"), classes=3).train()
        ready = prepare(model, CPU)
        assert (model.training, ready.training) == (True, False)
        norms = [any(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (model, ready)]
        assert norms == [True, False]
        images = sample_images(2, 64, CPU, like=ready)
        assert 0 <= images.min() < images.max() < 1
        with torch.inference_mode():
            expected, found = model.eval()(images), ready(images)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, found, strict=True))

    def test_flops_are_those_of_the_published_form(self):
        """Not of the zeros that a fused MixConv multiplies by."""
        model = build_detector(load_spec("yolov5n-mixconv"), classes=3)
        config = LatencyConfig(batches=(1,), rounds=1, warm_up=0)
        item = Candidate("mix", model, 64)
        (found,) = measure_latency([item], config, device=CPU)[0].values()
        exported = _ExportedRun(item, ONNXRUNTIME, config, Path())
        exported._model, exported._images = prepare(model, CPU), torch.zeros(1, 3, 64, 64)
        exported._batch, exported.durations = 1, [0.5]
        for one in (found, exported.result()):
            assert one.gflops_per_second == pytest.approx(
                profile(model, 64).flops * one.images_per_second / 1e9
            )
        assert profile(model, 64).flops < profile(prepare(model, CPU), 64).flops

    def test_the_order_of_two_models_is_right(self):
        """A nano model at 64 px against a small one at 256 px: some fifty times the work."""
        small = Candidate("small", build_detector(load_spec("yolov5n"), classes=3), 64)
        large = Candidate("large", build_detector(load_spec("yolov5s"), classes=3), 256)
        config = LatencyConfig(batches=(1,), rounds=7, warm_up=1)
        slow, fast = measure_latency([large, small], config, device=CPU)[0].values()
        slower, faster = (one.gflops_per_second / one.images_per_second for one in (slow, fast))
        assert slower > 40 * faster  # GFLOPs
        assert fast.p50_ms < slow.p50_ms
        assert fast.least_ms < slow.least_ms
        assert fast.memory_bytes < slow.memory_bytes

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_memory_of_a_gpu_is_measured_for_each_model_alone(self):
        device, names = torch.device("cuda", 0), ("yolov5n", "yolov5s")
        config = LatencyConfig(batches=(1, 8), rounds=7)
        models = [Candidate(n, build_detector(load_spec(n), classes=3), 256) for n in names]
        both, _ = measure_latency(models, config, device=device)
        alone, _ = measure_latency(models[:1], config, device=device)
        for batch in config.batches:
            small, large = (both[name, batch, "torch"] for name in names)
            assert small.memory_source == MEASURED
            assert small.memory_bytes < large.memory_bytes
            memory = alone["yolov5n", batch, "torch"].memory_bytes
            assert small.memory_bytes == pytest.approx(memory, rel=0.05)


class TestRoofline:
    @pytest.mark.parametrize(
        ("groups", "flops", "weights", "bound"),
        [
            pytest.param(1, 2 * 256 * 9 * 64 * 64, 9 * 64 * 64, COMPUTE, id="dense"),
            pytest.param(64, 2 * 256 * 9 * 64, 9 * 64, MEMORY, id="depthwise"),
        ],
    )
    def test_bounds(self, groups, flops, weights, bound):
        module = nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
        (kernel,) = count(module, (1, 64, 16, 16)).kernels
        size = 4 * (2 * 256 * 64 + weights)
        assert (kernel.flops, kernel.bytes) == (flops, size)
        assert (flops / size > PEAK.ridge) == (bound == COMPUTE)
        assert PEAK.bound(kernel) == bound
        assert PEAK.seconds(kernel) == pytest.approx(max(flops / 1e9, size / 1e8))
        (relu,) = count(nn.ReLU(), (1, 4, 8, 8)).kernels
        assert DevicePeak(1.0, 1e30, 0.0).bound(relu) == MEMORY  # no FLOPs at all

    def test_rows_are_timed_by_the_median_after_warming_up_and_summed_by_block(
        self, clock, monkeypatch
    ):
        blocks = ((IMAGE, "Conv"), (0, "C3"), (1, "Conv"))
        spec = GraphSpec(tuple(LayerSpec("backbone", (n,), 1, name) for n, name in blocks))
        times = ([9, 1, 2, 7], [9, 4, 4, 4], [9, 5, 1, 3])  # one to warm up
        model = RowGraph(spec, [Waits(clock, *seconds) for seconds in times])
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

    def test_a_row_is_predicted_kernel_by_kernel(self):
        model = build_detector(load_spec("yolov5n"), classes=3).eval().fuse()
        kernels = profile(model, 64).rows[2].cost.kernels
        found = roofline(model, torch.rand(1, 3, 64, 64), PEAK, rounds=1)[2]
        by_kernel = [max(k.flops / 1e9, k.bytes / 1e8) for k in kernels]
        assert found.predicted == pytest.approx(sum(by_kernel))
        assert found.predicted >= max(found.flops / 1e9, found.bytes / 1e8)
        compute = sum(k.flops / 1e9 for k in kernels if k.flops / 1e9 > k.bytes / 1e8)
        assert found.compute_bound == pytest.approx(compute)
        assert (found.kernels, found.rows, found.block) == (len(kernels), (2,), "C3")

    def test_the_peaks_of_a_device_by_hand(self, monkeypatch):
        """Each reading of this clock is one second after the last."""
        monkeypatch.setitem(room.PEAK_SIZES, "cpu", PeakSizes(32, 8, 4096, repeats=2))
        ticks = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
        peak = measure_peak(CPU)
        assert peak.flops_per_second == 2 * 9 * 256 * 256 * 64  # the convolution is the larger
        assert peak.bytes_per_second == 2 * 4096
        assert peak.launch_seconds == pytest.approx(1 / 200)
        assert peak.to_dict()["ridge"] == peak.flops_per_second / 8192

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_rows_of_a_gpu_add_up_to_the_forward(self):
        device = torch.device("cuda", 0)
        peak = measure_peak(device)
        model = prepare(build_detector(load_spec("yolov5n"), classes=3), device)
        images = sample_images(8, 256, device, like=model)
        found = roofline(model, images, peak, rounds=20)
        watch = Stopwatch(device, stages=1)
        with torch.inference_mode():
            watch.mark()
            for _ in range(20):
                model(images)
            watch.mark()
        whole = watch.seconds()[0] / 20
        rows = sum(row.measured for row in found)
        assert whole / 2 < rows < whole * 3  # hooks cost time, too

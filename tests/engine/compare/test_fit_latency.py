"""--fit ms=: the search against a device whose latency is known, drifting while it is measured."""

import pytest

from engine.compare import fit_latency
from engine.compare.config import CompareConfig
from engine.compare.fit_latency import Target, read_target
from engine.compare.plan import model_entries, run_flags
from engine.compare.record import model_id
from engine.measure.latency import Latency
from models.profile.counting import profile
from models.profile.fit import fit, read_budget
from models.yaml.parser import load_draft
from utils.errors import UserError

step = [0.01]


@pytest.fixture
def device(monkeypatch, tmp_path):
    """The calls of a device that takes 1 ms and 1 ms per 4 MFLOPs, and slows down by 1 % a call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls, step[0] = [], 0.01

    def timed(candidates, config, **_):
        slower = 1 + step[0] * len(calls)
        calls.append([item.key for item in candidates])
        flops = [profile(item.model, item.image_size).flops for item in candidates]
        times = [slower * (1 + x / 4e6) for x in flops]
        return {(i, 1): Latency(1, p50_ms=x) for i, x in enumerate(times)}, {}

    monkeypatch.setattr(fit_latency, "measure_latency", timed)
    return calls


def test_models_are_fitted_corrected_for_drift_and_kept(device, tiny_model):
    """Of what widths of multiples of 8 give, 6.476 MFLOPs take 2.619 ms.

    The device is fastest at the first of the five measurements of the reference.
    """
    config = CompareConfig(cfg=(str(tiny_model),), fit="ms=2.62@cpu", imgsz=64)
    (entry,) = model_entries(config, classes=3)
    assert entry.profile.flops == pytest.approx(6.476e6, rel=1e-4)
    assert entry.model.fitted_ms == pytest.approx(2.619, rel=1e-4)
    assert entry.model.notes[0].startswith("--fit ms=2.62@cpu: 2.62 ms (0.0%) by --fit gflops=0.00")
    drift = int(entry.model.notes[0].split("drifted by +")[1].split(".")[0])
    assert 5 <= drift <= len(device) + 1
    flags = run_flags(config, entry, 0, {})
    budget = read_budget(flags[flags.index("--fit") + 1], image_size=1)  # what train.py reads
    again = fit(load_draft(entry.model.cfg), budget, classes=3)
    assert model_id(again.spec) == entry.model_id
    calls = len(device)
    (kept,) = model_entries(config, classes=3)
    assert (kept.model_id, kept.model) == (entry.model_id, entry.model)
    assert len(device) == calls  # nothing was measured


def test_a_device_that_was_busy_at_first_ends_it(device, tiny_model):
    step[0] = -0.05  # after five measurements a quarter faster
    config = CompareConfig(cfg=(str(tiny_model), "yolov5n"), fit="ms=2.62@cpu", imgsz=64)
    with pytest.raises(UserError, match=r"busy when the reference .*2.1 ms, now 1.8 ms"):
        model_entries(config, classes=3)


def test_what_cannot_be_reached_is_said(device, tiny_model, monkeypatch):
    monkeypatch.setattr(fit_latency, "OFFSETS", (0,))
    config = CompareConfig(cfg=(str(tiny_model),), fit="ms=0.9@cpu", imgsz=64)  # 1 ms at least
    with pytest.raises(UserError, match=r"--fit .* (lowest reachable|was not brought within 3%)"):
        model_entries(config, classes=3)


@pytest.mark.parametrize("text", ["ms=20", "ms=20@gpu", "ms=x@cpu", "ms=0@cpu", "ms=-1@cpu"])
def test_places_and_numbers_are_checked(text):
    with pytest.raises(UserError, match=r"expected ms=NUMBER@PLACE .*cpu, cuda, onnxruntime"):
        read_target(CompareConfig(cfg=("any",), fit=text))
    assert read_target(CompareConfig(cfg=("any",), fit="ms=2.5@cpu")) == Target(2.5, "cpu")
    with pytest.raises(UserError, match="only compare"):
        read_budget("ms=2.5@cpu", image_size=64)

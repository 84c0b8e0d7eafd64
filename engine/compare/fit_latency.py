"""--fit ms=20@cpu: a model scaled until its median latency, measured on this device, is as asked.

Every measurement takes turns with a reference, the first model as written.  Its median is measured
first, the least of five; where it has drifted since, by other programs or the clock, the model's is
corrected by as much.  What is found is kept, so that the same command trains the same models.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.index.cache import cache_file
from engine.compare.config import CompareConfig
from engine.compare.record import digest, model_id
from engine.distributed import select_device
from engine.measure.exported import ONNXRUNTIME, OPENVINO, TORCH, require_runtimes, versions
from engine.measure.latency import Candidate, LatencyConfig, measure_latency
from models.builder import build_detector
from models.profile.counting import profile_spec
from models.profile.fit import Fitted, fit, read_budget
from models.spec import ModelSpec
from models.yaml.parser import Draft
from utils.environment import device_name
from utils.errors import UserError
from utils.files import write_text
from utils.terminal import formatted

KIND = "ms"
PLACES = {"cpu": TORCH, "cuda": TORCH, ONNXRUNTIME: ONNXRUNTIME, OPENVINO: OPENVINO}
TOLERANCE = 0.03  # of the median latency
GOOD = 0.01  # near enough to stop looking
NEAR = 0.1  # where it is measured REPEATS times
ATTEMPTS, REPEATS = 12, 5
OFFSETS = (0.0, 0.03, -0.03, 0.06, -0.06)  # of the FLOPs wanted, where those give no new model
BUSY = 0.1  # so much faster than at first, the reference was not to be relied on
SECONDS = 2.0  # of a measurement


@dataclass(frozen=True)
class Target:
    """A median latency in milliseconds of one image, and where."""

    ms: float
    place: str  # of PLACES


def read_target(config: CompareConfig) -> Target | None:
    """The latency that --fit asks for; None for a budget of computed cost, or none.

    UserError for anything else, and for a place that is not there.
    """
    kind, _, amount = config.fit.partition("=")
    if kind.strip().lower() != KIND:
        if config.fit:
            read_budget(config.fit, image_size=config.imgsz)
        return None
    number, _, place = amount.partition("@")
    try:
        ms = float(number)
    except ValueError:
        ms = math.nan
    if not 0 < ms < math.inf or place not in PLACES:
        raise UserError(
            f"--fit {config.fit}: expected ms=NUMBER@PLACE with PLACE one of {', '.join(PLACES)},"
            " as in --fit ms=20@onnxruntime"
        )
    require_runtimes([PLACES[place]])
    if place == "cuda" and _device(config, place).type != "cuda":
        raise UserError(f"--fit {config.fit}: --device {config.device} is no CUDA device")
    return Target(ms, place)


def _device(config: CompareConfig, place: str) -> torch.device:
    return select_device(config.device.split(",")[0]) if place == "cuda" else torch.device("cpu")


@dataclass(frozen=True)
class FittedLatency:
    """What was found: a budget of FLOPs that gives the model, and its latency."""

    budget: str  # 'gflops=4.137@640'
    ms: float
    drift: float  # of the reference meanwhile, the largest

    def text(self, target: Target) -> str:
        error, drift = (formatted(x, "+.1%") for x in (self.ms / target.ms - 1, self.drift))
        return (
            f"--fit ms={target.ms:g}@{target.place}: {self.ms:.2f} ms ({error}) by --fit"
            f" {self.budget}; the reference drifted by {drift} meanwhile"
        )


class LatencyFitter:
    """Fits models to a target under the settings of a comparison; `reference` is the first one."""

    def __init__(
        self, config: CompareConfig, target: Target, reference: ModelSpec, *, classes: int
    ) -> None:
        self.target, self.size, self.classes = target, config.imgsz, classes
        self.device, runtime = _device(config, target.place), PLACES[target.place]
        sizes: dict[str, Any] = {"batches": (1,), "rounds": 200, "seconds": SECONDS}
        graph = config.latency_graph and self.device.type == "cuda"
        how: dict[str, Any] = {"dtype": config.latency_dtype, "graph": graph}
        self.timing = LatencyConfig(**sizes, **how, runtimes=(runtime,))
        self.reference, self.drifts = reference, [0.0]
        self.exports, self.busy = Path(), False
        where = [device_name(self.device), torch.get_num_threads(), versions((TORCH, runtime))]
        key = digest([*where, self.size, classes, model_id(reference), asdict(self.timing)])
        self.file = cache_file("fits", "").parent / "fits" / f"{key}.json"
        try:
            self.kept: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
            self.reference_ms = float(self.kept[KIND])
        except (OSError, ValueError, KeyError):
            self.kept, self.reference_ms = {}, 0.0

    def fit(self, draft: Draft) -> FittedLatency:
        """Scale a model as --fit gflops= does; UserError where none is within 3 % of the target."""
        start = draft.resolve()
        key = f"{model_id(start)} {self.target.ms:g}"
        try:
            return FittedLatency(**self.kept[key])
        except (KeyError, TypeError):
            self.drifts = [0.0]
        with tempfile.TemporaryDirectory() as folder:
            self.exports = Path(folder)
            if not self.reference_ms:
                found = (self._medians([self.reference])[0] for _ in range(REPEATS))
                self.reference_ms = min(found)  # the least busy one
            ms, budget = self._search(draft, start)
        fitted = FittedLatency(budget, ms, max(self.drifts, key=abs))
        if abs(ms / self.target.ms - 1) > TOLERANCE:
            raise UserError(
                f"{fitted.text(self.target)}; {draft.source} was not brought within {TOLERANCE:.0%}"
            )
        self.kept |= {KIND: self.reference_ms, key: asdict(fitted)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self.kept, indent=1))
        return fitted

    def _search(self, draft: Draft, start: ModelSpec) -> tuple[float, str]:
        """The nearest latency and its budget, interpolated between what is too fast or slow."""
        profile = profile_spec(start, image_size=self.size, classes=self.classes)
        wanted, goal = float(profile.flops), self.target.ms
        seen: dict[str, tuple[float, float, str]] = {}  # by model: latency, FLOPs, budget
        for attempt in range(ATTEMPTS):
            text, fitted = self._unseen(draft, wanted, seen)
            if fitted is None:
                break
            ms = self._latency(fitted.spec)
            seen[model_id(fitted.spec)] = ms, fitted.cost, text
            error = min(abs(one[0] / goal - 1) for one in seen.values())
            if error <= (GOOD if attempt < ATTEMPTS / 2 else TOLERANCE):
                break
            fast = [one[:2] for one in seen.values() if one[0] <= goal]
            slow = [one[:2] for one in seen.values() if one[0] > goal]
            if fast and slow:
                (ms_low, low), (ms_high, high) = max(fast), min(slow)
                wanted = low * (high / low) ** (
                    math.log(goal / ms_low) / math.log(ms_high / ms_low)
                )
            else:
                wanted = fitted.cost * min(max(goal / ms, 0.25), 4.0)
        if not seen:
            raise UserError(text)
        ms, _, text = min(seen.values(), key=lambda one: abs(one[0] - goal))
        return ms, text

    def _unseen(
        self, draft: Draft, flops: float, seen: Container[str]
    ) -> tuple[str, Fitted | None]:
        """A model of about these FLOPs, not seen yet, and its budget; None and a cause for none."""
        cause = ""
        for offset in OFFSETS:
            text = f"gflops={flops * (1 + offset) / 1e9:.5g}@{self.size}"
            try:
                budget = read_budget(text, image_size=self.size)
                fitted = fit(draft, budget, classes=self.classes)
            except UserError as error:  # no width comes near enough to these FLOPs
                cause = str(error)
                continue
            if model_id(fitted.spec) not in seen:
                return text, fitted
        return cause, None

    def _latency(self, spec: ModelSpec) -> float:
        """Corrected by the drift of the reference; near the target the median of several."""
        found = list[float]()
        while not found or (
            len(found) < REPEATS and abs(statistics.median(found) / self.target.ms - 1) < NEAR
        ):
            own, reference = self._medians([spec, self.reference])
            self.drifts.append(reference / self.reference_ms - 1)
            if self.drifts[-1] < -BUSY:
                self.busy = True
                self.file.unlink(missing_ok=True)
                times = f"{self.reference_ms:.1f} ms, now {reference:.1f} ms"
                raise UserError(
                    f"--fit: the device was busy when the reference was measured ({times});"
                    " run it again when nothing else runs"
                )
            found.append(own * self.reference_ms / reference)
        return statistics.median(found)

    def _medians(self, specs: Sequence[ModelSpec]) -> list[float]:
        """Milliseconds of one image, measured in turn."""
        models = []
        for number, spec in enumerate(specs):
            model = build_detector(spec, classes=self.classes)
            models.append(Candidate(str(number), model, self.size, model_id(spec)))
        found, _ = measure_latency(models, self.timing, device=self.device, exports=self.exports)
        for one in found.values():
            if one.cause is not None or one.p50_ms is None:
                raise UserError(f"--fit: {one.cause}")
        return [one.p50_ms for one in found.values() if one.p50_ms is not None]

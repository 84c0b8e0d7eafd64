"""One section of `python -m benchmarks.gpu`, in a process of its own: a line of JSON for each row.

`python -m benchmarks.gpu_rows SECTION --data FILE` prints `row {...}`; a row that fails has its
`cause`, and the others still run.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import BareStep, end_to_end, training_run
from engine.distributed import select_device
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from engine.measure.bench import TYPES, synchronize
from engine.measure.latency import Candidate, LatencyConfig, measure_latency
from engine.train.files import save
from engine.train.interrupts import StopRequest
from engine.train.loop import epoch_batches
from engine.train.state import TrainRun
from engine.train.step import train_epoch
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.config import option, parse
from utils.errors import cause_of, run_script

MARK = "row "
MODELS = {"yolov5n": 64, "yolov5s": 64, "yolov5l": 32, "yolov5l-ghost": 32}  # images per step
WAYS = {
    "--augment cpu": {"augment": "cpu", "cache": "none"},
    "--augment device": {"augment": "device", "cache": "none"},
    "--cache device": {"augment": "device", "cache": "device"},
}
SAME, SIMILAR = 1e-6, 0.05  # of losses: on a CPU, and where atomics sum gradients in any order
CLASSES = 80  # of the models whose latency is measured
MEGA = 2**20
Row = dict[str, Any]
Job = tuple[Row, Callable[[], Row | list[Row]]]  # what rows are about, and their numbers


@dataclass(frozen=True)
class RowsConfig:
    """The command line: the section and its sizes."""

    data: str = option(help="data set YAML")
    sections: tuple[str, ...] = option(flags=("--section",), help="MODEL, MODEL-cores, ...")
    device: str = option("", help="cpu or a GPU number; '': CUDA if present")
    imgsz: int = option(640, flags=("--img",), help="network size in pixels")
    batch_size: int = option(0, flags=("--batch",), help="images per step; 0: by model")
    workers: int = option(16, help="loading processes")
    steps: int = option(20, help="steps of a timing")
    models: tuple[str, ...] = option(tuple(MODELS), help="models whose latency is measured")
    latency_batches: tuple[int, ...] = option((1, 32), help="batch sizes of latency")
    latency_seconds: float = option(2.0, help="seconds for all models at each batch size")


def main(argv: list[str] | None = None) -> None:
    """Print the rows."""
    config = parse(RowsConfig, argv, prog="benchmarks.gpu_rows", description=__doc__ or "")
    for section in config.sections:
        for label, numbers in jobs(section, config):
            try:
                found = numbers()
            except Exception as error:  # whatever it is, the next row may work
                found = [{"cause": cause_of(error)}]
            for row in found if isinstance(found, list) else [found]:
                print(f"\n{MARK}{json.dumps({**label, **row})}", flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def jobs(section: str, config: RowsConfig) -> Iterator[Job]:
    """The rows of a section: latency, check, compiled, or a model; MODEL-cores is without steps."""
    if section == "latency":
        cuda = select_device(config.device).type == "cuda"
        for dtype in TYPES if cuda else ("fp32", "bf16"):
            for graph in (False, True) if cuda else (False,):
                yield {"type": dtype, "graph": graph}, _later(latencies, config, dtype, graph)
    elif section == "check":
        checks = {"DDP": distributed_step, "resume": resumed, "--batch-size -1": fitting_batch}
        for name, check in checks.items():
            yield {"check": name}, lambda check=check: check(config)
    elif section == "compiled":
        for model in MODELS:
            yield {"model": model, "what": "step, --compile"}, _later(step, config, model, True)
    else:
        model = section.removesuffix("-cores")
        if model == section:
            yield {"model": model, "what": "bare"}, _later(bare, config, model)
            yield {"model": model, "what": "step"}, _later(step, config, model, False)
        for way in WAYS:
            yield {"model": model, "what": way}, _later(whole, config, model, way)


def _later(function: Callable[..., Row], *arguments: Any) -> Callable[[], Row]:
    return lambda: function(*arguments)


def flags(config: RowsConfig, model: str, **more: Any) -> dict[str, Any]:
    """Of train.py."""
    batch = config.batch_size or MODELS.get(model, 16)
    own = {"cfg": model, "data": config.data, "imgsz": config.imgsz, "batch_size": batch}
    more = {"device": config.device, "workers": config.workers, "noautoanchor": True, **more}
    return {**own, **more}


def bare(config: RowsConfig, model: str) -> Row:
    """Forward, sum, backward on images that are there."""
    with training_run(**flags(config, model, workers=0)) as run:
        timing = BareStep(run, run.state.model, batch=run.config.batch_size)
        rate = timing.rate(config.steps)
        return {"images/s": rate, "batch": run.config.batch_size, "layout": timing.layout}


def step(config: RowsConfig, model: str, compiled: bool) -> Row:
    """Forward, loss, backward, update and averaging, again and again with one augmented batch."""
    more = {"workers": 0, "augment": "cpu", "cache": "none", "compile": compiled}
    with training_run(**flags(config, model, **more)) as run:
        device = run.world.device
        batch = next(run.loader.batches(0)).to(device)
        begun = time.perf_counter()
        train_epoch(run, [batch] * 3, StopRequest())
        synchronize(device)
        start = time.perf_counter()
        train_epoch(run, [batch] * config.steps, StopRequest())
        synchronize(device)
        rate = config.steps * len(batch) / (time.perf_counter() - start)
        return {"images/s": rate, "batch": len(batch), "first 3 steps s": start - begun}


def whole(config: RowsConfig, model: str, way: str) -> Row:
    """The second epoch of train.py from end to end, then a validation of the averaged weights."""
    with training_run(**flags(config, model, **WAYS[way])) as run:
        rate, waited = end_to_end(run, 0)
        average, device, settings = run.state.ema.model, run.world.device, EvalConfig()
        for _ in range(2):  # the first one starts processes and warms up
            start = time.perf_counter()
            speed = evaluate(
                average, run.val_loader, run.val, config=settings, device=device, progress=False
            ).speed
        seconds = time.perf_counter() - start
        return {
            "images/s": rate,
            "batch": run.config.batch_size,
            "between epochs s": waited,
            "waiting": run.clock.waited / (len(run.train.records) / rate),
            "val images/s": len(run.val.records) / seconds,
            "before ms": speed.pre,
            "network ms": speed.inference,
            "after ms": speed.nms,
        }


def latencies(config: RowsConfig, dtype: str, graph: bool) -> list[Row]:
    """All models in turn, at each batch size."""
    models = [
        Candidate(name, build_detector(load_spec(name), classes=CLASSES), config.imgsz)
        for name in config.models
    ]
    sizes = {"batches": config.latency_batches, "seconds": config.latency_seconds}
    timing = LatencyConfig(**sizes, dtype=dtype, graph=graph)
    found, _ = measure_latency(models, timing, device=select_device(config.device))
    return [
        {
            "model": name,
            "batch": batch,
            "layout": one.layout,
            "ms/image": one.p50_ms,
            "other layout": one.other_p50_ms,
            "MB": one.memory_bytes and one.memory_bytes / MEGA,
            **({"cause": one.cause} if one.cause else {}),
        }
        for (name, batch, _), one in found.items()
    ]


def distributed_step(config: RowsConfig) -> Row:
    """A process group of one rank: gradients as without it, and a sum over ranks."""
    with training_run(**flags(config, "yolov5n", workers=0)) as run:
        device, size = run.world.device, run.config.imgsz
        backend = "nccl" if device.type == "cuda" else "gloo"
        images = torch.rand(2, 3, size, size, device=device)
        plain = run.state.model
        with tempfile.TemporaryDirectory() as folder:
            store = dist.FileStore(str(Path(folder, "store")), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            try:
                ids = [device] if device.type == "cuda" else None
                wrapped = DistributedDataParallel(copy.deepcopy(plain), device_ids=ids)
                norms = []
                for model in (plain, wrapped):
                    torch.stack([y.square().mean() for y in model(images)]).sum().backward()
                    found = [p.grad for p in model.parameters() if p.grad is not None]
                    norms.append(float(torch.stack([g.square().sum() for g in found]).sum()))
                one = torch.ones(1, device=device)
                dist.all_reduce(one)
            finally:
                dist.destroy_process_group()
    return {"detail": backend, "expected": norms[0], "found": norms[1], **verdict(*norms, device)}


def verdict(expected: float, found: float, device: torch.device) -> Row:
    """Whether two results of the same work are the same."""
    limit = SAME if device.type == "cpu" else SIMILAR
    return {"result": "passed" if abs(found - expected) <= limit * abs(expected) else "FAILED"}


def resumed(config: RowsConfig) -> Row:
    """The loss of the second epoch, of a run that goes on and of one that was saved and resumed."""
    more = flags(config, "yolov5n", epochs=2)
    with training_run(**more) as run, tempfile.TemporaryDirectory() as folder:
        _epoch(run)
        run.state.start_epoch(1)
        save(run, "last.pt", resumable=True)
        other = shutil.copytree(run.folder, Path(folder, "other"))  # the first one is locked
        expected, device = _epoch(run), run.world.device
        with training_run(resume=str(other), device=config.device, workers=0) as again:
            found = _epoch(again)
    return {"detail": "loss", "expected": expected, "found": found,
            **verdict(expected, found, device)}  # fmt: skip


def _epoch(run: TrainRun) -> float:
    train_epoch(run, epoch_batches(run, validate=False), StopRequest())
    return float(run.state.mean_losses().sum())


def fitting_batch(config: RowsConfig) -> Row:
    """What --batch-size -1 chooses, and a bare step of that size."""
    with training_run(**flags(config, "yolov5n", batch_size=-1, workers=0)) as run:
        chosen, device = run.config.batch_size, run.world.device
        rate = BareStep(run, run.state.model, batch=chosen).rate(2)
        row = {"detail": f"{chosen} images, {rate:.0f} images/s bare", "result": "passed"}
        if device.type == "cuda":
            peak, total = torch.cuda.max_memory_reserved(device), torch.cuda.mem_get_info(device)[1]
            row["detail"] += f", {peak / 2**30:.1f} of {total / 2**30:.1f} GiB"
        return row


if __name__ == "__main__":
    run_script(main)

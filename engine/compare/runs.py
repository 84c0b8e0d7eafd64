"""Training runs as processes of their own: started, watched, stopped, continued and evaluated.

The record of a trained run is made of its checkpoint, or checked against it: files may have been
edited, and packages changed, while the comparison ran.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from data.loading.loader import LoaderConfig, ValLoader
from engine.checkpoint import load_checkpoint, load_detector
from engine.compare.plan import HALF, TRAINED, RunPlan, epochs_done, run_flags, state_of
from engine.compare.protocol import VERSIONS, Protocol, differences, listed, of_a_run, recipe
from engine.compare.record import FOLDER, Record, model_id, plain_spec, save_record
from engine.compare.schema import FAILED, Run
from engine.compare.setup import Comparison, require_one_training
from engine.distributed import select_device
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from engine.train.interrupts import StopRequest
from models.detector import Detector
from utils.environment import run_environment
from utils.errors import UserError, cause_of
from utils.files import ROOT
from utils.terminal import printable, say, warn

POLL = 0.2  # seconds between looks at the runs
LOG_EVERY = "10"  # seconds between lines of a progress bar in a log
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} remaining"
ERROR_MARKS = ("error: ", "internal error: ")
LONGEST_CAUSE = 300  # characters
REDRAW, REDRAW_LOG = 1.0, 60.0  # seconds between drawings of the bar: terminal, file
UNIT = 1e15  # FLOPs, of the bar
# Of a run's TrainConfig: paths and names, what the record has elsewhere, what differs by row.
NOT_KEPT = (
    "weights", "backbone_weights", "cfg", "backbone", "neck", "head", "data", "hyp", "resume",
    "device", "project", "name", "exist_ok", "seed",
    "loggers",
)  # fmt: skip


def training_command(plan: Comparison, run: RunPlan, device: str) -> list[str]:
    """The process that starts a run, or resumes it."""
    folder, config = plan.run_folder(run), plan.config
    command = [sys.executable, str(ROOT / "featherdet"), "train", "--workers", str(config.workers)]
    command += ["--noplots", "--device", device]
    if state_of(folder) == HALF:
        return [*command, "--resume", str(folder)]
    assert run.seed is not None
    command += ["--project", str(folder.parent), "--name", folder.name, "--exist-ok"]
    return command + run_flags(config, run.entry, run.seed, plan.protocol)


@dataclass
class _Job:
    run: RunPlan
    device: str
    process: subprocess.Popen[bytes]
    log: Path  # what train.py prints
    log_start: int  # bytes in the log that are of earlier sessions


def run_all(plan: Comparison, request: StopRequest) -> bool:
    """Train and evaluate what is not done yet; whether there was anything.

    As many runs at a time as there are devices.  One that fails, whatever way, leaves the others
    alone.  After a signal all runs save their state; then KeyboardInterrupt or TerminatedError.
    """
    waiting = [run for run in plan.runs if run.id not in plan.done]
    if len(waiting) < len(plan.runs):
        say(f"{len(plan.runs) - len(waiting)} of {len(plan.runs)} runs are done already")
    for entry in plan.models:
        if entry.cause is not None:
            warn(f"{entry.name} cannot run: {entry.cause}")
    if not waiting:
        return False
    # work in FLOPs, done epoch by epoch; what is there already counts, but not for the speed
    with tqdm(
        total=sum(run.work for run in plan.runs) / UNIT,
        initial=_work_done(plan),
        bar_format=BAR,
        dynamic_ncols=True,
        smoothing=0,
        miniters=0,
        mininterval=REDRAW if sys.stderr.isatty() else REDRAW_LOG,
    ) as bar:
        left = []
        for run in waiting:
            if run.seed is not None and state_of(plan.run_folder(run)) != TRAINED:
                left.append(run)
                continue
            _show(plan, bar, [run])
            with request.may_abort():
                _finish(plan, run, None, plan.devices[0])
        _train(plan, left, bar, request)
    return True


def _work_done(plan: Comparison) -> float:
    total = 0.0
    for run in plan.runs:
        share = 1.0 if run.id in plan.done or run.id in plan.failed else 0.0
        if not share and run.seed is not None:
            share = min(epochs_done(plan.run_folder(run)) / plan.config.epochs, 0.99)
        total += share * run.work / UNIT
    return total


def _show(plan: Comparison, bar: tqdm[NoReturn], running: Sequence[RunPlan]) -> None:
    """Move the bar, and name the runs under way."""
    names = ", ".join(run.title for run in running)
    ended = len({*plan.done, *plan.failed})
    bar.set_description_str(f"{ended}/{len(plan.runs)} runs {names}", refresh=False)
    bar.update(_work_done(plan) - bar.n)


def _finish(plan: Comparison, run: RunPlan, cause: str | None, device: str) -> None:
    """Evaluate a run that ended well and write its record; note the cause of one that did not."""
    if cause is None:
        try:
            plan.done[run.id] = evaluate_run(plan, run, device)
        except Exception as error:  # a fault of the program must not end the others either
            cause = cause_of(error)
    if cause is not None:
        cause = printable(cause)
        plan.failed[run.id] = Run(run.seed, FAILED, run.command, cause)
        warn(f"{run.title} failed: {cause}")
    else:
        ap = plan.done[run.id].accuracy["AP"]
        say(f"{run.title}: AP {'-' if ap is None else f'{ap:.3f}'}")


def _train(
    plan: Comparison, runs: list[RunPlan], bar: tqdm[NoReturn], request: StopRequest
) -> None:
    jobs, free = list[_Job](), list(plan.devices)
    try:
        while runs or jobs:
            while runs and free:
                jobs.append(_start(plan, runs.pop(0), free.pop(0)))
            _show(plan, bar, [job.run for job in jobs])
            time.sleep(POLL)
            if request.signal:
                _stop(jobs, request.signal)
                request.stop()
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                with request.may_abort():
                    _finish(plan, job.run, _cause(job), job.device)
                free.append(job.device)
    finally:
        _stop(jobs, request.signal or signal.SIGTERM)


def _start(plan: Comparison, run: RunPlan, device: str) -> _Job:
    log = plan.folder / "logs" / f"{run.id}.log"
    log.parent.mkdir(exist_ok=True)
    plan.run_folder(run).parent.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TQDM_MININTERVAL": LOG_EVERY}
    if threads := plan.protocol["device"]["threads"] or plan.config.threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = training_command(plan, run, device)
    with log.open("ab") as file:
        before = file.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    how = "resumes" if "--resume" in command else "starts"
    say(f"{run.title} {how}: {log}")
    return _Job(run, device, process, log, before)


def _stop(jobs: list[_Job], number: int) -> None:
    """Pass a signal on and wait until all runs have saved their state and ended."""
    for job in jobs:
        with contextlib.suppress(OSError, ValueError):  # Windows knows SIGTERM alone
            job.process.send_signal(number)
    try:
        for job in jobs:
            job.process.wait()
    except BaseException:  # a second signal
        for job in jobs:
            job.process.kill()
        raise
    jobs.clear()


def _cause(job: _Job) -> str | None:
    """Why a run failed, None if it did not: the last error it printed, or the signal it died of."""
    code = job.process.returncode
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"the run was ended by {name}{hint} (log: {job.log.name})"
    text = ""
    with contextlib.suppress(OSError):
        text = job.log.read_bytes()[job.log_start :].decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(ERROR_MARKS)]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return last.removeprefix("error: ")[:LONGEST_CAUSE]


def evaluate_run(plan: Comparison, run: RunPlan, device: str) -> Record:
    """Evaluate a trained run, or a given checkpoint, and write its record.

    Raises UserError for weights that cannot be read or evaluated, that are not of this run, or
    whose training differs from that of the runs already done; RuntimeError for lack of memory.
    """
    entry, config, target = run.entry, plan.config, select_device(device)
    assert plan.splits is not None
    trained = run.seed is not None
    folder = plan.run_folder(run)
    weights = folder / "weights" / "best.pt" if trained else Path(entry.model.weights)
    detector = load_detector(weights, device=target)
    saved = load_checkpoint(weights) if trained else {}
    settings: dict[str, Any] = {}
    if trained:
        training = {**plan.protocol["training"], "fit": entry.model.fit}  # of ms= that in FLOPs
        protocol = {**plan.protocol, "training": training}
        require_own(weights, detector, saved, entry.model_id, protocol)
        environment = dict(saved["environment"])
        settings = {**saved["config"], "fit": config.fit}
    else:
        environment = {**run_environment(target), "threads": plan.protocol["device"]["threads"]}
    index, pinned = plan.splits.evaluated, target.type == "cuda"
    sizes = (config.imgsz, config.batch_size, detector.max_stride)
    loader = LoaderConfig(*sizes, workers=config.workers, seed=0, pin_memory=pinned)
    metrics, *others = (
        evaluate(
            copy.deepcopy(detector).fuse(nms=nms),
            ValLoader(index, loader),
            index,
            config=EvalConfig(),
            device=target,
            progress=False,
        )
        for nms in ((False, True) if detector.has_branches else (False,))
    )
    for other in others:
        metrics = metrics.with_branch(other)
    record = Record(
        name=entry.name,
        model_id=entry.model_id,
        model=entry.model,
        spec=plain_spec(detector.spec, entry.model.source),
        seed=run.seed,
        protocol=of_a_run(plan.protocol),
        command=run.command,
        metrics=metrics.to_dict(),
        best_epoch=int(saved["epoch"]) - 1 if trained else None,
        curves=read_curves(folder / "results.csv") if trained else {},
        cost={key: getattr(entry.profile, key) for key in ("params", "macs", "flops")},
        environment=environment,
        training={k: v for k, v in settings.items() if k not in NOT_KEPT},
    )
    require_one_training([*plan.done.values(), record])
    return save_record(plan.folder / FOLDER, record, metrics.detections, plan.truth)


def require_own(
    weights: Path, detector: Detector, saved: Mapping[str, Any], model: str, protocol: Protocol
) -> None:
    """Refuse (UserError) a checkpoint that is not of this model (its hash) and this protocol."""
    found = model_id(detector.spec)
    if found != model:
        raise UserError(
            f"{weights}: it has another model ({found}) than the comparison's ({model}); was the"
            " model's file edited? Start a new comparison"
        )
    wanted = {key: protocol[key] for key in ("image_size", "training", VERSIONS)}
    stated = {**saved["config"], "hyp": recipe(saved["hyp"])}
    present = {
        "image_size": stated["imgsz"],
        "training": {key: stated.get(key, value) for key, value in wanted["training"].items()},
        VERSIONS: {key: saved["environment"].get(key, v) for key, v in wanted[VERSIONS].items()},
    }
    differing = differences(wanted, present)
    if differing:
        raise UserError(
            f"{weights}: trained by another protocol than the comparison's: {listed(differing)};"
            " remove its folder to train it again"
        )


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """results.csv of a training run by column; None where a cell is empty or not finite."""
    columns: dict[str, list[float | None]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    value = float(cell or "nan")
                    columns.setdefault(name, []).append(value if math.isfinite(value) else None)
    except Exception as error:
        raise UserError(f"{path}: not the results of a run: {error}") from error
    return columns

"""Training runs as processes of their own: started, watched, stopped, continued and evaluated."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from engine.checkpoint import load_checkpoint
from engine.compare.evaluation import evaluate_run
from engine.compare.plan import RunPlan, run_flags
from engine.compare.schema import FAILED, Run
from engine.compare.setup import Comparison
from engine.train.interrupts import StopRequest
from utils.errors import UserError, cause_of
from utils.files import ROOT
from utils.terminal import printable, say, warn

NEW, HALF, TRAINED = "to do", "half done", "trained, to be evaluated"
POLL = 0.2  # seconds between looks at the runs
LOG_EVERY = "10"  # seconds between lines of a progress bar in a log
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
ERROR_MARKS = ("error: ", "internal error: ")
LONGEST_CAUSE = 300  # characters
REDRAW, REDRAW_LOG = 1.0, 60.0  # seconds between drawings of the bar: terminal, file
UNIT = 1e15  # FLOPs, of the bar


def state_of(folder: Path) -> str:
    """NEW, HALF (last.pt has a state to resume) or TRAINED, by a run's folder.

    A damaged last.pt is NEW: the run begins again.
    """
    try:
        saved = load_checkpoint(folder / "weights" / "last.pt")
    except UserError:
        return NEW
    return TRAINED if saved.get("train_state") is None else HALF


def epochs_done(folder: Path) -> int:
    """Complete epochs, by the lines of results.csv in a run's folder."""
    try:
        text = (folder / "results.csv").read_text(encoding="utf-8")
    except OSError:
        return 0
    return max(len(text.splitlines()) - 1, 0)


def training_command(plan: Comparison, run: RunPlan, device: str) -> list[str]:
    """The process that starts a run, or resumes it."""
    folder, config = plan.run_folder(run), plan.config
    command = [sys.executable, str(ROOT / "train.py"), "--workers", str(config.workers)]
    command += ["--noplots", "--device", device]
    if state_of(folder) == HALF:
        return [*command, "--resume", str(folder)]
    assert run.seed is not None
    command += ["--project", str(folder.parent), "--name", folder.name, "--exist-ok"]
    return command + run_flags(config, run.entry, run.seed)


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
        tqdm.write(f"{run.title} failed: {cause}", file=sys.stderr)
    else:
        ap = plan.done[run.id].accuracy["AP"]
        tqdm.write(f"{run.title}: AP {'-' if ap is None else f'{ap:.3f}'}")


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
    environment = {**os.environ, "TQDM_MININTERVAL": LOG_EVERY}
    threads = plan.protocol["device"]["threads"]
    if threads is not None:
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
    tqdm.write(f"{run.title} {how}: {log}")
    return _Job(run, device, process, log, before)


def _stop(jobs: list[_Job], number: int) -> None:
    """Pass a signal on and wait until all runs have saved their state and ended."""
    for job in jobs:
        with contextlib.suppress(OSError):
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

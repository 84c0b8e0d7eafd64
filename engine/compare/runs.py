"""Training runs as processes of their own: started, watched, stopped and continued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from engine.checkpoint import load_checkpoint
from engine.compare.plan import RunPlan, run_flags
from engine.compare.record import Record
from engine.compare.schema import Run
from engine.compare.setup import Comparison
from engine.train.interrupts import StopRequest, stop
from utils.errors import UserError
from utils.paths import ROOT

NEW, HALF, TRAINED = "new", "half", "trained"
POLL = 0.2  # seconds between looks at the runs
LOG_EVERY = "10"  # seconds between lines of a progress bar in a log
BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"
ERROR_MARKS = ("error: ", "internal error: ")
LONGEST_CAUSE = 300  # characters
REDRAW, REDRAW_LOG = 1.0, 60.0  # seconds between drawings of the bar: terminal, file
UNIT = 1e15  # FLOPs, of the bar


@dataclass
class Session:
    """A comparison in its folder: what is done and what failed so far, by run."""

    plan: Comparison
    folder: Path
    done: dict[str, Record] = field(default_factory=dict)
    failed: dict[str, Run] = field(default_factory=dict)

    def run_folder(self, plan: RunPlan) -> Path:
        """What train.py writes to."""
        return self.folder / "runs" / plan.id

    def epochs_done(self, plan: RunPlan) -> int:
        """Complete epochs, by the lines of results.csv."""
        try:
            text = (self.run_folder(plan) / "results.csv").read_text(encoding="utf-8")
        except OSError:
            return 0
        return max(len(text.splitlines()) - 1, 0)

    def bar(self) -> tqdm[NoReturn]:
        """A bar over all runs: work in FLOPs, done epoch by epoch; time left by the speed so far.

        What is there already counts as done, but not for the speed.
        """
        return tqdm(
            total=sum(run.work for run in self.plan.runs) / UNIT,
            initial=self._work_done(),
            bar_format=BAR,
            dynamic_ncols=True,
            smoothing=0,
            miniters=0,
            mininterval=REDRAW if sys.stderr.isatty() else REDRAW_LOG,
        )

    def show(self, bar: tqdm[NoReturn], running: Sequence[RunPlan]) -> None:
        """Move the bar, and name the runs under way."""
        names = ", ".join(run.title for run in running)
        ended = len({*self.done, *self.failed})
        bar.set_description_str(f"{ended}/{len(self.plan.runs)} runs {names}", refresh=False)
        bar.update(self._work_done() - bar.n)

    def _work_done(self) -> float:
        total = 0.0
        for run in self.plan.runs:
            share = 1.0 if run.id in self.done or run.id in self.failed else 0.0
            if not share and run.seed is not None:
                share = min(self.epochs_done(run) / self.plan.config.epochs, 0.99)
            total += share * run.work / UNIT
        return total


def state_of(folder: Path) -> str:
    """NEW, HALF (last.pt has a state to resume) or TRAINED, by a run's folder.

    A damaged last.pt is NEW: the run begins again.
    """
    try:
        saved = load_checkpoint(folder / "weights" / "last.pt")
    except UserError:
        return NEW
    return TRAINED if saved.get("train_state") is None else HALF


def training_command(session: Session, plan: RunPlan, device: str) -> list[str]:
    """The process that starts a run, or resumes it."""
    folder, config = session.run_folder(plan), session.plan.config
    command = [sys.executable, str(ROOT / "train.py"), "--workers", str(config.workers)]
    command += ["--noplots", "--device", device]
    if state_of(folder) == HALF:
        return [*command, "--resume", str(folder)]
    assert plan.seed is not None
    command += ["--project", str(folder.parent), "--name", folder.name, "--exist-ok"]
    return command + run_flags(config, plan.entry, plan.seed)


@dataclass
class _Job:
    plan: RunPlan
    device: str
    process: subprocess.Popen[bytes]
    log: Path  # what train.py prints
    log_start: int  # bytes in the log that are of earlier sessions


def train_all(
    session: Session,
    plans: Sequence[RunPlan],
    bar: tqdm[NoReturn],
    *,
    request: StopRequest,
    finish: Callable[[RunPlan, str | None, str], None],
) -> None:
    """Carry out all runs, as many at a time as there are devices.

    finish: called for each run that ended, with the cause of a failure and the device that is free
    now.  A run that fails, whatever way, leaves the others alone.  After SIGINT or SIGTERM all runs
    save their state; then KeyboardInterrupt or TerminatedError.
    """
    waiting, jobs = list(plans), list[_Job]()
    free = list(session.plan.devices)
    try:
        while waiting or jobs:
            while waiting and free:
                jobs.append(_start(session, waiting.pop(0), free.pop(0)))
            session.show(bar, [job.plan for job in jobs])
            time.sleep(POLL)
            if request.signal:
                _stop(jobs, request.signal)
                stop(request.signal)
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                with request.may_abort():
                    finish(job.plan, _cause(job), job.device)
                free.append(job.device)
    finally:
        _stop(jobs, request.signal or signal.SIGTERM)


def _start(session: Session, plan: RunPlan, device: str) -> _Job:
    log = session.folder / "logs" / f"{plan.id}.log"
    log.parent.mkdir(exist_ok=True)
    session.run_folder(plan).parent.mkdir(exist_ok=True)
    environment = {**os.environ, "TQDM_MININTERVAL": LOG_EVERY}
    if session.plan.threads is not None:
        environment["OMP_NUM_THREADS"] = str(session.plan.threads)
    command = training_command(session, plan, device)
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
    tqdm.write(f"{plan.title} {how}: {log}")
    return _Job(plan, device, process, log, before)


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

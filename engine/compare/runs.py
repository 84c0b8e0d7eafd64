"""Training runs as processes of their own: started, watched, stopped and continued."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.checkpoint import load_checkpoint
from engine.compare.plan import RunPlan, run_flags
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
REDRAW, REDRAW_LOG = 1.0, 60.0  # seconds between lines of the bar, on a terminal and in a file
UNIT = 1e15  # FLOPs, of the bar


@dataclass(frozen=True)
class Session:
    """A comparison in its folder."""

    plan: Comparison
    folder: Path

    def run_folder(self, plan: RunPlan) -> Path:
        """What train.py writes to."""
        return self.folder / "runs" / plan.id

    def log(self, plan: RunPlan) -> Path:
        """What train.py prints."""
        return self.folder / "logs" / f"{plan.id}.log"

    def best(self, plan: RunPlan) -> Path:
        """The checkpoint that is evaluated."""
        return self.run_folder(plan) / "weights" / "best.pt"

    def epochs_done(self, plan: RunPlan) -> int:
        """Complete epochs, by the lines of results.csv."""
        try:
            text = (self.run_folder(plan) / "results.csv").read_text(encoding="utf-8")
        except OSError:
            return 0
        return max(len(text.splitlines()) - 1, 0)

    def share_done(self, plan: RunPlan) -> float:
        """How much of a run is done, 0 to 0.99: it is not evaluated yet."""
        if plan.seed is None:
            return 0.0
        return min(self.epochs_done(plan) / self.plan.config.epochs, 0.99)


def state_of(folder: Path) -> str:
    """NEW, HALF (last.pt has a state to resume) or TRAINED, by a run's folder.

    A damaged last.pt is NEW: the run begins again.
    """
    last = folder / "weights" / "last.pt"
    try:
        saved = load_checkpoint(last) if last.is_file() else None
    except UserError:
        return NEW
    if saved is None:
        return NEW
    return TRAINED if saved.get("train_state") is None else HALF


def training_command(session: Session, plan: RunPlan, device: str) -> list[str]:
    """The process that starts a run, or resumes it."""
    folder, config = session.run_folder(plan), session.plan.config
    command = [sys.executable, str(ROOT / "train.py")]
    common = ["--workers", str(config.workers), "--noplots"]
    if device:
        common += ["--device", device]
    if state_of(folder) == HALF:
        return [*command, "--resume", str(folder), *common]
    assert plan.seed is not None, f"{plan.title} is a checkpoint"
    flags = run_flags(config, plan.entry, plan.seed)
    target = ["--project", str(folder.parent), "--name", folder.name, "--exist-ok"]
    return [*command, *flags, *common, *target]


@dataclass
class _Job:
    plan: RunPlan
    device: str
    process: subprocess.Popen[bytes]
    log_start: int  # bytes in the log that are of earlier sessions


class Progress:
    """One bar over all runs: work in FLOPs, done epoch by epoch; time left by the speed so far.

    What was there at the start counts as done, but not for the speed.
    """

    def __init__(self, plans: Sequence[RunPlan], done: dict[str, float]) -> None:
        self._work = {plan.id: plan.work / UNIT for plan in plans}
        self._share = {plan.id: done.get(plan.id, 0.0) for plan in plans}
        self._bar = tqdm(
            total=sum(self._work.values()),
            initial=self._sum(),
            bar_format=BAR,
            dynamic_ncols=True,
            smoothing=0,
        )
        self._interval = REDRAW if sys.stderr.isatty() else REDRAW_LOG
        self._text, self._drawn = "", 0.0
        self.describe(())

    def _sum(self) -> float:
        return sum(self._work[key] * share for key, share in self._share.items())

    def set(self, plan: RunPlan, share: float) -> None:
        """How much of a run is done, 0 to 1."""
        self._share[plan.id] = share
        self._bar.n = self._sum()

    def describe(self, running: Sequence[str]) -> None:
        """Show which runs are under way."""
        finished = sum(share >= 1 for share in self._share.values())
        names = ", ".join(running)
        text = f"{finished}/{len(self._share)} runs {names}".rstrip()
        now = time.monotonic()
        if text != self._text or now - self._drawn > self._interval:
            self._text, self._drawn = text, now
            self._bar.set_description_str(text)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


Finish = Callable[[RunPlan, str | None, str], None]
"""What to do with a run that ended: the run, the cause of a failure, the device that is free."""


def train_all(
    plans: Sequence[RunPlan],
    session: Session,
    *,
    request: StopRequest,
    progress: Progress,
    finish: Finish,
) -> None:
    """Carry out all runs, as many at a time as there are devices, and `finish` each.

    A run that fails, whatever way, leaves the others alone.  After SIGINT or SIGTERM all runs save
    their state; then KeyboardInterrupt or TerminatedError.
    """
    waiting, jobs = list(plans), list[_Job]()
    free = list(session.plan.devices)
    try:
        while waiting or jobs:
            while waiting and free:
                plan = waiting.pop(0)
                jobs.append(_start(session, plan, free.pop(0)))
            progress.describe([job.plan.title for job in jobs])
            time.sleep(POLL)
            if request.signal:
                _stop(jobs, request.signal)
                stop(request.signal)
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                with request.may_abort():
                    finish(job.plan, _cause(session, job), job.device)
                progress.set(job.plan, 1.0)
                free.append(job.device)
            for job in jobs:
                progress.set(job.plan, session.share_done(job.plan))
    finally:
        _stop(jobs, request.signal or signal.SIGTERM)


def _start(session: Session, plan: RunPlan, device: str) -> _Job:
    log = session.log(plan)
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
    return _Job(plan, device, process, before)


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


def _cause(session: Session, job: _Job) -> str | None:
    """Why a run failed, None if it did not: the last error it printed, or the signal it died of."""
    code = job.process.returncode
    if code == 0:
        return None
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; out of memory?" if name == "SIGKILL" else ""
        return f"the run was ended by {name}{hint} (log: {session.log(job.plan).name})"
    try:
        written = session.log(job.plan).read_bytes()[job.log_start :]
        text = written.decode("utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(ERROR_MARKS)]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return last.removeprefix("error: ")[:LONGEST_CAUSE]

"""A comparison from settings to its report: `compare(CompareConfig(...))`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.compare.config import CompareConfig
from engine.compare.costs import measure, with_speedup
from engine.compare.evaluation import evaluate_run
from engine.compare.folder import comparison_folder, locked_folder
from engine.compare.plan import RunPlan
from engine.compare.report.page import examples, write_report
from engine.compare.report.plots import write_plots
from engine.compare.report.tables import ModelRuns, rows
from engine.compare.report.text import complete, console, csv_table, markdown
from engine.compare.runs import HALF, NEW, TRAINED, Session, state_of, train_all
from engine.compare.schema import FAILED, PARTLY, Results, Run
from engine.compare.setup import Comparison, finished_runs, plan_comparison
from engine.measure.latency import LatencyConfig
from engine.train.interrupts import StopRequest, stop_requests
from utils.errors import PartlyDoneError, TerminatedError, cause_of
from utils.files import write_text
from utils.terminal import printable, say, warn

GIGA, PETA = 1e9, 1e15
RESULTS = "results.json"


def compare(config: CompareConfig) -> Path | None:
    """Carry out a comparison, or continue it; the folder of its table, None for --dry-run.

    Raises UserError for settings, files or data that cannot work, PartlyDoneError when the table
    has failed rows, TerminatedError or KeyboardInterrupt after a signal, with all finished runs
    kept and the running ones saved.
    """
    with stop_requests() as request:
        with request.may_abort():
            plan = plan_comparison(config)
        if config.dry_run:
            say(_listing(plan))
            return None
        target = (config.project, config.name, plan.lock)
        with locked_folder(*target, exist_ok=config.exist_ok) as folder:
            session = Session(plan, folder)
            try:
                changed = _run_all(session, request)
                with request.may_abort():
                    results = _conclude(session, changed=changed)
            except (KeyboardInterrupt, TerminatedError):
                warn(f"stopped; the same command continues in {folder}")
                raise
    _report_failures(results, folder)
    return folder


def _report_failures(results: Results, folder: Path) -> None:
    """PartlyDoneError where a row failed or could not be measured."""
    unmeasured = [
        f"{row.name}: latency at batch {one.batch}: {one.cause}"
        for row in results.rows
        for one in row.latency
        if one.cause is not None
    ]
    for text in unmeasured:
        warn(text)
    if failed := [row.name for row in results.rows if row.status in {FAILED, PARTLY}]:
        raise PartlyDoneError(
            f"{len(failed)} of {len(results.rows)} models failed, at least in part:"
            f" {', '.join(failed)}; the causes are in {folder / 'table.md'}. The same command"
            " tries them again"
        )
    if unmeasured:
        raise PartlyDoneError(
            f"{len(unmeasured)} latencies could not be measured; all else is done"
        )


def _listing(plan: Comparison) -> str:
    """The text of --dry-run: each run with its state and costs, then what cannot run."""
    config = plan.config
    folder = comparison_folder(config.project, config.name, plan.lock, exist_ok=config.exist_ok)
    session = Session(plan, folder)
    done = finished_runs(plan, folder)
    lines = [f"{config.kind}: {len(plan.runs)} runs, {len(plan.models)} models; folder {folder}"]
    for entry in plan.models:
        if entry.profile is None:
            lines.append(f"  {entry.name}: cannot run: {entry.cause}")
            continue
        cost = f"{entry.profile.params:,} parameters, {entry.profile.flops / GIGA:.3f} GFLOPs"
        lines.append(f"  {entry.name}: {cost} at {config.imgsz} px")
        lines += [f"    note: {note}" for note in entry.model.notes]
        for run in (run for run in plan.runs if run.entry is entry):
            state = "to do"
            found = NEW if run.seed is None else state_of(session.run_folder(run))
            if run.id in done:
                state = "done"
            elif found == HALF:
                state = f"half done, {session.epochs_done(run)} of {config.epochs} epochs"
            elif found == TRAINED:
                state = "trained, to be evaluated"
            lines.append(f"    {run.title}: {state}; {run.work / PETA:.3g} PFLOPs")
            lines.append(f"      {run.command}")
    left = sum(run.work for run in plan.runs if run.id not in done)
    end = f"to do: {left / PETA:.3g} PFLOPs (a training step counts as three forward passes)"
    return "\n".join([*lines, end])


def _run_all(session: Session, request: StopRequest) -> bool:
    """Train and evaluate what is not done yet; whether there was anything."""
    plan = session.plan
    session.done = finished_runs(plan, session.folder)
    waiting = [run for run in plan.runs if run.id not in session.done]
    if len(waiting) < len(plan.runs):
        say(f"{len(plan.runs) - len(waiting)} of {len(plan.runs)} runs are done already")
    for entry in plan.models:
        if entry.cause is not None:
            warn(f"{entry.name} cannot run: {entry.cause}")
    if not waiting:
        return False
    left = []
    with session.bar() as bar:
        for run in waiting:
            if run.seed is not None and state_of(session.run_folder(run)) != TRAINED:
                left.append(run)
                continue
            session.show(bar, [run])
            with request.may_abort():
                _finish(session, run, None, plan.devices[0])
        train_all(session, left, bar, request=request, finish=partial(_finish, session))
    return True


def _finish(session: Session, run: RunPlan, cause: str | None, device: str) -> None:
    """Evaluate a run that ended well and write its record; note the cause of one that did not.

    Any failure here is this run's alone.
    """
    if cause is None:
        try:
            session.done[run.id] = evaluate_run(session, run, device)
        except Exception as error:  # a fault of the program must not end the others either
            cause = cause_of(error)
    if cause is not None:
        cause = printable(cause)
        session.failed[run.id] = Run(run.seed, FAILED, run.command, cause)
        tqdm.write(f"{run.title} failed: {cause}", file=sys.stderr)
    else:
        ap = session.done[run.id].accuracy["AP"]
        tqdm.write(f"{run.title}: AP {'-' if ap is None else f'{ap:.3f}'}")


def _conclude(session: Session, *, changed: bool) -> Results:
    """Measure costs, and write everything that the folder is for."""
    plan, folder, config = session.plan, session.folder, session.plan.config
    models = []
    for entry in plan.models:
        ids = [run.id for run in plan.runs if run.entry is entry]
        finished = [session.done[item] for item in ids if item in session.done]
        failed = [session.failed[item] for item in ids if item in session.failed]
        models.append(ModelRuns(entry, finished, failed))
    made = rows(models, truth=plan.truth, images=plan.images, baseline=plan.baseline)
    results = Results(config.command(), plan.protocol, plan.baseline, made)
    if changed or not (folder / RESULTS).is_file():
        _write(results, folder)  # what was trained is in the table in any case
    say("measuring latency ...")
    timing = LatencyConfig(batches=config.latency_batches, seconds=config.latency_seconds)
    measurement, made = measure(made, plan.models, device=plan.device, config=timing)
    made = with_speedup(made, plan.baseline)
    results = replace(results, rows=made, measurement=measurement)
    plain = _write(results, folder)
    write_plots(plain, folder)
    report = write_report(plain, folder, examples=examples(plan.splits, models))
    say(console(plain))
    say(f"results.json, table.csv, table.md, plots and {report.name} are in {folder}")
    return results


def _write(results: Results, folder: Path) -> dict[str, Any]:
    """Write results.json and the tables; the content of results.json is returned."""
    plain = complete(asdict(results))
    write_text(folder / RESULTS, json.dumps(plain, indent=1, allow_nan=False))
    write_text(folder / "table.csv", csv_table(plain))
    write_text(folder / "table.md", markdown(plain))
    return plain

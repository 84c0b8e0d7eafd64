"""A comparison from settings to its report: `compare(CompareConfig(...))`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from engine.compare.config import CompareConfig
from engine.compare.costs import measure, with_speedup
from engine.compare.plan import HALF, epochs_done, state_of
from engine.compare.protocol import comparison_folder, locked_folder
from engine.compare.report.page import examples, page
from engine.compare.report.plots import write_plots
from engine.compare.report.tables import ModelRuns, rows
from engine.compare.report.text import complete, console, csv_table, markdown
from engine.compare.runs import run_all
from engine.compare.schema import FAILED, PARTLY, Results
from engine.compare.setup import Comparison, plan_comparison
from engine.distributed import select_device
from engine.measure.latency import LatencyConfig
from engine.train.interrupts import stop_requests
from utils.environment import use_threads
from utils.errors import PartlyDoneError, TerminatedError
from utils.files import write_text
from utils.terminal import say, warn

GIGA, PETA = 1e9, 1e15
RESULTS = "results.json"


def compare(config: CompareConfig) -> Path | None:
    """Carry out a comparison, or continue it; the folder of its table, None for --dry-run.

    Raises UserError for settings, files or data that cannot work, PartlyDoneError when the table
    has failed rows, TerminatedError or KeyboardInterrupt after a signal, with all finished runs
    kept and the running ones saved.
    """
    use_threads(config.threads)
    with stop_requests() as request:
        with request.may_abort():
            plan = plan_comparison(config)
        if config.dry_run:
            plan.continue_in(comparison_folder(config, plan.lock))
            say(_listing(plan))
            return None
        with locked_folder(config, plan.lock) as folder:
            try:
                plan.continue_in(folder)
                for entry in plan.models:
                    for note in entry.model.notes:
                        say(f"{entry.name}: {note}")
                changed = run_all(plan, request)
                with request.may_abort():
                    results = _conclude(plan, changed=changed)
            except (KeyboardInterrupt, TerminatedError):
                warn(f"stopped; the same command continues in {folder}")
                raise
    _report_failures(results, folder)
    return folder


def _report_failures(results: Results, folder: Path) -> None:
    """PartlyDoneError where a row failed or could not be measured."""
    unmeasured = [
        f"{row.name}: latency at batch {one.batch} in {one.runtime}: {one.cause}"
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
    config, many = plan.config, f"{len(plan.runs)} runs, {len(plan.models)} models"
    lines = [f"{config.kind}: {many}; folder {plan.folder}"]
    for entry in plan.models:
        if entry.profile is None:
            lines.append(f"  {entry.name}: cannot run: {entry.cause}")
            continue
        cost = f"{entry.profile.params:,} parameters, {entry.profile.flops / GIGA:.3f} GFLOPs"
        lines.append(f"  {entry.name}: {cost} at {config.imgsz} px")
        lines += [f"    note: {note}" for note in entry.model.notes]
        for run in (run for run in plan.runs if run.entry is entry):
            folder = plan.run_folder(run)
            state = "done" if run.id in plan.done else state_of(folder)
            if state == HALF:
                state += f", {epochs_done(folder)} of {config.epochs} epochs"
            lines.append(f"    {run.title}: {state}; {run.work / PETA:.3g} PFLOPs")
            lines.append(f"      {run.command}")
    left = sum(run.work for run in plan.runs if run.id not in plan.done)
    end = f"to do: {left / PETA:.3g} PFLOPs (a training step counts as three forward passes)"
    return "\n".join([*lines, end])


def _conclude(plan: Comparison, *, changed: bool) -> Results:
    """Measure costs, and write everything that the folder is for."""
    folder, config = plan.folder, plan.config
    models = []
    for entry in plan.models:
        ids = [run.id for run in plan.runs if run.entry is entry]
        finished = [plan.done[item] for item in ids if item in plan.done]
        failed = [plan.failed[item] for item in ids if item in plan.failed]
        models.append(ModelRuns(entry, finished, failed))
    made = rows(models, truth=plan.truth, baseline=plan.baseline)
    results = Results(config.command(), plan.protocol, plan.baseline, made)
    if changed or not (folder / RESULTS).is_file():
        _write(results, folder)  # what was trained is in the table in any case
    say("measuring latency ...")
    timing = LatencyConfig(
        batches=config.latency_batches,
        seconds=config.latency_seconds,
        dtype=config.latency_dtype,
        graph=config.latency_graph,
        runtimes=config.runtime,
    )
    device = select_device(plan.devices[0])
    exports = folder / "exports"
    measurement, made = measure(made, plan.models, device=device, config=timing, exports=exports)
    made = with_speedup(made, plan.baseline)
    results = replace(results, rows=made, measurement=measurement)
    plain = _write(results, folder)
    write_plots(plain, folder)
    write_text(folder / "report.html", page(plain, examples(plan.splits, models)))
    say(console(plain))
    say(f"results.json, table.csv, table.md, plots and report.html are in {folder}")
    return results


def _write(results: Results, folder: Path) -> dict[str, Any]:
    """Write results.json and the tables; the content of results.json is returned."""
    plain = complete(asdict(results))
    write_text(folder / RESULTS, json.dumps(plain, indent=1, allow_nan=False))
    write_text(folder / "table.csv", csv_table(plain))
    write_text(folder / "table.md", markdown(plain))
    return plain

"""A comparison from settings to its report: `compare(CompareConfig(...))`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.compare.config import EVALUATE, CompareConfig
from engine.compare.costs import measure, with_measured, with_speedup
from engine.compare.evaluation import judge
from engine.compare.folder import comparison_folder, held_folder
from engine.compare.plan import RunPlan
from engine.compare.report.examples import examples
from engine.compare.report.page import write_report
from engine.compare.report.plots import write_plots
from engine.compare.report.tables import Evidence, Failed, Finished, accuracy_of, rows
from engine.compare.report.text import complete, console, csv_table, markdown
from engine.compare.runs import HALF, TRAINED, Progress, Workshop, state_of, train_all
from engine.compare.schema import FAILED, FORMAT, PARTLY, Results
from engine.compare.setup import Comparison, finished_runs, prepare
from engine.measure.latency import LatencyConfig
from engine.train.interrupts import StopRequest, stop_requests
from utils.errors import PartlyDoneError, TerminatedError, cause_of
from utils.files import write_text
from utils.terminal import printable, say, warn

GIGA, PETA = 1e9, 1e15
RESULTS = "results.json"


def compare(config: CompareConfig) -> Path | None:
    """Carry out a comparison, or go on with it; the folder of its table, None for --dry-run.

    Raises UserError for settings, files or data that cannot work, PartlyDoneError when the table
    has failed rows, TerminatedError or KeyboardInterrupt after a signal, with all finished runs
    kept and the running ones saved.
    """
    with stop_requests() as request:
        with request.may_abort():
            plan = prepare(config)
        if config.dry_run:
            say(_listing(plan))
            return None
        place = held_folder(config.project, config.name, plan.lock, exist_ok=config.exist_ok)
        with place as (folder, held):
            bout = _Bout(plan, folder, held)
            try:
                bout.run(request)
                with request.may_abort():
                    results = bout.conclude()
            except (KeyboardInterrupt, TerminatedError):
                sys.stderr.write(f"\nstopped; the same command goes on in {folder}\n")
                raise
    unmeasured = [
        f"{row['name']}: latency at batch {one['batch']}: {one['cause']}"
        for row in results["rows"]
        for one in row["latency"]
        if one["cause"] is not None
    ]
    for text in unmeasured:
        warn(text)
    failed = [row["name"] for row in results["rows"] if row["status"] in {FAILED, PARTLY}]
    if failed:
        raise PartlyDoneError(
            f"{len(failed)} of {len(results['rows'])} models failed, at least in part:"
            f" {', '.join(failed)}; their causes are in {folder / 'table.md'}. Starting"
            " again tries them again"
        )
    if unmeasured:
        raise PartlyDoneError(
            f"{len(unmeasured)} latencies could not be measured; all else is done"
        )
    return folder


def _listing(plan: Comparison) -> str:
    """What --dry-run says: each run with its state and costs, then what cannot run."""
    config = plan.config
    folder = comparison_folder(config.project, config.name, plan.lock, exist_ok=config.exist_ok)
    shop = Workshop(config, folder, plan.devices, plan.threads)
    done = finished_runs(plan, folder)
    lines = [f"{config.kind}: {len(plan.runs)} runs, {len(plan.models)} models; folder {folder}"]
    for model in plan.models:
        if model.profile is None:
            lines.append(f"  {model.name}: cannot run: {model.cause}")
            continue
        cost = f"{model.profile.params:,} parameters, {model.profile.flops / GIGA:.3f} GFLOPs"
        lines.append(f"  {model.name}: {cost} at {config.imgsz} px")
        lines += [f"    note: {note}" for note in model.model["notes"]]
        for run in plan.runs:
            if run.contender is model:
                state = "done" if run.id in done else _state(shop, run)
                lines.append(f"    {run.title}: {state}; {run.work / PETA:.3g} PFLOPs")
                lines.append(f"      {run.command}")
    left = sum(run.work for run in plan.runs if run.id not in done)
    lines.append(f"to do: {left / PETA:.3g} PFLOPs (a training step is taken as three forwards)")
    return "\n".join(lines)


def _state(shop: Workshop, run: RunPlan) -> str:
    found = state_of(shop.run_folder(run)) if run.seed is not None else ""
    if found == HALF:
        return f"half done, {shop.epochs_done(run)} of {shop.config.epochs} epochs"
    return "trained, to be evaluated" if found == TRAINED else "to do"


@dataclass
class _Bout:
    """One sitting of a comparison in its folder."""

    plan: Comparison
    folder: Path
    held: int
    done: dict[str, Finished] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)
    news: bool = False  # whether this sitting had runs to do

    def run(self, request: StopRequest) -> None:
        """Train and evaluate what is not done yet."""
        plan, config = self.plan, self.plan.config
        self.done = finished_runs(plan, self.folder)
        shop = Workshop(config, self.folder, plan.devices, plan.threads, (self.held,))
        waiting = [run for run in plan.runs if run.id not in self.done]
        if len(waiting) < len(plan.runs):
            say(f"{len(plan.runs) - len(waiting)} of {len(plan.runs)} runs are done already")
        for model in plan.models:
            if model.cause is not None:
                warn(f"{model.name} cannot run: {model.cause}")
        self.news = bool(waiting)
        if not waiting:
            return
        shares = {run.id: 1.0 if run.id in self.done else _share(shop, run) for run in plan.runs}
        progress = Progress(plan.runs, shares)
        try:
            if config.kind == EVALUATE:
                self._evaluate_all(waiting, shop, request, progress)
            else:
                trained = [run for run in waiting if state_of(shop.run_folder(run)) == TRAINED]
                self._evaluate_all(trained, shop, request, progress)
                train_all(
                    [run for run in waiting if run not in trained],
                    shop,
                    request=request,
                    progress=progress,
                    finish=lambda run, cause, device: self._finish(shop, run, cause, device),
                )
        finally:
            progress.close()

    def _evaluate_all(
        self, runs: list[RunPlan], shop: Workshop, request: StopRequest, progress: Progress
    ) -> None:
        for run in runs:
            progress.describe([run.title])
            with request.may_abort():
                self._finish(shop, run, None, shop.devices[0])
            progress.set(run, 1.0)

    def _finish(self, shop: Workshop, run: RunPlan, cause: str | None, device: str) -> None:
        """Evaluate a run that ended well and write its record; note the cause of one that did not.

        Whatever goes wrong here is this run's alone.
        """
        if cause is None:
            try:
                beside = list(self.done.values())
                self.done[run.id] = judge(self.plan, shop, run, device, beside=beside)
            except (KeyboardInterrupt, TerminatedError):
                raise
            except Exception as error:  # a fault of the program must not end the others either
                cause = cause_of(error)
        if cause is not None:
            cause = printable(cause)
            self.failed[run.id] = Failed(run.seed, cause, run.command)
            tqdm.write(f"{run.title} failed: {cause}", file=sys.stderr)
            return
        record = self.done[run.id].record
        ap = accuracy_of(record)["AP"]
        tqdm.write(f"{run.title}: AP {'-' if ap is None else f'{ap:.3f}'}")

    def conclude(self) -> Results:
        """Measure costs, and write everything that the folder is for."""
        plan, config = self.plan, self.plan.config
        evidence = []
        for model in plan.models:
            ids = [run.id for run in plan.runs_of(model)]
            finished = [self.done[item] for item in ids if item in self.done]
            failed = [self.failed[item] for item in ids if item in self.failed]
            evidence.append(Evidence(model, finished, failed))
        results = self._results(evidence)
        if self.news or not (self.folder / RESULTS).is_file():
            self._write(complete(results))  # what was trained is in the table in any case
        say("measuring latency ...")
        timing = LatencyConfig(batches=config.latency_batches, seconds=config.latency_seconds)
        results["measurement"], measured = measure(plan.models, device=plan.device, config=timing)
        timed = [
            with_measured(row, model, measured.get(model.name))
            for row, model in zip(results["rows"], plan.models, strict=True)
        ]
        results["rows"] = with_speedup(timed, plan.baseline)
        plain = complete(results)
        self._write(plain)
        write_plots(results, self.folder)
        report = write_report(plain, self.folder, examples=examples(plan.splits, evidence))
        say(console(plain))
        say(f"results.json, table.csv, table.md, plots and {report.name} are in {self.folder}")
        return results

    def _write(self, results: dict[str, Any]) -> None:
        write_text(self.folder / RESULTS, json.dumps(results, indent=1, allow_nan=False))
        write_text(self.folder / "table.csv", csv_table(results))
        write_text(self.folder / "table.md", markdown(results))

    def _results(self, evidence: list[Evidence]) -> Results:
        """All but what is measured here."""
        plan = self.plan
        return Results(
            format=FORMAT,
            command=plan.config.command(),
            protocol=plan.protocol,
            baseline=plan.baseline,
            measurement=None,
            rows=rows(evidence, truth=plan.truth, images=plan.images, baseline=plan.baseline),
        )


def _share(shop: Workshop, run: RunPlan) -> float:
    """How much of a run was done before this sitting."""
    if run.seed is None:
        return 0.0
    state = state_of(shop.run_folder(run))
    if state == TRAINED:
        return 0.99
    return shop.epochs_done(run) / shop.config.epochs if state == HALF else 0.0

"""Training from settings to the final table: `fit(TrainConfig(...))`."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.utils.deterministic

from data.loading.sample import Batch
from data.loading.workers import dead_workers_named
from engine import distributed
from engine.checkpoint import load_checkpoint, strip_checkpoint
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from engine.evaluate.metrics import DetectionMetrics
from engine.evaluate.plots import BatchImages, save_plots
from engine.train.config import TrainConfig
from engine.train.files import METRICS, announce, plot_results, save
from engine.train.interrupts import StopRequest, stop_requests
from engine.train.loading import delivered
from engine.train.setup import prepare_run
from engine.train.state import TrainRun
from engine.train.step import console_header, train_epoch
from engine.train.writers import check_callbacks
from models.detector import Detector
from models.losses.build import build_loss
from utils.config import changed
from utils.errors import FeatherDetError, TerminatedError, UserError, cause_of
from utils.terminal import say, warn

VAL_AHEAD = 16  # steps before the end of an epoch at which its validation images are first loaded
COMPILER = ("torch._dynamo", "torch._inductor")  # where the errors of torch.compile come from


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder, the metrics of `best` on the validation images, all epochs."""

    folder: Path
    metrics: DetectionMetrics
    rows: list[dict[str, float]]  # of results.csv

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.folder / "weights" / "best.pt"

    @property
    def last(self) -> Path:
        """The weights of the last epoch."""
        return self.folder / "weights" / "last.pt"


def fit(
    config: TrainConfig,
    given: Collection[str] | None = None,
    callbacks: Sequence[object] = (),
) -> TrainResult:
    """Train as `config` says; what came of it.  `callbacks`: engine/train/writers.py.

    `given`: the fields that the command line names, which a resumed run applies or refuses; None:
    those that differ from their defaults.  Leaves a run folder as docs/training.md describes.
    Raises UserError for settings or data that cannot work, NonFiniteError when the loss is not a
    number, TerminatedError or KeyboardInterrupt after a signal, when last.pt holds the state to
    resume from.
    """
    check_callbacks(callbacks)
    world = distributed.start(config.device, timeout=config.ddp_timeout, threads=config.threads)
    try:
        with dead_workers_named(), stop_requests() as request, ExitStack() as locks:
            with request.may_abort():
                typed = changed(config) if given is None else given
                run = prepare_run(config, world, locks, given=typed, callbacks=callbacks)
                announce(run)
            # each new size would be timed again by cuDNN
            fixed_size = not (run.config.multi_scale or run.config.rect)
            with reproducible(world.device, benchmark=fixed_size):
                return TrainResult(run.folder, _train(run, request), run.state.rows)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: batch {config.batch_size} at {config.imgsz} px is too much for"
            f" {world.device}; try half the --batch-size (gradients accumulate to the nominal"
            " batch either way), --batch-size -1, or --amp fp16"
        ) from error
    except RuntimeError as error:
        if config.compile and type(error).__module__.startswith(COMPILER):
            raise UserError(
                f"--compile: torch.compile failed: {cause_of(error)}; on a CPU it needs a C++"
                " compiler (g++); or leave the flag out"
            ) from error
        if not distributed.is_lost_rank(error):
            raise
        raise FeatherDetError(
            f"rank {world.rank}: another rank ended or did not answer within"
            f" {config.ddp_timeout:g} s ({str(error).splitlines()[0][:200]})"
        ) from error
    finally:
        distributed.cleanup()


@contextmanager
def reproducible(device: torch.device, *, benchmark: bool) -> Iterator[None]:
    """Deterministic kernels on a CPU, where they cost next to nothing: runs repeat bit for bit.

    Without them gradients of gathered cells are summed by threads in any order.  On CUDA cuDNN
    chooses its kernels by measuring them, with `benchmark`.
    """
    wanted = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    before = torch.backends.cudnn.benchmark
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False
    else:
        torch.backends.cudnn.benchmark = benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)
        settings.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = before


def _train(run: TrainRun, request: StopRequest) -> DetectionMetrics:
    """All epochs, then the final evaluation."""
    state, metrics = run.state, None
    run.emit("on_train_start")
    try:
        try:
            while state.epoch < run.config.epochs and not _out_of_patience(run):
                _epoch(run, request)
        except BrokenPipeError:  # nobody reads the output any more; all steps here are complete
            if run.world.is_main:
                save(run, "last.pt", resumable=True)
            raise
        with request.may_abort():
            metrics = _finish(run)
    finally:
        run.emit("on_train_end", metrics)
    return metrics


def _epoch(run: TrainRun, request: StopRequest) -> None:
    """One epoch of training (or the rest of it), its evaluation, its files."""
    state, config = run.state, run.config
    done = min(state.batches * config.batch_size, len(run.train))  # images
    started = time.perf_counter()
    run.clock.start()
    run.loss.start_epoch(state.epoch, config.epochs)
    if run.world.is_main:
        warn(console_header(run))
    validate = not config.noval or state.epoch == config.epochs - 1
    if state.batches < len(run.loader) and not train_epoch(
        run, epoch_batches(run, validate=validate), request
    ):
        _save_and_stop(run, request, together=True)
    seconds = time.perf_counter() - started
    metrics = None
    try:
        with request.may_abort():
            distributed.broadcast_tensors(state.ema.tensors())  # the statistics are rank 0's
            if validate:
                metrics = _evaluate(run, losses=True)
    except (KeyboardInterrupt, TerminatedError, FeatherDetError):
        if request.signal:
            _save_and_stop(run, request, together=False)
        raise
    run.clock.end("validation")
    row = _row(run, metrics)
    if images := len(run.train) - done:  # none where only the validation is repeated
        row["train_seconds"] = seconds
        row["images_per_second"] = images / seconds
        row["data_wait_share"] = run.clock.waited / seconds
    row["val_seconds"] = time.perf_counter() - started - seconds
    _close_epoch(run, distributed.broadcast_object(row), metrics)


def epoch_batches(run: TrainRun, *, validate: bool) -> Iterator[Batch]:
    """The epoch's remaining batches; with its last ones the loading for validation begins."""
    batches = run.loader.batches(run.state.epoch, run.state.batches)
    for batch in delivered(batches, run.state.device, run.device_images):
        if validate and len(run.loader) - run.state.batches <= VAL_AHEAD:
            run.val_loader.start()
        yield batch


def _evaluate(
    run: TrainRun,
    *,
    losses: bool = False,
    images: BatchImages | None = None,
    branch: Detector | None = None,
) -> DetectionMetrics:
    """The averaged weights on the validation images; with losses, in the type of the run.

    The final metrics, without losses, are float32's, as val.py's are.  `branch`: of the weights, to
    be evaluated instead.
    """
    config, device = run.config, run.world.device
    model = branch or run.state.ema.model
    loss = None
    if losses:
        loss = build_loss(model, run.hyp, image_size=config.imgsz)
        loss.start_epoch(run.state.epoch, config.epochs)
    with torch.autocast(device.type, run.autocast, enabled=losses and run.autocast is not None):
        return evaluate(
            model,
            run.val_loader,
            run.val,
            config=EvalConfig(single_cls=config.single_cls),
            device=device,
            loss=loss,
            images=images,
        )


def _row(run: TrainRun, metrics: DetectionMetrics | None) -> dict[str, float]:
    """The epoch's row of results.csv, and its fitness."""
    state = run.state
    step = state.epoch * run.schedule.steps_per_epoch + state.batches - 1
    means = distributed.all_reduce_sum(state.mean_losses()) / run.world.world_size
    row: dict[str, float] = {"epoch": state.epoch}
    parts = zip(state.model.head.losses, means.tolist(), strict=True)
    row.update({f"train/{part}_loss": value for part, value in parts})
    row.update({f"x/lr{i}": rate for i, rate in enumerate(run.schedule.at(step).lr)})
    if metrics is not None:
        found = (metrics.precision, metrics.recall, metrics.map50, metrics.map)
        row.update(zip(METRICS, found, strict=True))
        row.update({f"val/{part}_loss": value for part, value in metrics.losses.items()})
        row["fitness"] = metrics.fitness
    return row


def _close_epoch(run: TrainRun, row: dict[str, float], metrics: DetectionMetrics | None) -> None:
    """Record the epoch's result, move on to the next one; write checkpoints and results, print."""
    state, config = run.state, run.config
    fitness = row.pop("fitness", math.nan)
    epoch = state.epoch
    state.rows.append(row)
    better = fitness > state.best_fitness
    if better:
        state.best_fitness, state.best_epoch = fitness, epoch
    state.start_epoch(epoch + 1)
    if not run.world.is_main:
        return
    run.emit("on_epoch_end", row)
    last = epoch == config.epochs - 1 or _out_of_patience(run)
    if not config.nosave or last:
        if better or config.nosave or not (run.folder / "weights" / "best.pt").exists():
            save(run, "best.pt", resumable=False)  # first: last.pt implies that it is there
        save(run, "last.pt", resumable=True)
        if config.save_period > 0 and (epoch + 1) % config.save_period == 0:
            save(run, f"epoch{epoch}.pt", resumable=False)
    if metrics is not None:
        say("\n".join(metrics.table().splitlines()[:2]))
    if config.profile:
        say(run.clock.text())


def _out_of_patience(run: TrainRun) -> bool:
    state, patience = run.state, run.config.patience
    waited = state.epoch - 1 - state.best_epoch
    return patience > 0 and state.best_epoch >= 0 and waited >= patience


def _save_and_stop(run: TrainRun, request: StopRequest, *, together: bool) -> NoReturn:
    """Obey a signal: rank 0 saves the state between two steps, then every rank leaves.

    `together`: all ranks are here, and wait until the file is complete.
    """
    if run.world.is_main:
        path = save(run, "last.pt", resumable=True)
        warn(
            f"stopped in epoch {run.state.epoch + 1} after batch {run.state.batches} of"
            f" {len(run.loader)}; continue with: --resume {path}"
        )
    if together:
        distributed.barrier()
    request.stop()


def _finish(run: TrainRun) -> DetectionMetrics:
    """Evaluate the best weights, draw the plots, and print where everything is."""
    run.val_loader.start()  # its workers begin while the weights are read
    weights = run.folder / "weights"
    drawn = run.world.is_main and not run.config.noplots
    images = BatchImages(run.val) if drawn else None
    if run.world.is_main:
        best = load_checkpoint(weights / "best.pt")
        run.state.ema.model.load_state_dict(best["model"])
    distributed.broadcast_tensors(run.state.ema.tensors())
    metrics = _evaluate(run, images=images)
    model = run.state.ema.model
    if model.has_branches:
        with_nms = copy.deepcopy(model).deploy(nms=True)
        metrics = metrics.with_branch(_evaluate(run, branch=with_nms))
    if run.world.is_main:
        strip_checkpoint(weights / "last.pt")  # a finished run needs no optimizer any more
        say(metrics.table())
        if metrics.other_branch:
            say(metrics.branches_text(nms=False))
        if images is not None:
            plot_results(run.state.rows, run.folder / "results.png")
            save_plots(metrics, run.val, images, run.folder)
        say(f"best.pt is from epoch {best['epoch']} of {run.state.epoch}; all in {run.folder}")
    return metrics

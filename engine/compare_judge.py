"""Evaluation of one run, and its record."""

from __future__ import annotations

from pathlib import Path

import torch

from data.loader import LoaderConfig, val_batches
from engine.checkpoint import load_checkpoint, load_detector
from engine.compare_plan import RunPlan
from engine.compare_record import FOLDER, Record, plain_spec, read_curves, save_record
from engine.compare_runs import Workshop
from engine.compare_setup import Comparison
from engine.compare_tables import Finished
from engine.distributed import select_device
from engine.evaluator import EvalConfig, evaluate
from engine.protocol import of_a_run
from engine.results import DetectionMetrics
from utils.environment import run_environment
from utils.errors import UserError


def judge(plan: Comparison, shop: Workshop, run: RunPlan, device: str) -> Finished:
    """Evaluate a trained run, or a given checkpoint, on the validation images; write its record.

    Raises UserError for weights that cannot be read or evaluated, RuntimeError for lack of memory.
    """
    model, profile = run.contender, run.contender.profile
    if model.spec is None or profile is None or plan.truth is None:
        raise ValueError(f"{run.title}: nothing to evaluate")
    trained = run.seed is not None
    weights = shop.best(run) if trained else Path(model.model["weights"])
    place = select_device(device)
    metrics = _evaluate(plan, weights, place)
    environment = {**run_environment(place), "threads": plan.threads}
    record = Record(
        name=model.name,
        model_id=model.model_id,
        model=model.model,
        spec=plain_spec(model.spec, model.model["source"]),
        seed=run.seed,
        protocol=of_a_run(plan.protocol),
        command=run.command,
        metrics=metrics.to_dict(),
        best_epoch=int(load_checkpoint(weights)["epoch"]) - 1 if trained else None,
        curves=read_curves(shop.run_folder(run) / "results.csv") if trained else {},
        cost={"params": profile.params, "macs": profile.macs, "flops": profile.flops},
        environment=environment,
    )
    path = save_record(shop.folder / FOLDER, record, metrics, plan.truth)
    return Finished(path, record)


def _evaluate(plan: Comparison, weights: Path, device: torch.device) -> DetectionMetrics:
    if plan.splits is None:
        raise UserError(f"{weights}: no data to evaluate on")
    config, index = plan.config, plan.splits.val
    detector = load_detector(weights, device=device, fuse=True)
    loader = LoaderConfig(
        image_size=config.imgsz,
        batch_size=config.batch_size,
        stride=detector.max_stride,
        workers=config.workers,
        seed=0,
    )
    return evaluate(
        detector,
        val_batches(index, loader),
        index,
        config=EvalConfig(),
        device=device,
        progress=False,
    )

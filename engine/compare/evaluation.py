"""Evaluation of one run, and its record.

What a record says of a trained run is taken from its checkpoint, or checked against it: files may
have been edited, and packages changed, while the comparison ran.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from data.loading.loader import LoaderConfig, ValLoader
from engine.checkpoint import load_checkpoint, load_detector
from engine.compare.plan import RunPlan
from engine.compare.protocol import Protocol, differences, listed, of_a_run
from engine.compare.record import FOLDER, Record, model_id, plain_spec, read_curves, save_record
from engine.compare.report.tables import Finished
from engine.compare.runs import Workshop
from engine.compare.setup import Comparison, require_one_training
from engine.distributed import select_device
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from engine.evaluate.results import DetectionMetrics
from models.detector import Detector
from utils.environment import run_environment
from utils.errors import UserError

# Of a run's TrainConfig: places and names, what the record says elsewhere, what differs by row.
NOT_KEPT = (
    "weights", "backbone_weights", "cfg", "backbone", "neck", "data", "hyp", "resume", "device",
    "project", "name", "exist_ok", "seed",
)  # fmt: skip


def judge(
    plan: Comparison, shop: Workshop, run: RunPlan, device: str, *, beside: Iterable[Finished] = ()
) -> Finished:
    """Evaluate a trained run, or a given checkpoint, on the validation images; write its record.

    Raises UserError for weights that cannot be read or evaluated, that are not of this run, or
    whose training was another than that of the runs `beside`; RuntimeError for lack of memory.
    """
    model, profile = run.contender, run.contender.profile
    if model.spec is None or profile is None or plan.truth is None:
        raise ValueError(f"{run.title}: nothing to evaluate")
    trained = run.seed is not None
    weights = shop.best(run) if trained else Path(model.model["weights"])
    place = select_device(device)
    detector = load_detector(weights, device=place)
    saved = load_checkpoint(weights) if trained else {}
    if trained:
        require_own(weights, detector, saved, model.model_id, plan.protocol)
    metrics = _evaluate(plan, detector, place)
    record = Record(
        name=model.name,
        model_id=model.model_id,
        model=model.model,
        spec=plain_spec(model.spec, model.model["source"]),
        seed=run.seed,
        protocol=of_a_run(plan.protocol),
        command=run.command,
        metrics=metrics.to_dict(),
        best_epoch=int(saved["epoch"]) - 1 if trained else None,
        curves=read_curves(shop.run_folder(run) / "results.csv") if trained else {},
        cost={"params": profile.params, "macs": profile.macs, "flops": profile.flops},
        environment=dict(saved["environment"])
        if trained
        else {**run_environment(place), "threads": plan.threads},
        training=kept_settings(saved["config"]) if trained else {},
    )
    path = shop.folder / FOLDER / f"{record.stem}.json"
    require_one_training([*beside, Finished(path, record)])
    path = save_record(shop.folder / FOLDER, record, metrics, plan.truth)
    return Finished(path, record)


def kept_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of a run's resolved TrainConfig."""
    return {key: value for key, value in config.items() if key not in NOT_KEPT}


def require_own(
    weights: Path, detector: Detector, saved: Mapping[str, Any], model: str, protocol: Protocol
) -> None:
    """Refuse (UserError) a checkpoint that is not of this model (its hash) and this protocol."""
    found = model_id(detector.spec)
    if found != model:
        raise UserError(
            f"{weights}: it holds another model ({found}) than the comparison's ({model}); was the"
            " model's file edited? Start a new comparison"
        )
    for key in ("config", "hyp", "environment"):
        if not isinstance(saved.get(key), dict):
            raise UserError(f"{weights}: no {key!r} in it; it is not of a training run")
    training, config = protocol["training"], saved["config"]
    same = [key for key in training if key in config and key != "hyp"]
    wanted = {
        "image_size": protocol["image_size"],
        "training": {**{key: training[key] for key in same}, "hyp": training["hyp"]},
        "versions": protocol["versions"],
    }
    present = {
        "image_size": config.get("imgsz"),
        "training": {**{key: config[key] for key in same}, "hyp": saved["hyp"]},
        "versions": {key: saved["environment"].get(key) for key in protocol["versions"]},
    }
    differing = differences(wanted, present)
    if differing:
        raise UserError(
            f"{weights}: trained by another protocol than the comparison's: {listed(differing)};"
            " remove its folder to train it again"
        )


def _evaluate(plan: Comparison, detector: Detector, device: torch.device) -> DetectionMetrics:
    if plan.splits is None:
        raise UserError("no data to evaluate on")
    config, index = plan.config, plan.splits.val
    detector.fuse()
    loader = LoaderConfig(
        image_size=config.imgsz,
        batch_size=config.batch_size,
        stride=detector.max_stride,
        workers=config.workers,
        seed=0,
        pin_memory=device.type == "cuda",
    )
    return evaluate(
        detector,
        ValLoader(index, loader),
        index,
        config=EvalConfig(),
        device=device,
        progress=False,
    )

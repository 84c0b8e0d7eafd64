"""Evaluation of one run, and its record.

The record of a trained run is made of its checkpoint, or checked against it: files may have been
edited, and packages changed, while the comparison ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.loading.loader import LoaderConfig, ValLoader
from engine.checkpoint import load_checkpoint, load_detector
from engine.compare.plan import RunPlan
from engine.compare.protocol import VERSIONS, Protocol, differences, listed, of_a_run, recipe
from engine.compare.record import FOLDER, Record, model_id, plain_spec, read_curves, save_record
from engine.compare.runs import Session
from engine.compare.setup import require_one_training
from engine.distributed import select_device
from engine.evaluate.config import EvalConfig
from engine.evaluate.evaluator import evaluate
from models.detector import Detector
from utils.environment import run_environment
from utils.errors import UserError

# Of a run's TrainConfig: paths and names, what the record has elsewhere, what differs by row.
NOT_KEPT = (
    "weights", "backbone_weights", "cfg", "backbone", "neck", "data", "hyp", "resume", "device",
    "project", "name", "exist_ok", "seed",
)  # fmt: skip


def evaluate_run(session: Session, run: RunPlan, device: str) -> Record:
    """Evaluate a trained run, or a given checkpoint, and write its record.

    Raises UserError for weights that cannot be read or evaluated, that are not of this run, or
    whose training differs from that of the runs already done; RuntimeError for lack of memory.
    """
    plan, entry = session.plan, run.entry
    assert entry.spec is not None
    assert entry.profile is not None
    assert plan.splits is not None
    assert plan.truth is not None
    trained = run.seed is not None
    folder = session.run_folder(run)
    weights = folder / "weights" / "best.pt" if trained else Path(entry.model.weights)
    target = select_device(device)
    detector = load_detector(weights, device=target)
    saved = load_checkpoint(weights) if trained else {}
    if trained:
        require_own(weights, detector, saved, entry.model_id, plan.protocol)
        environment = dict(saved["environment"])
    else:
        environment = {**run_environment(target), "threads": plan.threads}
    index = plan.splits.evaluated
    loader = LoaderConfig(
        image_size=plan.config.imgsz,
        batch_size=plan.config.batch_size,
        stride=detector.max_stride,
        workers=plan.config.workers,
        seed=0,
        pin_memory=target.type == "cuda",
    )
    detector.fuse()
    metrics = evaluate(
        detector,
        ValLoader(index, loader),
        index,
        config=EvalConfig(),
        device=target,
        progress=False,
    )
    training = {k: v for k, v in saved.get("config", {}).items() if k not in NOT_KEPT}
    record = Record(
        name=entry.name,
        model_id=entry.model_id,
        model=entry.model,
        spec=plain_spec(entry.spec, entry.model.source),
        seed=run.seed,
        protocol=of_a_run(plan.protocol),
        command=run.command,
        metrics=metrics.to_dict(),
        best_epoch=int(saved["epoch"]) - 1 if trained else None,
        curves=read_curves(folder / "results.csv") if trained else {},
        cost={key: getattr(entry.profile, key) for key in ("params", "macs", "flops")},
        environment=environment,
        training=training,
    )
    require_one_training([*session.done.values(), record])
    return save_record(session.folder / FOLDER, record, metrics.detections, plan.truth)


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

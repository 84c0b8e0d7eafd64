"""Evaluation of one run, and its record.

The record of a trained run is made of its checkpoint, or checked against it: files may have been
edited, and packages changed, while the comparison ran.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.loading.loader import LoaderConfig, ValLoader
from engine.checkpoint import load_checkpoint, load_detector
from engine.compare.plan import RunPlan
from engine.compare.protocol import VERSIONS, Protocol, differences, listed, of_a_run, recipe
from engine.compare.record import FOLDER, Record, model_id, plain_spec, save_record
from engine.compare.setup import Comparison, require_one_training
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


def evaluate_run(plan: Comparison, run: RunPlan, device: str) -> Record:
    """Evaluate a trained run, or a given checkpoint, and write its record.

    Raises UserError for weights that cannot be read or evaluated, that are not of this run, or
    whose training differs from that of the runs already done; RuntimeError for lack of memory.
    """
    entry, config, target = run.entry, plan.config, select_device(device)
    assert plan.splits is not None
    trained = run.seed is not None
    folder = plan.run_folder(run)
    weights = folder / "weights" / "best.pt" if trained else Path(entry.model.weights)
    detector = load_detector(weights, device=target)
    saved = load_checkpoint(weights) if trained else {}
    if trained:
        require_own(weights, detector, saved, entry.model_id, plan.protocol)
        environment = dict(saved["environment"])
    else:
        environment = {**run_environment(target), "threads": plan.protocol["device"]["threads"]}
    index, pinned = plan.splits.evaluated, target.type == "cuda"
    sizes = (config.imgsz, config.batch_size, detector.max_stride)
    loader = LoaderConfig(*sizes, workers=config.workers, seed=0, pin_memory=pinned)
    detector.fuse()
    images = ValLoader(index, loader)
    metrics = evaluate(detector, images, index, config=EvalConfig(), device=target, progress=False)
    record = Record(
        name=entry.name,
        model_id=entry.model_id,
        model=entry.model,
        spec=plain_spec(detector.spec, entry.model.source),
        seed=run.seed,
        protocol=of_a_run(plan.protocol),
        command=run.command,
        metrics=metrics.to_dict(),
        best_epoch=int(saved["epoch"]) - 1 if trained else None,
        curves=read_curves(folder / "results.csv") if trained else {},
        cost={key: getattr(entry.profile, key) for key in ("params", "macs", "flops")},
        environment=environment,
        training={k: v for k, v in saved.get("config", {}).items() if k not in NOT_KEPT},
    )
    require_one_training([*plan.done.values(), record])
    return save_record(plan.folder / FOLDER, record, metrics.detections, plan.truth)


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


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """results.csv of a training run by column; None where a cell is empty or not finite."""
    columns: dict[str, list[float | None]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    value = float(cell or "nan")
                    columns.setdefault(name, []).append(value if math.isfinite(value) else None)
    except Exception as error:
        raise UserError(f"{path}: not the results of a run: {error}") from error
    return columns

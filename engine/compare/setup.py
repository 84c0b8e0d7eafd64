"""From settings to a comparison that is ready to start or to continue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.compare.arrays import load_detections, load_truth
from engine.compare.config import PROFILE, TABLE, CompareConfig, repeated
from engine.compare.folder import Lock
from engine.compare.plan import ModelEntry, RunPlan, baseline_of, model_entries, runs
from engine.compare.protocol import (
    SEEDS,
    Protocol,
    Splits,
    differences,
    listed,
    load_splits,
    make_protocol,
    protocol_differences,
    require_equal,
)
from engine.compare.record import FOLDER, Record, model_id, records_in
from engine.distributed import select_device
from engine.evaluate.box_table import BoxTable
from engine.evaluate.metrics import by_id, truth_of
from engine.train.config import TrainConfig
from models.profile.counting import profile_spec
from models.spec import ModelSpec
from utils.environment import device_name
from utils.errors import UserError, cause_of
from utils.terminal import warn


@dataclass(frozen=True)
class Comparison:
    """All that is decided before the first run."""

    config: CompareConfig
    protocol: Protocol
    models: tuple[ModelEntry, ...]
    runs: tuple[RunPlan, ...]
    baseline: str
    devices: tuple[str, ...]  # --device of each run at a time
    device: torch.device  # that costs are measured on
    threads: int | None = None  # of each run on a CPU
    splits: Splits | None = None
    truth: BoxTable | None = None
    images: int = 0  # evaluated
    given: Mapping[str, Record] = field(default_factory=dict)  # by run, from --records

    @property
    def lock(self) -> Lock:
        """What its folder is locked to."""
        return Lock(self.protocol, {model.name: model.model_id for model in self.models})


def plan_comparison(config: CompareConfig) -> Comparison:
    """Read the data and all models, and find what is done. UserError before anything is written."""
    devices = run_devices(config)
    device = select_device(devices[0])
    threads = None
    if device.type == "cpu":
        threads = max(torch.get_num_threads() // config.jobs, 1)
    given = Path(config.records)
    if config.records and not given.is_dir():
        raise UserError(f"--records {given}: no such folder")
    if config.kind == TABLE:
        return _of_records(config, devices, device)
    splits = None if config.kind == PROFILE else load_splits(config)
    classes = config.classes if splits is None else len(splits.evaluated.names)
    models = model_entries(config, classes=classes)
    baseline = baseline_of(config.baseline, [model.name for model in models])
    protocol = make_protocol(config, splits, device, threads=threads)
    planned = runs(config, models, protocol, splits)
    return Comparison(
        config=config,
        protocol=protocol,
        splits=splits,
        models=models,
        runs=planned,
        baseline=baseline,
        devices=devices,
        device=device,
        threads=threads,
        truth=None if splits is None else truth_of(by_id(splits.evaluated)),
        images=0 if splits is None else len(splits.evaluated),
        given=_usable(records_in(given), planned, protocol) if config.records else {},
    )


def run_devices(config: CompareConfig) -> tuple[str, ...]:
    """--device of each run at a time. UserError where --jobs asks for more GPUs than there are."""
    named = [part.strip() for part in config.device.split(",") if part.strip()] or [""]
    first = select_device(named[0])
    if first.type == "cpu":
        return ("cpu",) * config.jobs
    if named == [""]:
        named = [str(number) for number in range(torch.cuda.device_count())]
    if config.jobs > len(named):
        raise UserError(
            f"--jobs {config.jobs}: there are {len(named)} GPUs to run on ({', '.join(named)});"
            " each run has one of its own"
        )
    chosen = named[: config.jobs]
    models = {device_name(select_device(name)) for name in chosen}
    if len(models) > 1:
        raise UserError(
            f"--device {config.device}: the GPUs are not alike ({', '.join(sorted(models))}); rows"
            " of one table share one kind of device"
        )
    return tuple(chosen)


def _require_within(item: Record, boxes: BoxTable, what: str) -> None:
    """UserError where boxes are of other images or classes than the record."""
    images, classes = item.images, len(item.data.classes)
    for numbers, end in ((boxes.image, images), (boxes.labels, classes)):
        if ((numbers < 0) | (numbers >= end)).any():
            raise UserError(f"{item.path}: {what} beyond its {images} images, {classes} classes")


def require_one_training(items: Iterable[Record]) -> None:
    """Refuse (UserError) runs that were not trained by the same settings, field by field.

    A setting that a record lacks is one that came later: it had its default.
    """
    known = [item for item in items if item.training]
    default = TrainConfig().to_dict()
    for item in known[1:]:
        ours, theirs = ({**default, **one.training} for one in (known[0], item))
        differing = differences(ours, theirs)
        if differing:
            raise UserError(
                f"{known[0].stem}.json and {item.stem}.json were trained by different settings and"
                f" cannot be rows of one table: {listed(differing)}"
            )


def _require_once(items: Iterable[Record]) -> None:
    """Refuse (UserError) two records of the same run."""
    seen: dict[tuple[str, int | None], Record] = {}
    for item in items:
        if (other := seen.setdefault((item.model_id, item.seed), item)) is not item:
            seed = "" if item.seed is None else f", seed {item.seed}"
            raise UserError(
                f"{other.path} and {item.path}: two records of one run ({item.name}{seed});"
                " remove one"
            )


def _usable(
    records: Sequence[Record], planned: Sequence[RunPlan], protocol: Protocol
) -> dict[str, Record]:
    """By run: the records of the planned runs; one of another protocol is named and left out."""
    wanted = {(run.entry.model_id, run.seed): run for run in planned}
    found: dict[str, Record] = {}
    used = []
    for item in records:
        run = wanted.get((item.model_id, item.seed))
        if run is None:
            continue
        differing = protocol_differences(item.protocol, protocol)
        if not differing:
            used.append(item)
            try:
                _require_within(item, load_detections(item.path), "detections")
                found[run.id] = item
            except UserError as error:
                warn(f"{item.path}: counts as not done: {error}")
        elif item.protocol["data"] == protocol["data"]:
            warn(f"{item.path}: not used, another protocol: {listed(differing)}")
    _require_once(used)
    return found


def finished_runs(plan: Comparison, folder: Path) -> dict[str, Record]:
    """By run: the records of the comparison's own folder, and those of --records.

    UserError where a record in the folder has another protocol.
    """
    done = dict(plan.given)
    if plan.config.kind != TABLE:
        own = records_in(folder / FOLDER)
        for item in own:
            require_equal({"this comparison": plan.protocol, str(item.path): item.protocol})
        done |= _usable(own, plan.runs, plan.protocol)
        require_one_training(done.values())
    return done


def _of_records(
    config: CompareConfig, devices: tuple[str, ...], device: torch.device
) -> Comparison:
    """A table of the records of a folder alone: they bring models, protocol and ground truth."""
    folder = Path(config.records)
    found = records_in(folder)
    if not found:
        raise UserError(f"--records {folder}: no record there")
    protocol = require_equal({item.path.name: item.protocol for item in found})
    require_one_training(found)
    _require_once(found)
    models: dict[str, ModelEntry] = {}
    for item in found:
        _require_within(item, load_detections(item.path), "detections")
        models.setdefault(item.model_id, _entry(item))
    names = [model.name for model in models.values()]
    twice = repeated(names)
    if twice is not None:
        raise UserError(f"--records {folder}: two different models are called {twice!r}")
    first = found[0]
    truth = load_truth(folder, first.fingerprint)
    _require_within(first, truth, "ground truth")
    seeds = sorted({item.seed for item in found if item.seed is not None})
    if seeds:
        protocol[SEEDS] = seeds
    planned = [RunPlan(models[one.model_id], one.seed, one.stem, 0.0, "") for one in found]
    return Comparison(
        config=config,
        protocol=protocol,
        models=tuple(models.values()),
        runs=tuple(planned),
        baseline=baseline_of(config.baseline, names),
        devices=devices,
        device=device,
        truth=truth,
        images=first.images,
        given={one.stem: one for one in found},
    )


def _entry(record: Record) -> ModelEntry:
    """A record's model. UserError naming the file if it cannot be built, or is another one."""
    classes, size = len(record.data.classes), record.conditions.image_size
    try:
        spec = ModelSpec.from_dict(record.spec)
        profile = profile_spec(spec, image_size=size, classes=classes)
    except Exception as error:  # the builder's own checks are for what the parser lets through
        raise UserError(f"{record.path}: its model: {cause_of(error)}") from error
    found = model_id(spec)
    if record.seed is not None and found != record.model_id:  # a checkpoint's is of its bytes
        raise UserError(
            f"{record.path}: its 'spec' is of another model ({found}) than its 'model_id'"
            f" ({record.model_id}): was it edited? Its costs would not be those of what was trained"
        )
    return ModelEntry(record.name, record.model, record.model_id, spec, profile, classes)

"""From settings to a comparison that is ready to start or to continue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.compare.config import PROFILE, TABLE, TRAIN, CompareConfig, repeated
from engine.compare.fit_latency import read_target
from engine.compare.plan import ModelEntry, RunPlan, model_entries, read_drafts, runs
from engine.compare.protocol import (
    LATENCY,
    SEEDS,
    Lock,
    Protocol,
    Splits,
    differences,
    latency_settings,
    listed,
    load_splits,
    make_protocol,
    protocol_differences,
    require_equal,
)
from engine.compare.record import FOLDER, Record, model_id, records_in
from engine.compare.schema import Run
from engine.distributed import select_device
from engine.evaluate.matching import BoxTable
from engine.evaluate.metrics import by_id, truth_of
from engine.measure.exported import require_runtimes
from engine.train.config import TrainConfig
from models.profile.counting import profile_spec
from models.spec import ModelSpec
from utils.environment import device_name
from utils.errors import UserError, cause_of, nearest
from utils.hyp import load_hyp
from utils.terminal import warn


@dataclass
class Comparison:
    """What is decided before the first run, and by run what is done and what failed so far."""

    config: CompareConfig
    protocol: Protocol
    models: Sequence[ModelEntry]
    runs: Sequence[RunPlan]
    devices: tuple[str, ...]  # --device of each run at a time; costs are measured on the first
    splits: Splits | None = None
    truth: BoxTable = field(default_factory=lambda: BoxTable.concatenate([]))
    folder: Path = Path()
    done: dict[str, Record] = field(default_factory=dict)
    failed: dict[str, Run] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The row that others are compared with."""
        return self.config.baseline or self.models[0].name

    @property
    def lock(self) -> Lock:
        """What its folder is locked to."""
        models = {model.name: model.model_id for model in self.models}
        return {"protocol": self.protocol, "models": models}

    def run_folder(self, run: RunPlan) -> Path:
        """What train.py writes to."""
        return self.folder / "runs" / run.id

    def continue_in(self, folder: Path) -> None:
        """Work in a folder; its records count as done. UserError for one of another protocol."""
        self.folder = folder
        if self.config.kind != TABLE:
            own = records_in(folder / FOLDER)
            for item in own:
                require_equal({"this comparison": self.protocol, str(item.path): item.protocol})
            self.use(own)

    def use(self, records: Iterable[Record]) -> None:
        """The records of planned runs count as done.

        One of another protocol, and one with damaged detections, is named and left out; UserError
        where that would be a row less, for two records of one run, and for different trainings.
        """
        planned = {(run.entry.model_id, run.seed): run for run in self.runs}
        used: dict[str, Record] = {}
        for item in records:
            run = planned.get((item.model_id, item.seed))
            if run is None:
                continue
            differing = protocol_differences(item.protocol, self.protocol)
            if differing:
                if item.protocol["data"] == self.protocol["data"]:
                    warn(f"{item.path}: not used, another protocol: {listed(differing)}")
                continue
            if (other := used.setdefault(run.id, item)) is not item:
                raise UserError(
                    f"{other.path} and {item.path}: two records of one run ({run.title});"
                    " remove one"
                )
            try:
                item.detections()
                self.done[run.id] = item
            except UserError as error:
                if self.config.kind == TABLE:
                    raise
                warn(f"{item.path}: counts as not done: {error}")
        require_one_training(self.done.values())


def plan_comparison(config: CompareConfig) -> Comparison:
    """Read the data and all models, and find what is done. UserError before anything is written."""
    devices, folder = run_devices(config), Path(config.records)
    if config.records and not folder.is_dir():
        raise UserError(f"--records {folder}: no such folder")
    given = records_in(folder) if config.records else []
    if config.kind == TABLE:
        plan = _of_records(config, given, devices)
    else:
        read_drafts(config)  # mistakes in files are named before the data are read
        if config.kind == TRAIN:
            load_hyp(config.hyp)
        splits = None if config.kind == PROFILE else load_splits(config)
        classes = config.classes if splits is None else len(splits.evaluated.names)
        models = model_entries(config, classes=classes)
        protocol = make_protocol(config, splits, select_device(devices[0]))
        plan = Comparison(config, protocol, models, runs(config, models, protocol, splits), devices)
        if splits is not None:
            plan.splits, plan.truth = splits, truth_of(by_id(splits.evaluated))
    names = [model.name for model in plan.models]
    twice = repeated(names)
    if twice is not None:
        raise UserError(f"two models would both be called {twice!r}; rename or leave out one file")
    if plan.baseline not in names:
        raise UserError(
            f"--baseline {plan.baseline}: no such row; there are {', '.join(names)}"
            f"{nearest(plan.baseline, names)}"
        )
    plan.use(given)
    return plan


def run_devices(config: CompareConfig) -> tuple[str, ...]:
    """--device of each run at a time.

    UserError where --jobs asks for more GPUs than there are, and for timing a CPU cannot do.
    """
    named = [part.strip() for part in config.device.split(",") if part.strip()] or [""]
    first = select_device(named[0])
    require_runtimes(config.runtime)
    read_target(config)
    if first.type != "cpu" and set(config.runtime) != {"torch"}:
        raise UserError(
            f"--runtime {' '.join(config.runtime)}: onnxruntime and openvino are measured on a CPU;"
            " add --device cpu"
        )
    if first.type == "cpu":
        if config.latency_graph:
            raise UserError("--latency-graph captures CUDA graphs; on a CPU leave it out")
        if config.latency_dtype == "fp16":
            raise UserError(
                "--latency-dtype fp16: torch's float16 is many times slower than float32 on a CPU;"
                " use bf16 or fp32"
            )
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


def _of_records(
    config: CompareConfig, found: Sequence[Record], devices: tuple[str, ...]
) -> Comparison:
    """A table of records alone: they bring models, protocol and ground truth."""
    if not found:
        raise UserError(f"--records {config.records}: no record there")
    protocol = require_equal({item.path.name: item.protocol for item in found})
    seeds = sorted({item.seed for item in found if item.seed is not None})
    if seeds:
        protocol[SEEDS] = seeds
    protocol[LATENCY] = latency_settings(config)
    models: dict[str, ModelEntry] = {}
    for item in found:
        models.setdefault(item.model_id, _entry(item))
    planned = [RunPlan(models[one.model_id], one.seed, one.stem, 0.0, "") for one in found]
    truth = found[0].ground_truth()
    return Comparison(config, protocol, list(models.values()), planned, devices, truth=truth)


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

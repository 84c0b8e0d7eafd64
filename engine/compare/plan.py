"""The models of a comparison and its runs: everything that is known before work begins."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from engine.checkpoint import Weights, load_checkpoint, load_detector, read_weights
from engine.compare.config import TRAIN, CompareConfig
from engine.compare.fit_latency import LatencyFitter, read_target
from engine.compare.protocol import CHOSEN, Protocol, Splits, of_a_run
from engine.compare.record import ID_LENGTH, model_id, run_id
from engine.compare.schema import Model
from models.builder import build_detector
from models.detector import Detector
from models.profile.counting import ModelProfile, profile_spec
from models.profile.fit import fit, read_budget
from models.spec import ModelSpec
from models.weights.restricted import open_pickled
from models.yaml.parser import Draft, load_draft
from utils.errors import UserError
from utils.files import ROOT
from utils.terminal import progress, warn

NEW, HALF, TRAINED = "to do", "half done", "trained, to be evaluated"
TRAINING_PASSES = 3  # a step costs about three forwards: one, and twice as much backwards


@dataclass(frozen=True)
class ModelEntry:
    """A model of the comparison; without `spec` it cannot be built, and `cause` states why."""

    name: str
    model: Model
    model_id: str = ""
    spec: ModelSpec | None = None
    profile: ModelProfile | None = None
    classes: int = 0
    cause: str | None = None

    def detector(self) -> Detector:
        """The model with random weights: costs and times do not depend on them."""
        assert self.spec is not None, self.cause
        return build_detector(self.spec, classes=self.classes).deploy()


@dataclass(frozen=True)
class RunPlan:
    """One seed of a model, or one checkpoint to evaluate."""

    entry: ModelEntry
    seed: int | None
    id: str  # of its record and folder
    work: float  # FLOPs of training, or of evaluating
    command: str  # repeats it

    @property
    def title(self) -> str:
        """'yolov5n-ghost seed 0'."""
        return self.entry.name + ("" if self.seed is None else f" seed {self.seed}")


def model_entries(config: CompareConfig, *, classes: int) -> tuple[ModelEntry, ...]:
    """The models of --cfg (with each --backbone, --neck, --head) or --weights, in the order given.

    A model that cannot be built has its cause.  UserError for files that cannot be read, and if no
    model can be built.
    """
    found = tuple(_checkpoints(config) if config.weights else _models(config, classes))
    known: dict[str, ModelEntry] = {}
    for item in found:
        other = known.setdefault(item.model_id or item.name, item)
        if other is not item:
            raise UserError(
                f"{other.name} and {item.name} are the same model under two names; leave one out"
            )
    if all(item.spec is None for item in found):
        raise UserError("; ".join(f"{item.name}: {item.cause}" for item in found))
    return found


def read_drafts(config: CompareConfig) -> dict[tuple[str, str, str, str], Draft]:
    """The models of --cfg by file, backbone, neck and head; UserError for one not to be read."""
    parts = (config.backbone, config.neck, config.head)
    if config.init_weights:
        with open_pickled(Path(config.init_weights)):
            pass  # a checkpoint; whether its tensors are whole is seen when they are loaded
    return {
        (file, backbone, neck, head): load_draft(file, backbone=backbone, neck=neck, head=head)
        for file, backbone, neck, head in product(config.cfg, *(x or ("",) for x in parts))
    }


def _models(config: CompareConfig, classes: int) -> Iterator[ModelEntry]:
    target, fitter = read_target(config), None
    budget = None
    if config.fit and target is None:
        budget = read_budget(config.fit, image_size=config.imgsz)
    weights = read_weights(config.init_weights) if config.init_weights else None
    stems = [Path(file).stem for file in config.cfg]
    drafts = read_drafts(config)
    bar = progress(f"--fit {config.fit}", drafts.items(), total=len(drafts), hide=not config.fit)
    for (file, backbone, neck, head), draft in bar:
        stem = Path(file).stem
        parts = (file if stems.count(stem) > 1 else stem, backbone, neck, head)
        name = " + ".join(part for part in parts if part)
        source, notes = _short_source(draft.source), list[str]()
        model = Model(file, backbone, neck, config.fit, "", source, notes, head)
        try:
            spec, found = draft.resolve(), budget
            if target is not None:
                fitter = fitter or LatencyFitter(config, target, spec, classes=classes)
                latency = fitter.fit(draft)
                notes.append(latency.text(target))
                model = replace(model, fit=latency.budget, fitted_ms=latency.ms)
                found = read_budget(latency.budget, image_size=config.imgsz)
            if found is not None:
                fitted = fit(draft, found, classes=classes)
                spec = fitted.spec
                notes.append(fitted.text(found))
            profile = profile_spec(spec, image_size=config.imgsz, classes=classes)
        except UserError as error:
            if fitter is not None and fitter.busy:
                raise
            yield ModelEntry(name, model, cause=str(error))
            continue
        notes += [*spec.notes, *profile.notes()]
        entry = ModelEntry(name, model, model_id(spec), spec, profile, classes)
        if weights is not None:
            entry = _pretrained(entry, weights, Path(config.init_weights).name)
        yield entry


def _pretrained(entry: ModelEntry, weights: Weights, name: str) -> ModelEntry:
    """The model with the number of its parameters that the weights have, counted and noted."""
    detector = entry.detector()
    own, matching = dict(detector.named_parameters()), weights.matching(detector)
    total = sum(value.numel() for value in own.values())
    count = sum(value.numel() for key, value in own.items() if key in matching)
    note = f"--init-weights {name}: {count:,} of {total:,} parameters loaded ({count / total:.0%})"
    if not count:
        warn(f"warning: {entry.name}: nothing in {name} matches this model; it starts from scratch")
    model = replace(entry.model, notes=[note, *entry.model.notes], pretrained=count)
    return replace(entry, model=model)


def _checkpoints(config: CompareConfig) -> Iterator[ModelEntry]:
    """Named by the file's stem, best.pt by its run's folder; by the path where two are the same."""
    short = []
    for path in map(Path, config.weights):
        of_run = path.stem in {"best", "last"} and path.parent.name == "weights"
        short.append((of_run and path.parent.parent.name) or path.stem)
    for file, stem in zip(config.weights, short, strict=True):
        name = file if short.count(stem) > 1 else stem
        model = Model(cfg="", backbone="", neck="", fit="", weights=file, source="", notes=[])
        try:
            detector = load_detector(file, device="cpu")
            spec, classes = detector.spec, len(detector.names)
            profile = profile_spec(spec, image_size=config.imgsz, classes=classes)
            content = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:ID_LENGTH]
        except (UserError, OSError) as error:
            yield ModelEntry(name, model, cause=str(error))
            continue
        notes = [*spec.notes, *profile.notes()]
        model = replace(model, source=_short_source(spec.source), notes=notes)
        yield ModelEntry(name, model, content, spec, profile, classes)


def _short_source(source: str) -> str:
    """'cfg/x.yaml, backbone y': without the folders of this machine."""
    file, comma, rest = source.partition(",")
    path = Path(file)
    if path.is_absolute():
        path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    return f"{path}{comma}{rest}" if file else ""


def runs(
    config: CompareConfig,
    models: Sequence[ModelEntry],
    protocol: Protocol,
    splits: Splits | None,
) -> list[RunPlan]:
    """The runs of all models that can be built, seed by seed, so that early tables have all models.

    splits: None where nothing is run.
    """
    found: list[RunPlan] = []
    if splits is None:
        return found
    trains, shared = config.kind == TRAIN, of_a_run(protocol)
    passes = len(splits.evaluated)  # forward passes of one image
    if trains:
        passes = TRAINING_PASSES * config.epochs * len(splits.trained["train"])
    for seed, model in product(config.seeds if trains else (None,), models):
        if seed is None:
            words = ["python", "val.py", "--weights", model.model.weights, "--data", config.data]
            words += ["--img", str(config.imgsz), "--batch-size", str(config.batch_size)]
            words += ["--task", config.split] if config.split != "val" else []
        else:
            words = ["python", "train.py", *run_flags(config, model, seed, protocol)]
        if model.profile is not None:
            command = shlex.join([*words, "--workers", str(config.workers)])
            name = run_id(model.name, seed, model.model_id, shared)
            work = float(model.profile.flops) * passes
            found.append(RunPlan(model, seed, name, work, command))
    return found


def run_flags(config: CompareConfig, model: ModelEntry, seed: int, protocol: Protocol) -> list[str]:
    """The flags of train.py for the model and the protocol of a run."""
    own = model.model
    texts = {name: getattr(own, name) for name in ("cfg", "backbone", "neck", "head", "fit")}
    texts["weights"] = config.init_weights
    flags = [word for name, text in texts.items() if text for word in (f"--{name}", text)]
    flags += ["--data", config.data, "--img", str(config.imgsz), "--epochs", str(config.epochs)]
    flags += ["--batch-size", str(config.batch_size), "--seed", str(seed), "--patience", "0"]
    defaults = CompareConfig(cfg=("any",))
    flags += ["--cache", config.cache]
    for name in ("hyp", "optimizer", "amp"):
        value = protocol.get(CHOSEN, {}).get(name, getattr(config, name))
        if value != getattr(defaults, name):
            flags += [f"--{name}", str(value)]
    return flags


def state_of(folder: Path) -> str:
    """NEW, HALF (last.pt has a state to resume) or TRAINED, by a run's folder.

    A damaged last.pt is NEW: the run begins again.
    """
    try:
        saved = load_checkpoint(folder / "weights" / "last.pt")
    except UserError:
        return NEW
    return TRAINED if saved.get("train_state") is None else HALF


def epochs_done(folder: Path) -> int:
    """Complete epochs, by the lines of results.csv in a run's folder."""
    try:
        text = (folder / "results.csv").read_text(encoding="utf-8")
    except OSError:
        return 0
    return max(len(text.splitlines()) - 1, 0)

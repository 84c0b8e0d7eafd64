"""The models of a comparison and its runs: everything that is known before work begins."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from engine.checkpoint import load_detector
from engine.compare.config import EVALUATE, TRAIN, CompareConfig
from engine.compare.protocol import Protocol, of_a_run
from engine.compare.record import ID_LENGTH, model_id, run_id
from engine.compare.schema import Model
from models.builder import build_detector
from models.detector import Detector
from models.profile.counting import ModelProfile, profile_spec
from models.profile.fit import fit, read_budget
from models.spec import ModelSpec
from models.yaml.parser import load_draft
from utils.errors import UserError, nearest
from utils.paths import ROOT

TRAINING_PASSES = 3  # a step costs about three forwards: one, and twice as much backwards
COMMON_NAMES = ("best", "last")  # of checkpoints; the run's folder names them better


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
        if self.spec is None:
            raise UserError(self.cause or f"{self.name} cannot be built")
        return build_detector(self.spec, classes=self.classes)


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
    """The models of --cfg (with each --backbone and --neck) or --weights, in the order given.

    A model that cannot be built has its cause.  UserError for files that cannot be read, and if no
    model can be built.
    """
    if config.weights:
        found = tuple(_checkpoint(config, name) for name in config.weights)
    else:
        found = tuple(_models(config, classes))
    names = [item.name for item in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two models would both be called {twice!r}; rename or leave out one file")
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


def _models(config: CompareConfig, classes: int) -> Iterator[ModelEntry]:
    budget = read_budget(config.fit, image_size=config.imgsz) if config.fit else None
    stems = [Path(file).stem for file in config.cfg]
    combined = list(product(config.cfg, config.backbone or ("",), config.neck or ("",)))
    drafts = [  # all of them first: a file that cannot be read ends it before work begins
        load_draft(file, backbone=backbone or None, neck=neck or None)
        for file, backbone, neck in combined
    ]
    for (file, backbone, neck), draft in zip(combined, drafts, strict=True):
        stem = Path(file).stem
        parts = (file if stems.count(stem) > 1 else stem, backbone, neck)
        name = " + ".join(part for part in parts if part)
        source, notes = _short_source(draft.source), list[str]()
        model = Model(file, backbone, neck, config.fit, "", source, notes)
        try:
            if budget is None:
                spec = draft.resolve()
            else:
                fitted = fit(draft, budget, classes=classes)
                spec = fitted.spec
                notes.append(fitted.text(budget))
            profile = profile_spec(spec, image_size=config.imgsz, classes=classes)
        except UserError as error:
            yield ModelEntry(name, model, cause=str(error))
            continue
        notes += [*spec.notes, *profile.notes()]
        yield ModelEntry(name, model, model_id(spec), spec, profile, classes)


def _checkpoint(config: CompareConfig, file: str) -> ModelEntry:
    name = _checkpoint_name(file, config.weights)
    model = Model(cfg="", backbone="", neck="", fit="", weights=file, source="", notes=[])
    try:
        detector = load_detector(file, device="cpu")
        classes = len(detector.names)
        profile = profile_spec(detector.spec, image_size=config.imgsz, classes=classes)
        content = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:ID_LENGTH]
    except (UserError, OSError) as error:
        return ModelEntry(name, model, cause=str(error))
    spec = detector.spec
    notes = [*spec.notes, *profile.notes()]
    model = replace(model, source=_short_source(spec.source), notes=notes)
    return ModelEntry(name, model, content, spec, profile, classes)


def _checkpoint_name(file: str, others: Sequence[str]) -> str:
    """The file's stem, for best.pt that of its run's folder; the path where two have the same."""

    def short(name: str) -> str:
        path = Path(name)
        if path.stem in COMMON_NAMES and path.parent.name == "weights":
            return path.parent.parent.name or path.stem
        return path.stem

    return file if [short(item) for item in others].count(short(file)) > 1 else short(file)


def _short_source(source: str) -> str:
    """'cfg/x.yaml, backbone y': without the folders of this machine."""
    file, comma, rest = source.partition(",")
    path = Path(file)
    if path.is_absolute():
        path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)
    return f"{path}{comma}{rest}" if file else ""


def runs(
    config: CompareConfig, models: Sequence[ModelEntry], protocol: Protocol, images: int
) -> tuple[RunPlan, ...]:
    """The runs of all models that can be built, seed by seed, so that early tables have all models.

    `images`: how many one run sees in all, in epochs or once.
    """
    if config.kind not in {TRAIN, EVALUATE}:
        return ()
    seeds: tuple[int | None, ...] = config.seeds if config.kind == TRAIN else (None,)
    passes = TRAINING_PASSES if config.kind == TRAIN else 1
    shared = of_a_run(protocol)
    return tuple(
        RunPlan(
            entry=model,
            seed=seed,
            id=run_id(model.name, seed, model.model_id, shared),
            work=float(model.profile.flops) * passes * images,
            command=run_command(config, model, seed),
        )
        for seed in seeds
        for model in models
        if model.profile is not None
    )


def run_flags(config: CompareConfig, model: ModelEntry, seed: int) -> list[str]:
    """The flags of train.py for the model and the protocol of a run."""
    own = model.model
    texts = {name: getattr(own, name) for name in ("cfg", "backbone", "neck", "fit")}
    flags = [word for name, text in texts.items() if text for word in (f"--{name}", text)]
    flags += ["--data", config.data, "--img", str(config.imgsz), "--epochs", str(config.epochs)]
    flags += ["--batch-size", str(config.batch_size), "--seed", str(seed), "--patience", "0"]
    defaults = CompareConfig(cfg=("any",))
    for name in ("hyp", "optimizer", "amp", "cache"):
        if getattr(config, name) != getattr(defaults, name):
            flags += [f"--{name}", str(getattr(config, name))]
    return flags


def run_command(config: CompareConfig, model: ModelEntry, seed: int | None) -> str:
    """The command line that repeats a run."""
    if seed is None:
        words = ["python", "val.py", "--weights", model.model.weights, "--data", config.data]
        words += ["--img", str(config.imgsz), "--batch-size", str(config.batch_size)]
        words += ["--task", config.split] if config.split != "val" else []
    else:
        words = ["python", "train.py", *run_flags(config, model, seed)]
    words += ["--workers", str(config.workers)]
    return shlex.join(words)


def baseline_of(name: str, names: Sequence[str]) -> str:
    """The row to compare with; UserError for a name that no row has."""
    if not name:
        return names[0]
    if name not in names:
        known = ", ".join(names)
        raise UserError(f"--baseline {name}: no such row; there are {known}{nearest(name, names)}")
    return name

"""The conditions of a comparison: equal for all rows of a table, and what its folder is locked to.

They are kept in protocol.json next to the table, and in each record.  The commit of the code is
noted in the records but is not part of this: a change of the documentation would part all tables.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from data.loading.loader import POOL
from engine.compare.config import PROFILE, TRAIN, CompareConfig
from engine.evaluate.config import EvalConfig
from utils.environment import run_environment
from utils.errors import UserError
from utils.files import locked, run_folder, write_text
from utils.hyp import AUTO, choose_recipe, load_hyp
from utils.terminal import warn

FILE = "protocol.json"
SEEDS = "seeds"  # the key that may grow
CHOSEN = "chosen"  # what --hyp auto and --optimizer auto came to; its values are in "training"
VERSIONS = "versions"
LATENCY = "latency"  # how times are taken, of the table and not of a run
EAGER = {"dtype": "fp32", "graph": False}  # what a protocol without LATENCY means
NOT_LOCKED = ("device", "commit")  # of the environment; the device has a field of its own
# hyper-parameters that the first records do not have
LATER = ("min_updates", "anchors", "cosine", "close_mosaic")
DIGITS = 12  # hexadecimal, of a file's hash
SHOWN = 6  # differences in a message
Protocol = dict[str, Any]
# {'protocol': ..., 'models': `record.model_id` by row; '' of one that could not be built: any}
Lock = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """The data of a comparison: what is evaluated, and what its models are trained with."""

    name: str
    evaluated: DataIndex
    trained: Mapping[str, DataIndex]  # 'train', 'val'; {} where nothing is trained


def load_splits(config: CompareConfig) -> Splits:
    """Scan the splits of --data that the comparison needs."""
    dataset = load_dataset_config(config.data)
    names = ("train", "val") if config.kind == TRAIN else ()
    trained = {name: load_split(dataset, name) for name in names}
    evaluated = trained.get(config.split) or load_split(dataset, config.split)
    return Splits(dataset.file.stem, evaluated, trained)


def make_protocol(config: CompareConfig, splits: Splits | None, device: torch.device) -> Protocol:
    """The protocol of a comparison; `splits` is None for costs alone.

    On a CPU, the runs at the same time share the threads.
    """
    environment = run_environment(device)
    threads = max(torch.get_num_threads() // config.jobs, 1) if device.type == "cpu" else None
    protocol: Protocol = {"kind": config.kind, "image_size": config.imgsz}
    if splits is None:
        protocol |= {"classes": config.classes, "fit": config.fit}
    else:
        data: dict[str, Any] = {"name": splits.name, "classes": list(splits.evaluated.names)}
        for name, index in {**splits.trained, config.split: splits.evaluated}.items():
            data |= {name: index.fingerprint, f"{name}_images": len(index)}
        evaluation = {name: getattr(EvalConfig, name) for name in ("conf", "iou", "max_det")}
        evaluation |= {"batch_size": config.batch_size, "rect": False, "figures": "COCO"}
        protocol |= {"data": data, "split": config.split, "evaluation": evaluation}
    if config.kind == TRAIN and splits is not None:
        names = ("epochs", "batch_size", "optimizer", "amp", "fit", "workers", "cache")
        training = {name: getattr(config, name) for name in names}
        hyp, training["optimizer"] = choose_recipe(
            config.hyp,
            config.optimizer,
            images=len(splits.trained["train"]),
            epochs=config.epochs,
            batch_size=config.batch_size,
            pretrained=bool(config.init_weights),
        )
        values = recipe(asdict(load_hyp(hyp)))
        protocol["training"] = {**training, "patience": 0, "hyp": values}  # 0: equal budgets
        if AUTO in {config.hyp, config.optimizer}:
            protocol[CHOSEN] = {"hyp": hyp, "optimizer": training["optimizer"]}
        if values["mosaic"] and len(splits.trained["train"]) > POOL:
            protocol["training"]["mosaic_pool"] = POOL  # older records: all images
        if config.init_weights:
            protocol["training"]["init_weights"] = file_digest(config.init_weights)
        protocol["evaluation"]["weights"] = "best by fitness on val"
        protocol[SEEDS] = list(config.seeds)
    protocol[VERSIONS] = {k: v for k, v in environment.items() if k not in NOT_LOCKED}
    protocol["device"] = {"name": environment["device"], "threads": threads}
    return {**protocol, LATENCY: latency_settings(config)}


def file_digest(path: str | Path) -> str:
    """The file's name and a short hash of its bytes: 'yolov5n.pt 0123456789ab'."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{Path(path).name} {digest[:DIGITS]}"


def latency_settings(config: CompareConfig) -> dict[str, Any]:
    """How the table's times are taken."""
    runtimes = {"runtimes": list(config.runtime)} if config.runtime != ("torch",) else {}
    return {"dtype": config.latency_dtype, "graph": config.latency_graph, **runtimes}


def recipe(hyp: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as records have them: older ones lack LATER, 0 there."""
    return {key: value for key, value in hyp.items() if key not in LATER or value}


def of_a_run(protocol: Protocol) -> Protocol:
    """What one run has in common with others: not seeds, timing, nor how its recipe was chosen."""
    return {key: v for key, v in protocol.items() if key not in {SEEDS, LATENCY, CHOSEN}}


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Each field that differs, by its dotted name, with both values."""

    def short(value: Any) -> str:
        text = json.dumps(value) if not isinstance(value, str) else value or "''"
        return "none" if value is None else text if len(text) <= 60 else text[:57] + "..."

    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found = []
        for key in dict.fromkeys((*first, *second)):
            path = f"{name}.{key}" if name else str(key)
            found += differences(first.get(key), second.get(key), path)
        return found
    return [] if first == second else [f"{name}: {short(first)} and {short(second)}"]


def protocol_differences(first: Protocol, second: Protocol) -> list[str]:
    """The fields of two runs' protocols that differ.

    A version that only one of them states is not among them: older records state fewer (the table
    notes which).
    """
    ours, theirs = first.get(VERSIONS), second.get(VERSIONS)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        shared = [key for key in ours if key in theirs]
        first, second = (
            {**one, VERSIONS: {key: one[VERSIONS][key] for key in shared}}
            for one in (first, second)
        )
    return differences(of_a_run(first), of_a_run(second))


def listed(differing: Sequence[str]) -> str:
    """The differences for a message."""
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return "; ".join(differing[:SHOWN]) + more


def require_equal(protocols: Mapping[str, Protocol]) -> Protocol:
    """What runs have in common, with all versions; keys name the runs.

    UserError where the protocols differ: they cannot share a table.
    """
    (first, protocol), *others = protocols.items()
    for name, other in others:
        differing = protocol_differences(protocol, other)
        if differing:
            raise UserError(
                f"{first} and {name} have different protocols and cannot be rows of one table:"
                f" {listed(differing)}"
            )
        if isinstance(other.get(VERSIONS), Mapping):
            protocol = {**protocol, VERSIONS: {**other[VERSIONS], **protocol.get(VERSIONS, {})}}
    return of_a_run(protocol)


def read_lock(folder: Path) -> Lock | None:
    """What a comparison's folder is locked to; None without a lock. UserError for another file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        set(content["protocol"].get(SEEDS) or ())  # to be compared
        return {"protocol": content["protocol"], "models": dict(content["models"])}
    except Exception as error:
        raise UserError(f"{path}: not a protocol: {error}") from error


def conflict(present: Lock, wanted: Lock) -> list[str]:
    """Why a folder cannot be continued: the differing fields, models and missing rows.

    More seeds and more rows are no conflict; fewer would leave finished runs out of the table.
    How times are taken is one where they are all there is.
    """
    differing = protocol_differences(present["protocol"], wanted["protocol"])
    if wanted["protocol"]["kind"] == PROFILE:
        before, after = (lock["protocol"].get(LATENCY, EAGER) for lock in (present, wanted))
        differing += differences(before, after, LATENCY)
    before, after = (lock["protocol"].get(SEEDS) or [] for lock in (present, wanted))
    if not set(before) <= set(after):
        differing.append(f"{SEEDS}: {before} and {after}")
    for name, model in present["models"].items():
        if name not in wanted["models"]:
            differing.append(f"row {name}: only the folder has it")
        elif model and wanted["models"][name] not in {"", model}:
            differing.append(f"row {name}: another model of that name")
    return differing


@contextmanager
def locked_folder(config: CompareConfig, lock: Lock) -> Iterator[Path]:
    """`comparison_folder`, made, locked to `lock`, and for this process alone until the end."""
    while True:
        folder = comparison_folder(config, lock)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            present = read_lock(folder)  # again: another process may have been quicker
            if present is None or not conflict(present, lock):
                known = {} if present is None else present["models"]  # some cannot be built now
                models = {name: own or known.get(name, "") for name, own in lock["models"].items()}
                write_text(folder / FILE, json.dumps({**lock, "models": models}, indent=2) + "\n")
                yield folder
                return


def comparison_folder(config: CompareConfig, lock: Lock) -> Path:
    """The folder to work in: --project/--name, or the first of name2, name3, ... that can be used.

    One can be used that is not there yet, or is of the same protocol and has no other rows; there
    finished runs are kept.  With --exist-ok it is project/name, or UserError with the fields that
    differ.  Nothing is written.
    """
    number = 0
    while True:
        number += 1
        folder = run_folder(config.project, config.name + (str(number) if number > 1 else ""))
        present = read_lock(folder)
        reasons = [] if present is None else conflict(present, lock)
        if not reasons and (present is not None or config.exist_ok or not folder.exists()):
            return folder
        if config.exist_ok:
            raise UserError(
                f"{folder}: has a comparison of another protocol, whose rows cannot share a"
                f" table with these: {listed(reasons)}; choose another --name"
            )
        if reasons:
            warn(f"{folder} has another protocol: {listed(reasons)}")

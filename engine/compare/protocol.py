"""The conditions of a comparison, as plain values: equal for all rows of a table, or no table.

They are kept in protocol.json beside the table, and in each record.  The commit of the code is
noted in the records but is no part of this: a change of the documentation would part all tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from engine.compare.config import PROFILE, TRAIN, CompareConfig
from engine.evaluate.config import EvalConfig
from utils.environment import run_environment
from utils.errors import UserError
from utils.files import write_text
from utils.hyp import load_hyp

FILE = "protocol.json"
SEEDS = "seeds"  # the key that may grow
NOT_LOCKED = ("device", "commit")  # of the environment; the device has a field of its own
SHOWN = 6  # differences in a message
Protocol = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """The data of a comparison; `train` only where something is trained."""

    name: str
    train: DataIndex | None
    val: DataIndex


def load_splits(config: CompareConfig) -> Splits:
    """Scan what the comparison needs of --data."""
    dataset = load_dataset_config(config.data)
    train = load_split(dataset, "train") if config.kind == TRAIN else None
    return Splits(dataset.file.stem, train, load_split(dataset, "val"))


def make_protocol(
    config: CompareConfig, splits: Splits | None, device: torch.device, *, threads: int | None
) -> Protocol:
    """The protocol of a comparison; `splits` is None for costs alone, `threads` on CUDA."""
    environment = run_environment(device)
    protocol: Protocol = {"kind": config.kind}
    if splits is not None:
        protocol["data"] = _data(splits)
        protocol["split"] = "val"
    else:
        protocol["classes"] = config.classes
    protocol["image_size"] = config.imgsz
    if config.kind == TRAIN:
        protocol["training"] = _training(config)
        protocol[SEEDS] = list(config.seeds)
    elif config.kind == PROFILE:
        protocol["fit"] = config.fit
    if splits is not None:
        protocol["evaluation"] = _evaluation(config)
    protocol["versions"] = {k: v for k, v in environment.items() if k not in NOT_LOCKED}
    protocol["device"] = {"name": environment["device"], "threads": threads}
    return protocol


def _data(splits: Splits) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": splits.name, "classes": list(splits.val.names)}
    for name, index in (("train", splits.train), ("val", splits.val)):
        if index is not None:
            plain[name] = index.fingerprint
            plain[f"{name}_images"] = len(index)
    return plain


def _training(config: CompareConfig) -> dict[str, Any]:
    """Every epoch is run (no patience), so that all models have the same budget."""
    names = ("epochs", "batch_size", "optimizer", "amp", "fit", "workers", "cache")
    plain = {name: getattr(config, name) for name in names}
    hyp = dataclasses.asdict(load_hyp(config.hyp))
    if hyp["min_updates"] == 0:
        del hyp["min_updates"]  # as in records that are older than this key
    return {**plain, "patience": 0, "hyp": hyp}


def _evaluation(config: CompareConfig) -> dict[str, Any]:
    settings = EvalConfig()
    chosen = {"weights": "best by fitness on val"} if config.kind == TRAIN else {}
    names = ("conf", "iou", "max_det")
    plain = {name: getattr(settings, name) for name in names}
    return {**chosen, **plain, "batch_size": config.batch_size, "rect": False, "figures": "COCO"}


def of_a_run(protocol: Protocol) -> Protocol:
    """What one run has in common with the others: all but the list of seeds."""
    return {key: value for key, value in protocol.items() if key != SEEDS}


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Each field that differs, by its dotted name, with both values."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = dict.fromkeys((*first, *second))
        parts = [
            differences(first.get(key), second.get(key), f"{name}.{key}" if name else str(key))
            for key in keys
        ]
        return [text for part in parts for text in part]
    return [] if first == second else [f"{name}: {_short(first)} and {_short(second)}"]


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = json.dumps(value) if not isinstance(value, str) else value or "''"
    return text if len(text) <= 60 else text[:57] + "..."


def listed(differing: Sequence[str]) -> str:
    """The differences for a message."""
    more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return "; ".join(differing[:SHOWN]) + more


def require_equal(protocols: Mapping[str, Protocol]) -> None:
    """Refuse (UserError) runs of different protocols for one table; keys say whose they are."""
    names = list(protocols)
    for name in names[1:]:
        differing = differences(of_a_run(protocols[names[0]]), of_a_run(protocols[name]))
        if differing:
            raise UserError(
                f"{names[0]} and {name} have different protocols and cannot be rows of one table:"
                f" {listed(differing)}"
            )


@dataclass(frozen=True)
class Lock:
    """What a comparison's folder is locked to: the protocol, and its rows' models by name."""

    protocol: Protocol
    # hash of each, see compare_record.model_id; '' of one that could not be built: any
    models: Mapping[str, str]

    def after(self, present: Lock) -> Lock:
        """This lock in place of `present`: what could be built then is not forgotten."""
        models = {name: own or present.models.get(name, "") for name, own in self.models.items()}
        return Lock(self.protocol, models)


def read_lock(folder: Path) -> Lock | None:
    """What a comparison's folder is locked to; None without a lock. UserError for another file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        set(content["protocol"].get(SEEDS) or ())  # to be compared
        return Lock(dict(content["protocol"]), dict(content["models"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a protocol: {error}") from error


def write_lock(folder: Path, lock: Lock) -> None:
    """Lock a folder."""
    write_text(folder / FILE, json.dumps(dataclasses.asdict(lock), indent=2) + "\n")


def conflict(present: Lock, wanted: Lock) -> list[str]:
    """Why a folder cannot be gone on with: the differing fields, models and missing rows.

    More seeds and more rows are no conflict; fewer would leave finished runs out of the table.
    """
    differing = differences(of_a_run(present.protocol), of_a_run(wanted.protocol))
    before, after = present.protocol.get(SEEDS), wanted.protocol.get(SEEDS)
    if not set(before or ()) <= set(after or ()):
        differing.append(f"{SEEDS}: {_short(before)} and {_short(after)}")
    for name, model in present.models.items():
        if name not in wanted.models:
            differing.append(f"row {name}: it has one")
        elif model and wanted.models[name] and wanted.models[name] != model:
            differing.append(f"row {name}: another model of that name")
    return differing

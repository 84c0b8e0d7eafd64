"""The conditions of a comparison, as plain values: equal for all rows of a table, or no table.

They are kept in protocol.json next to the table, and in each record.  The commit of the code is
noted in the records but is not part of this: a change of the documentation would part all tables.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from engine.compare.config import TRAIN, CompareConfig
from engine.evaluate.config import EvalConfig
from utils.environment import run_environment
from utils.errors import UserError
from utils.hyp import load_hyp

SEEDS = "seeds"  # the key that may grow
VERSIONS = "versions"
NOT_LOCKED = ("device", "commit")  # of the environment; the device has a field of its own
SHOWN = 6  # differences in a message
Protocol = dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """The data of a comparison: what is evaluated, and what its models are trained with."""

    name: str
    evaluated: DataIndex
    trained: Mapping[str, DataIndex]  # 'train', 'val'; {} where nothing is trained


def load_splits(config: CompareConfig) -> Splits:
    """Scan what the comparison needs of --data."""
    dataset = load_dataset_config(config.data)
    names = ("train", "val") if config.kind == TRAIN else ()
    trained = {name: load_split(dataset, name) for name in names}
    evaluated = trained.get(config.split) or load_split(dataset, config.split)
    return Splits(dataset.file.stem, evaluated, trained)


def make_protocol(
    config: CompareConfig, splits: Splits | None, device: torch.device, *, threads: int | None
) -> Protocol:
    """The protocol of a comparison; `splits` is None for costs alone, `threads` on CUDA."""
    environment = run_environment(device)
    trains = config.kind == TRAIN
    protocol: Protocol = {"kind": config.kind}
    if splits is not None:
        data: dict[str, Any] = {"name": splits.name, "classes": list(splits.evaluated.names)}
        for name, index in {**splits.trained, config.split: splits.evaluated}.items():
            data |= {name: index.fingerprint, f"{name}_images": len(index)}
        protocol |= {"data": data, "split": config.split}
    else:
        protocol["classes"] = config.classes
    protocol["image_size"] = config.imgsz
    if trains:
        names = ("epochs", "batch_size", "optimizer", "amp", "fit", "workers", "cache")
        training = {name: getattr(config, name) for name in names}
        protocol["training"] = {**training, "patience": 0}  # all epochs: equal budgets
        protocol["training"]["hyp"] = recipe(dataclasses.asdict(load_hyp(config.hyp)))
        protocol[SEEDS] = list(config.seeds)
    if splits is None:
        protocol["fit"] = config.fit
    else:
        chosen = {"weights": "best by fitness on val"} if trains else {}
        fixed = {name: getattr(EvalConfig, name) for name in ("conf", "iou", "max_det")}
        last = {"batch_size": config.batch_size, "rect": False, "figures": "COCO"}
        protocol["evaluation"] = {**chosen, **fixed, **last}
    protocol[VERSIONS] = {k: v for k, v in environment.items() if k not in NOT_LOCKED}
    protocol["device"] = {"name": environment["device"], "threads": threads}
    return protocol


def recipe(hyp: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters as records have them: the older ones lack min_updates, which is 0 there."""
    return {key: value for key, value in hyp.items() if key != "min_updates" or value}


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


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = json.dumps(value) if not isinstance(value, str) else value or "''"
    return text if len(text) <= 60 else text[:57] + "..."


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

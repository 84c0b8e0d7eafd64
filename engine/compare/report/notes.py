"""What the tables of a comparison mean and how they were made, in sentences.

All functions take the plain values of results.json (engine/compare/schema.py).
"""

from __future__ import annotations

from engine.compare.report.columns import GIGA, SIGNIFICANT, Plain
from engine.compare.schema import DONE, FAILED, PARTLY
from engine.measure.energy import NOT_MEASURED
from utils.terminal import formatted

DIRTY = "-dirty"
SPLITS = {"train": "training", "val": "validation", "test": "test"}
WARNING = "Warning: "


def notes(results: Plain) -> list[str]:
    """What the table's numbers mean and how they were made; plain sentences."""
    protocol, baseline = results["protocol"], results["baseline"] or "-"
    lines = []
    if "data" in protocol:
        split, seeds = protocol.get("split", "val"), protocol.get("seeds")
        images = f"{protocol['data'][f'{split}_images']} {SPLITS[split]} images"
        over = f", mean ± sd over seeds {', '.join(map(str, seeds))}" if seeds else ""
        lines.append(
            f"{protocol['data']['name']}, {images}, {protocol['image_size']} px{over}. ΔAP"
            f" against {baseline}, paired bootstrap over images; {SIGNIFICANT}: the interval"
            " excludes 0."
        )
    lines.append(
        "FLOPs are 2 MACs of one image; MAC MB is ShuffleNetV2's memory access cost of the"
        " convolutions; activations: peak memory of the feature maps."
    )
    fitted = {row["name"]: row["model"]["fitted_ms"] for row in results["rows"]}
    if found := {name: ms for name, ms in fitted.items() if ms is not None}:
        kind = protocol["fit"] if "fit" in protocol else protocol["training"]["fit"]
        target = float(kind.partition("=")[2].partition("@")[0])
        errors = (
            f"{name} {ms:.2f} ms ({formatted(ms / target - 1, '+.1%')})"
            for name, ms in found.items()
        )
        lines.append(
            f"Scaled to {kind} before training, by the median measured then: {', '.join(errors)}."
        )
    here, elsewhere = _devices(results)
    layouts = _layouts(results)
    if here and len(results["rows"]) > 1:
        lines.append(
            f"Speed-up: FLOPs, and median time, of {baseline} divided by those of the row."
        )
    if here:
        lines.append(
            f"Times on {here}, {_timing(results)}, models in turn, BN folded, without decoding and"
            f" NMS.{f' Memory layout, the faster one: {layouts}.' if layouts else ''}"
        )
        lines += _exported(results)
    if elsewhere:
        lines.append(f"The runs were made on another device: {elsewhere}.")
    commits, made = _commits(results)
    if len(commits) == 1:
        lines.append(f"Runs by commit {commits[0]}.")
    if len(commits) > 1:
        lines.append(f"{WARNING}runs of {len(commits)} commits: {', '.join(commits)}.")
    if any(commit.endswith(DIRTY) for commit in commits):
        lines.append(f"{WARNING}some runs were made by code with uncommitted changes (-dirty).")
    absent = [key for key in protocol.get("versions", ()) if any(key not in one for one in made)]
    if absent:
        lines.append(f"Not recorded for all runs, made by an older version: {', '.join(absent)}.")
    return lines


def _commits(results: Plain) -> tuple[list[str], list[Plain]]:
    """The commits of the finished runs, each once, and the environments that name them.

    A commit is twelve digits, and '-dirty' for uncommitted changes.
    """
    runs = (run for row in results["rows"] for run in row["runs"])
    made = [run["environment"] for run in runs if run["status"] == DONE]
    names = dict.fromkeys(one.get("commit") or "unknown" for one in made)
    dirty = {one: DIRTY if one.endswith(DIRTY) else "" for one in names}
    return [one.removesuffix(DIRTY)[:12] + end for one, end in dirty.items()], made


def _devices(results: Plain) -> tuple[str, str]:
    """Where the costs were measured, and where the runs were made if elsewhere; '' for neither."""
    made, measured = results["protocol"].get("device"), results["measurement"]
    if measured is None:
        return "", ""

    def text(device: object, threads: int | None) -> str:
        return f"{device}" if threads is None else f"{device}, torch threads: {threads}"

    here = text(measured["device"], measured["threads"])
    there = text(made.get("name"), made.get("threads")) if made else here
    return here, "" if there == here else there


def _timing(results: Plain) -> str:
    """'fp16, CUDA graphs', 'onnxruntime, torch (fp32, eager)'."""
    settings, runtimes = results["measurement"]["settings"], results["measurement"]["runtimes"]
    text = f"{settings['dtype']}, {'CUDA graphs' if settings['graph'] else 'eager'}"
    if runtimes == ["torch"]:
        return text
    return ", ".join(f"torch ({text})" if name == "torch" else name for name in runtimes)


def _exported(results: Plain) -> list[str]:
    """What other runtimes than PyTorch are and run, one sentence."""
    settings, runtimes = results["measurement"]["settings"], results["measurement"]["runtimes"]
    found = [f"{name} {settings['versions'][name]}" for name in runtimes if name != "torch"]
    if not found:
        return []
    first = f" Speed-ups, and the axes that the report opens with, are those of {runtimes[0]}."
    return [
        f"{' and '.join(found)} run the exported network in float32, with its decoding; rows and"
        f" energy are measured in PyTorch.{first}"
    ]


def _layouts(results: Plain) -> str:
    """The layout that most times were taken in, and the times that were taken in the other.

    '' without times in PyTorch.
    """
    found: dict[str, list[str]] = {}
    for row in results["rows"]:
        for one in row["latency"]:
            if one["layout"] is not None:
                found.setdefault(one["layout"], []).append(f"{row['name']} at {one['batch']}")
    usual, *others = sorted(found, key=lambda layout: -len(found[layout])) or [""]
    return "; ".join([usual, *(f"{layout} for {', '.join(found[layout])}" for layout in others)])


def lead(results: Plain) -> str:
    """The report's first sentence."""
    protocol, baseline = results["protocol"], results["baseline"]
    others = len(results["rows"]) - (1 if baseline else 0)
    against = f" against {baseline}" if baseline else ""
    data = f" on {protocol['data']['name']}" if "data" in protocol else ""
    runs = len(protocol.get("seeds") or ())
    each = f", {runs} run{'' if runs == 1 else 's'} each" if runs else ""
    return (
        f"{others} model{'' if others == 1 else 's'}{against}{data}{each}: accuracy, computed cost"
        " and measured cost under one protocol."
    )


def summary(results: Plain) -> list[dict[str, str]]:
    """The items at the head of the report: each with a name, a value and a detail ('' if none)."""
    rows, protocol, measured = results["rows"], results["protocol"], results["measurement"]
    states = [row["status"] for row in rows]
    trouble = [f"{states.count(state)} {state}" for state in (FAILED, PARTLY) if state in states]
    items = [("Models", str(len(rows)), ", ".join(trouble) or "all complete")]
    items.append(("Baseline", results["baseline"] or "none", ""))
    if data := protocol.get("data"):
        counts = {use: data.get(f"{split}_images") for split, use in SPLITS.items()}
        images = [f"{count:,} {use} images" for use, count in counts.items() if count is not None]
        items.append(("Data set", data["name"], ", ".join(images)))
    items.append(("Image size", f"{protocol['image_size']} px", ""))
    if training := protocol.get("training"):
        seeds = ", ".join(map(str, protocol.get("seeds") or ()))
        chosen = protocol.get("chosen")
        auto = f"; auto: {chosen['optimizer']}, recipe {chosen['hyp']!r}" if chosen else ""
        items.append(("Training", f"{training['epochs']} epochs", f"seeds {seeds}{auto}"))
    if measured:
        device, elsewhere = _devices(results)
        items.append(("Device", device, f"runs on {elsewhere}" if elsewhere else ""))
        items.append(("Timing", _timing(results), _layouts(results)))
    if commits := _commits(results)[0]:
        warnings = [f"warning: {len(commits)} commits in one table"] * (len(commits) > 1)
        warnings += ["warning: uncommitted changes"] * any(one.endswith(DIRTY) for one in commits)
        items.append(("Code", ", ".join(commits), "; ".join(warnings)))
    if measured and (peak := measured["device_peak"]):
        rates = [peak[f"{key}_per_second"] / GIGA for key in ("flops", "bytes")]
        flops, traffic = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in rates)
        ridge = f"ridge {rates[0] / rates[1]:.3g} FLOP/B"
        items.append(("Device peak", f"{flops} GFLOP/s", f"{traffic} GB/s, {ridge}"))
    if measured:
        items.append(("Energy", measured["energy_source"] or NOT_MEASURED, ""))
    return [{"name": name, "value": value, "detail": detail} for name, value, detail in items]

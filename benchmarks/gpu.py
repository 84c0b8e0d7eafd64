"""What one GPU does with this project, in under six minutes: `python -m benchmarks.gpu OUT`.

OUT/gpu.json and OUT/gpu.md have, at 640 px: training steps, compiled steps and train.py's epochs
from end to end, on all cores and on two; a peer's epochs, with --peer PYTHON; latency by type,
layout and graph; and three checks.  Each section is a process with a time limit, and what it has
found so far is written at once.  Each row that fails states its cause.  Validation is of weights
that have learned for two epochs: `val.py --task speed` times real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import copied
from benchmarks.gpu_rows import MARK, MODELS, Row
from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from engine.distributed import select_device
from utils.config import option, parse
from utils.environment import run_environment
from utils.errors import UserError, run_script
from utils.files import write_text
from utils.terminal import say

PEER = """
import json, sys, time
import torch
from ultralytics import YOLO

data, device, size, batch, workers, folder = sys.argv[1:]
started = []

def begin(trainer):
    started.append(time.perf_counter())

def end(trainer):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    images = len(trainer.train_loader.dataset)
    row = {"model": "yolov5n", "what": f"epoch {len(started)}", "batch": int(batch)}
    rate = images / (time.perf_counter() - started[-1])
    print("\\nrow " + json.dumps({**row, "images/s": rate}), flush=True)

model = YOLO("yolov5n.yaml")
model.add_callback("on_train_epoch_start", begin)
model.add_callback("on_train_epoch_end", end)
model.train(
    data=data, device=device or None, imgsz=int(size), batch=int(batch), workers=int(workers),
    epochs=3, val=False, plots=False, save=False, project=folder,
)
"""
PIN = (
    "import os, sys; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:int(sys.argv[1])]);"
    " os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
FEW = 2  # cores of a free notebook
SECONDS = {  # by section, the most important ones first
    "yolov5n": 80, "yolov5n-cores": 90, "peer": 60, "check": 60, "latency": 60, "yolov5l": 70,
    "yolov5l-ghost": 70, "yolov5s": 60, "compiled": 150,
}  # fmt: skip
QUICK = ("yolov5n", "yolov5n-cores", "peer", "check", "latency")
QUICK_FLAGS = (
    *("--img", "64", "--batch", "4", "--workers", "1", "--steps", "1", "--models", "yolov5n"),
    *("--latency-batches", "1", "2", "--latency-seconds", "0.1"),
)
IMAGES, QUICK_IMAGES = 2048, 8  # to train with; an eighth of these to validate with


@dataclass(frozen=True)
class GpuConfig:
    """The command line."""

    out: str = option(help="folder of the results; its flag may be left out")
    images: str = option("shapes", help="data set: YAML file, its name, or a folder of COCO")
    device: str = option("", help="cpu or a GPU number; '': CUDA if present")
    sections: tuple[str, ...] = option(
        tuple(SECONDS), choices=tuple(SECONDS), help="what to measure, in this order"
    )
    seconds: float = option(340.0, help="seconds for all sections; later ones are left out")
    peer: str = option("", metavar="PYTHON", help="Python with ultralytics to compare with")
    quick: bool = option(False, help="tiny sizes: whether the script works")


@dataclass
class Section:
    """What is known of one section."""

    name: str
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    cause: str | None = None  # why there are no more rows


def main(argv: list[str] | None = None) -> None:
    """Measure, and write the report after every row."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--out")
    config = parse(GpuConfig, words, prog="benchmarks.gpu", description=__doc__ or "")
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    device = select_device(config.device)
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.gpu {' '.join(words[1:])}",
        "environment": run_environment(device),
        "cores": len(os.sched_getaffinity(0)),
        "images": config.images,
    }
    sections: list[Section] = []
    with tempfile.TemporaryDirectory() as folder, (out / "log.txt").open("w") as log:
        data = data_of(config, Path(folder))
        end = time.perf_counter() + config.seconds
        for name in [one for one in config.sections if not config.quick or one in QUICK]:
            section, start = Section(name), time.perf_counter()
            sections.append(section)
            limit = end - start if config.quick else min(SECONDS[name], end - start)
            if name == "peer" and not config.peer:
                section.cause = "no --peer"
            elif limit <= 0:
                section.cause = f"left out: the {config.seconds:.0f} s are over (--seconds)"
            else:
                command = command_of(name, config, data, folder)
                for row in rows_of(section, command, log=log, seconds=limit):
                    section.rows.append(with_share(row, sections))
                    section.seconds = time.perf_counter() - start
                    write(out, report, sections)
            section.seconds = time.perf_counter() - start
            write(out, report, sections)
            say(f"{name}: {len(section.rows)} rows, {section.seconds:.0f} s {section.cause or ''}")
    say((out / "gpu.md").read_text(encoding="utf-8"))


def data_of(config: GpuConfig, folder: Path) -> Path:
    """The data set YAML of copies of the images, in `folder`."""
    source = config.images
    if Path(source, "annotations").is_dir():
        source = str(coco_yaml(Path(source), folder / "coco.yaml"))
    index: DataIndex = load_split(load_dataset_config(source), "train")
    number = QUICK_IMAGES if config.quick else IMAGES
    for split, count in (("train", number), ("val", max(number // 8, 1))):
        copied(index, count, folder / split)
    file = folder / "images.yaml"
    splits = {"train": "train/images", "val": "val/images"}
    content = {"path": str(folder), **splits, "names": list(index.names)}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def coco_yaml(folder: Path, file: Path) -> Path:
    """A YAML file for COCO's own folders: the smallest of its splits that has images."""
    files = sorted(folder.glob("annotations/instances_*.json"), key=lambda one: one.stat().st_size)
    for listed in files:
        split = listed.stem.removeprefix("instances_")
        for images in (folder / split, folder / "images" / split):
            if images.is_dir():
                content = {"train": {"images": str(images), "annotations": str(listed)}}
                file.write_text(yaml.safe_dump(content), encoding="utf-8")
                return file
    raise UserError(f"{folder}: no annotations/instances_SPLIT.json with a folder SPLIT of images")


def command_of(name: str, config: GpuConfig, data: Path, folder: str) -> list[str]:
    """The process of a section."""
    cores = len(os.sched_getaffinity(0))
    size = "64" if config.quick else "640"
    if name == "peer":
        batch = "4" if config.quick else str(MODELS["yolov5n"])
        sizes = [size, batch, str(min(cores, 16))]
        return [config.peer, "-c", PEER, str(data), config.device, *sizes, folder]
    few = name.endswith("-cores")
    words = ["-m", "benchmarks.gpu_rows", "--section", name, "--data", str(data)]
    words += ["--device", config.device, "--workers", str(FEW if few else min(cores, 16))]
    words += QUICK_FLAGS if config.quick else ()
    return [sys.executable, *(("-c", PIN, str(FEW)) if few else ()), *words]


def rows_of(section: Section, command: Sequence[str], *, log: Any, seconds: float) -> Iterator[Row]:
    """The rows that a process prints within its time; why it ended early is the section's cause."""
    begun = log.tell()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
    ) as child:
        stop = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))  # its loaders, too
        stop.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
            child.wait()
        finally:
            over = not stop.is_alive()
            stop.cancel()
            if sys.exc_info()[0] is not None and child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    code = child.returncode
    if over:
        section.cause = f"stopped after {seconds:.0f} s"
    elif code:
        log.flush()
        with Path(log.name).open(encoding="utf-8", errors="replace") as text:
            text.seek(begun)
            lines = [line.strip() for line in text if line.strip()]
        section.cause = f"exit code {code}: {lines[-1][:200] if lines else 'see log.txt'}"


def with_share(row: Row, sections: Sequence[Section]) -> Row:
    """A row with its images per second as a share of the model's bare step."""
    bare = {
        one["model"]: one.get("images/s")
        for section in sections
        for one in section.rows
        if one.get("what") == "bare"
    }
    rate, limit = row.get("images/s"), bare.get(row.get("model"))
    return {**row, "of bare": rate / limit} if rate and limit else row


def write(out: Path, report: Row, sections: Sequence[Section]) -> None:
    """gpu.json and gpu.md as far as they are known."""
    content = {**report, "sections": [vars(section) for section in sections]}
    write_text(out / "gpu.json", json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in report["environment"].items() if value)
    lines = ["# GPU figures", "", f"`{report['command']}`", "", f"{facts}; {report['cores']} cores"]
    for section in sections:
        lines += ["", f"## {section.name.replace('-cores', f', {FEW} cores')}", ""]
        heads = list(dict.fromkeys(key for row in section.rows for key in row))
        if heads:
            lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in section.rows:
            lines.append("| " + " | ".join(text(row.get(head)) for head in heads) + " |")
        if section.cause:
            lines += ["", section.cause]
    write_text(out / "gpu.md", "\n".join(lines) + "\n")


def text(value: Any) -> str:
    """Of a cell: three digits of a number."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value).replace("|", "\\|")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    run_script(main)

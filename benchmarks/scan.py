"""Seconds and memory of the start on a data set of YOLO labels: `python -m benchmarks.scan`.

The set is made of hard links to the images of a folder, and their labels, in a temporary folder.
Every scan is a process of its own that has imported torch.  With `--peer` Ultralytics, in an
environment of its own, reads the same files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from utils.config import option, parse
from utils.errors import UserError, run_script
from utils.images import IMAGE_SUFFIXES

CLASSES = 80
SETTLED = 3  # s; the cache does not trust files that were changed in the two seconds before
LINKS = 30_000  # of one file; ext4 allows 65,000

OURS = """
from data.index.dataset import load_dataset_config, load_split
def scan(): return load_split(load_dataset_config(sys.argv[1]), "train").records
"""
PEER = """
from ultralytics.data import YOLODataset
names = dict(enumerate(map(str, range(80))))
def scan():
    folder = sys.argv[1].removesuffix(".yaml") + "/images/train"
    return YOLODataset(img_path=folder, data={"names": names, "nc": 80, "channels": 3}).labels
"""
# Memory of a worker: what becomes its own when it has looked at every record once
MEASURE = """
import gc, json, os, resource, sys, time
import torch
%s
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
start, busy = time.perf_counter(), time.process_time()
records = scan()
seconds, busy = time.perf_counter() - start, time.process_time() - busy
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
sys.stdout.flush()
if not os.fork():
    gc.collect()
    before = private()
    for i in range(len(records)):
        record = records[i]
        values = list((record if isinstance(record, dict) else vars(record)).values())
    gc.collect()
    print(json.dumps([len(records), seconds, busy, peak, private() - before]), flush=True)
    os._exit(0)
os.wait()
"""


@dataclass(frozen=True)
class ScanConfig:
    """The command line: which files, and how many."""

    images: str = option(
        "../shared/datasets/coco128/images", help="folder of images; labels next to it"
    )
    number: int = option(118_287, help="images of the set", min=1)
    peer: str = option("", help="Python of an environment with ultralytics", metavar="PYTHON")


def make_set(config: ScanConfig, root: Path) -> Path:
    """A set of config.number links below `root`; its YAML file."""
    folder = Path(config.images)
    sources = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not sources:
        raise UserError(f"--images {folder}: no images there")
    for name in ("images", "labels"):
        (root / "set" / name / "train").mkdir(parents=True)
    for i in range(config.number):
        image = sources[i % len(sources)]
        label = folder.parent / "labels" / image.relative_to(folder).with_suffix(".txt")
        for name, source in (("images", image), ("labels", label)):
            copy = root / f"{name}{i % len(sources)}-{i // len(sources) // LINKS}{source.suffix}"
            if not copy.exists() and source.exists():
                shutil.copyfile(source, copy)
            if source.exists():
                os.link(copy, root / "set" / name / "train" / f"{i:012}{source.suffix}")
    file = root / "set.yaml"
    names = [str(number) for number in range(CLASSES)]
    file.write_text(f"path: set\ntrain: images/train\nnames: {json.dumps(names)}\n")
    return file


def measure(python: str, script: str, file: Path) -> list[float]:
    """Images, seconds, those of all cores, peak in MB and a worker's MB of a scan."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(file.parent / "cache")}
    command = [python, "-c", MEASURE % script, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    config = parse(ScanConfig, argv, prog="benchmarks.scan", description=__doc__ or "")
    rows = [("FeatherDet", sys.executable, OURS)]
    if config.peer:
        rows.append(("Ultralytics", config.peer, PEER))
    sys.stdout.write(f"{'':24}{'images':>9}{'s':>9}{'CPU s':>9}{'peak MB':>9}{'MB/worker':>11}\n")
    with tempfile.TemporaryDirectory() as folder:
        file = make_set(config, Path(folder))
        time.sleep(SETTLED)
        for name, python, script in rows:
            for start in ("first", "cached"):
                images, seconds, busy, peak, worker = measure(python, script, file)
                numbers = f"{images:>9}{seconds:>9.2f}{busy:>9.2f}{peak:>9.0f}{worker:>11.1f}"
                sys.stdout.write(f"{name + ', ' + start:24}{numbers}\n")
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    run_script(main)

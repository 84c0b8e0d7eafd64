"""Detection on a CPU, bare and end to end: `python -m benchmarks.detect --weights yolov5n.pt`.

Milliseconds per image in each runtime, in turn, medians over --repeats: of the network alone, on
images that are letterboxed already, and of detect.py, which reads files and writes annotated
copies.
With --peer, Ultralytics does the same in PyTorch, in the environment of that Python, with random
weights of the same architecture (it finds nothing, so that it draws nothing).
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.sources.frames import Sources
from engine.predict.config import DetectConfig
from engine.predict.console import Console
from engine.predict.pipeline import DEPTH, ReadAhead
from engine.predict.predictor import Predictor
from engine.predict.run import follow
from utils.config import check_options, option, parse
from utils.environment import keep_freed_memory, use_threads
from utils.errors import run_script
from utils.nms import NmsConfig

PEER = """
import sys, time
import torch
from ultralytics import YOLO

folder, out, size, threads = sys.argv[1:]
model = YOLO("yolov5n.yaml")
flags = dict(source=folder, save=True, imgsz=int(size), device="cpu", project=out, verbose=False)

def run():
    return sum(1 for _ in model.predict(stream=True, **flags))

torch.set_num_threads(int(threads))
run()
print("time ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    count = run()
    print("time", 1000 * (time.perf_counter() - start) / count, flush=True)
"""


@dataclass(frozen=True)
class DetectBenchConfig:
    """The command line."""

    weights: str = option(help="checkpoint, FeatherDet's or YOLOv5's")
    source: str = option(help="folder of images, or a video")
    imgsz: int = option(640, flags=("--img",), min=32, max=4096, help="long side in pixels")
    batch_size: int = option(1, flags=("--batch",), min=1, max=1024, help="of detect.py")
    runtimes: tuple[str, ...] = option(
        ("torch", "onnxruntime", "openvino"),
        choices=("torch", "onnxruntime", "openvino"),
        help="what computes",
    )
    repeats: int = option(3, min=1, max=1000, help="timings of each kind")
    threads: int = option(0, min=0, max=256, help="computing threads; 0: one for each core")
    peer: str = option("", metavar="PYTHON", help="Python with ultralytics to compare with")

    def __post_init__(self) -> None:
        check_options(self)


def main(argv: list[str] | None = None) -> None:
    """Print a line for each runtime: bare, end to end, and their ratio."""
    config = parse(DetectBenchConfig, argv, prog="benchmarks.detect", description=__doc__ or "")
    keep_freed_memory()
    use_threads(config.threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        timings: dict[str, Callable[[], float]] = {}
        for runtime in config.runtimes:
            timings[f"{runtime} bare"], timings[f"{runtime} end to end"] = own(
                config, runtime, Path(folder)
            )
        if config.peer:
            timings["Ultralytics end to end"] = peer(config, folder, stack)
        times: dict[str, list[float]] = {name: [] for name in timings}
        for _ in range(config.repeats):
            for name, timing in timings.items():
                times[name].append(timing())
    median = {name: statistics.median(found) for name, found in times.items()}
    print(f"{config.source} at {config.imgsz} px, batch {config.batch_size},"
          f" {torch.get_num_threads()} threads, ms per image")  # fmt: skip
    for runtime in config.runtimes:
        bare, whole = median[f"{runtime} bare"], median[f"{runtime} end to end"]
        print(f"{runtime:12} bare {bare:6.1f}   end to end {whole:6.1f}   ratio {whole / bare:.2f}")
    if config.peer:
        print(f"{'Ultralytics':12} {'':13}end to end {median['Ultralytics end to end']:6.1f}")


def own(
    config: DetectBenchConfig, runtime: str, folder: Path
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Timings of the network alone and of all that detect.py does once its model is loaded."""
    settings = DetectConfig(
        weights=config.weights,
        source=(config.source,),
        batch_size=config.batch_size,
        project=str(folder),
        name=runtime,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = Predictor(
            config.weights,
            image_size=config.imgsz,
            device="cpu",
            nms=NmsConfig(max_det=settings.max_det, multi_label=False),
            runtime=runtime,
        )
    images = [canvas(predictor, frame.image) for frame in Sources(config.source)]

    @torch.inference_mode()
    def bare() -> float:
        start = time.perf_counter()
        for image in images:
            predictor.model.detect(image, 0.25)
        return 1000 * (time.perf_counter() - start) / len(images)

    def whole() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            console = Console()
            reader = ReadAhead(console.problem, depth=DEPTH + config.batch_size)
            sources = Sources(config.source, report=reader.report)
            follow(settings, predictor, sources, reader=reader, console=console)
        return 1000 * (time.perf_counter() - start) / len(images)

    bare(), whole()
    return bare, whole


def canvas(predictor: Predictor, image: np.ndarray) -> Tensor:
    """What the network gets of an image."""
    pixels = torch.from_numpy(predictor.letterbox(image).apply(image)).permute(2, 0, 1)
    return pixels[None].to(torch.float32).div_(255)


def peer(config: DetectBenchConfig, folder: str, stack: ExitStack) -> Callable[[], float]:
    """A timing of Ultralytics in a process that waits for its turns."""
    threads = str(torch.get_num_threads())
    command = [config.peer, "-c", PEER, config.source, folder, str(config.imgsz), threads]
    process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stack.callback(process.stdin.close)

    def answer() -> str:
        for line in process.stdout or ():
            if line.startswith("time "):
                return line.split()[1]
        raise RuntimeError("the peer ended; see above")

    def timing() -> float:
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
        return float(answer())

    answer()
    return timing


if __name__ == "__main__":
    run_script(main)

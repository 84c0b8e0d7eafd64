"""What export.py does: one file per format, each compared with PyTorch after it is written."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint import TrainedWith, load_trained
from engine.export.config import ExportConfig
from engine.export.formats import WRITERS, Exportable, best_rows, megabytes
from engine.export.int8 import write_int8
from engine.export.metadata import Metadata
from engine.export.runtime import open_exported, required
from models.builder import build_detector
from models.detector import Detector
from models.yaml.parser import load_spec
from utils.config import DEFAULT_SIZE
from utils.environment import use_threads
from utils.errors import UserError
from utils.nms import NmsConfig, nms
from utils.terminal import say

CLASSES = 80  # of --cfg
CPU = torch.device("cpu")
TOLERANCE = 1e-3  # of boxes in pixels over the image's side, and of scores; float16: 20 times


def run(config: ExportConfig) -> list[Path]:
    """Write the files (or folders) that `config` asks for, print where they are. UserError."""
    use_threads(config.threads)
    for name in config.include:
        required(name)
        required(f"{name} int8" if config.int8 and name == "openvino" else name)
    suppresses = config.nms == "in-graph"
    if config.weights:
        model, trained = load_trained(config.weights, device="cpu", fuse=True, nms=suppresses)
        base = Path(config.weights).with_suffix("")
    else:
        model = build_detector(load_spec(config.cfg), classes=CLASSES).eval()
        model.fuse(nms=suppresses)
        trained, base = TrainedWith(), Path(Path(config.cfg).stem)
    stride = model.max_stride
    sides = config.imgsz or (trained.image_size or DEFAULT_SIZE,)
    size = sides[0], sides[-1]
    if any(side % stride for side in size):
        fit = " ".join(str(-(-side // stride) * stride) for side in sides)
        given = " ".join(map(str, sides))
        raise UserError(f"--img {given}: not a multiple of the stride {stride}; use --img {fit}")
    metadata = Metadata(
        names=model.names,
        stride=stride,
        size=None if config.dynamic else size,
        batch=None if config.dynamic else config.batch_size,
        head=type(model.head).__name__,
        data=trained.data,
        precision="int8" if config.int8 else "float16" if config.half else "float32",
        suppression=NmsConfig(
            conf=config.conf_thres,
            iou=config.iou_thres,
            max_det=config.max_det,
            multi_label=False,
        )
        if suppresses
        else None,
        end_to_end=model.end_to_end,
    )
    model = model.to(memory_format=torch.contiguous_format)
    # a size of 1 would be taken for a constant
    batch = max(config.batch_size, 2) if config.dynamic else config.batch_size
    images = torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    network = Exportable(model, half=config.half).eval().requires_grad_(False)
    if config.int8:
        return write_int8(config, network, images, metadata, base)
    paths = []
    for name in config.include:
        start = time.perf_counter()
        path = WRITERS[name](network, images, metadata, base)
        apart = difference(model, path, images)
        limit = TOLERANCE * (20 if config.half else 1)
        if not apart <= limit:
            raise UserError(
                f"{path}: its outputs differ from PyTorch's by {apart:.2g} (limit {limit:g})"
            )
        say(
            f"{path} ({megabytes(path):.1f} MB, {time.perf_counter() - start:.1f} s);"
            f" outputs differ from PyTorch's by {apart:.1g}"
        )
        paths.append(path)
    return paths


@torch.inference_mode()
def difference(model: Detector, path: Path, images: Tensor) -> float:
    """How far a file's outputs are from the model's: scores, and boxes by the image's side.

    The detections of an in-graph suppression are compared with `utils.nms.nms` in PyTorch, those of
    an end-to-end head with `best_rows`.
    """
    boxes, scores = model.head.dense(model(images.to(next(model.parameters()).dtype)))
    exported = open_exported(path, CPU)
    found, suppression = exported.outputs(images), exported.metadata.suppression
    side = max(images.shape[2:])
    if suppression is None and not model.end_to_end:
        apart = ((boxes - found[0]).abs().max() / side, (scores - found[1]).abs().max())
        return float(torch.stack(apart).max())
    if suppression is not None:
        own = known = kept_rows(boxes, scores, suppression)
    else:
        own, known = best_rows(boxes, scores), F.pad(boxes, (0, 0, 0, 1))
    # two scores that are almost equal may change places, so each box has its nearest one
    box = (found[0][:, :, None, :4] - known[:, None, :, :4]).abs().amax(-1).amin(-1).max() / side
    return max(float(box), float((found[0][..., 4] - own[..., 4]).abs().max()))


def kept_rows(boxes: Tensor, scores: Tensor, config: NmsConfig) -> Tensor:
    """What an in-graph suppression should give, by `utils.nms.nms`: (B, max_det or N, 6)."""
    images, cells = boxes.shape[:2]
    image = torch.arange(images).repeat_interleave(cells)
    kept = nms(image, boxes.flatten(0, 1), scores.flatten(0, 1), config, images=images)
    rows = boxes.new_zeros(images, min(config.max_det, cells), 6)
    for row, item in zip(rows, kept, strict=True):
        row[: len(item)] = torch.cat(
            (item.boxes, item.scores[:, None], item.labels[:, None].float()), 1
        )
    return rows

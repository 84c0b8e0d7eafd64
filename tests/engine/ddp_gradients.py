"""Gradients of a few batches: python ddp_gradients.py MODEL.yaml OUT.pt, alone or under torchrun.

Under torchrun each rank takes its own two images of each case; alone, one process takes all.
"""

import os
import sys
from contextlib import nullcontext
from itertools import product

import torch
from torch import nn

from engine import distributed
from engine.train.config import TrainConfig
from engine.train.model import ForwardAndLoss, wrapped
from models.builder import build_detector
from models.losses.build import build_loss
from models.yaml.parser import load_spec
from utils.boxes import Targets
from utils.hyp import Hyperparameters

# of each batch, boxes on rank 0 and on rank 1, two images each; several batches accumulate
CASES = {
    "equal": [(3, 3)],
    "unequal": [(7, 2)],
    "one without": [(5, 0)],
    "none": [(0, 0)],
    "accumulated": [(5, 0), (2, 7), (3, 3)],
}


def share(boxes, rank):
    """Images and targets of one rank."""
    generator = torch.Generator().manual_seed(10 + rank)
    count = boxes[rank]
    images = torch.rand(2, 3, 64, 64, generator=generator)
    corners = torch.rand(count, 2, generator=generator) * 32
    sizes = 6 + torch.rand(count, 2, generator=generator) * 24
    return images, Targets(
        torch.randint(0, 2, (count,), generator=generator),
        torch.randint(0, 3, (count,), generator=generator),
        torch.cat((corners, corners + sizes), 1),
    )


def whole(boxes):
    """The shares of both ranks as one batch."""
    images, targets = zip(*(share(boxes, rank) for rank in (0, 1)), strict=True)
    index = torch.cat([item.image_index + 2 * rank for rank, item in enumerate(targets)])
    labels = torch.cat([item.labels for item in targets])
    return torch.cat(images), Targets(index, labels, torch.cat([item.boxes for item in targets]))


def main(model_file, out):
    """Write {case: {parameter: gradient}} from rank 0, of all heads."""
    world = distributed.start("cpu", timeout=60)
    result = {}
    for head, (name, batches) in product(("anchor", "free", "free-e2e"), CASES.items()):
        torch.manual_seed(0)
        model = build_detector(load_spec(model_file, head=head), classes=3).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        loss = build_loss(model, Hyperparameters(), image_size=64)
        several = world.world_size > 1
        step, no_sync = wrapped(ForwardAndLoss(model, loss, world), TrainConfig())
        for index, boxes in enumerate(batches):
            images, targets = share(boxes, world.rank) if several else whole(boxes)
            with nullcontext() if index == len(batches) - 1 else no_sync():
                step(images, targets)[0].backward()
        result[f"{head}: {name}"] = {
            key: parameter.grad for key, parameter in model.named_parameters()
        }
    if world.is_main:
        torch.save(result, out)
    distributed.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:])
    # gloo's thread needs the interpreter once more to free the last all-reduce, and aborts when the
    # interpreter ends at that moment.  A run continues for seconds after its last step; this
    # process has nothing left to do, so it ends without taking the interpreter down first.
    sys.stderr.flush()
    os._exit(0)

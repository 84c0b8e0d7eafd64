"""YOLOv5's CSPDarknet: parameters up to P5 as published; the rows of the shipped detectors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.builder import build_classifier
from models.profile.cost import count, parameters
from models.yaml.parser import load_classifier, load_spec

# rows 0-9 of YOLOv5 v6 and v7: parameters, MACs at 224 px
PUBLISHED = {
    "n": (1_046_368, 169_394_176),
    "s": (4_171_456, 634_224_640),
    "m": (12_167_904, 1_900_265_472),
    "l": (26_582_912, 4_248_502_272),
    "x": (49_275_040, 8_016_117_760),
}


def backbone_parameters(net: nn.Module) -> int:
    return sum(
        parameters(layer)
        for layer, row in zip(net.layers, net.spec.layers, strict=True)
        if row.section == "backbone"
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_equals_the_reference_counts(size: str) -> None:
    with torch.device("meta"):
        net = build_classifier(load_classifier(f"csp-{size}"))
    params, macs = PUBLISHED[size]
    classifier = net.layers[-1].linear
    assert backbone_parameters(net) == params
    assert parameters(net) == params + parameters(classifier)
    assert count(net, (1, 3, 224, 224)).macs == macs + classifier.weight.numel()


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize(
    ("backbone", "detector"), [("csp", "yolov5{}"), ("bottleneckcsp", "yolov5{}-csp")]
)
def test_rows_are_those_of_the_reference_detectors(backbone: str, detector: str, size: str) -> None:
    """The detectors' own rows are proved by their published parameters (tests/test_configs.py)."""
    alone = load_classifier(f"{backbone}-{size}").layers
    whole = load_spec(detector.format(size)).layers
    rows = [
        [(row.block, row.repeats, row.sources, dict(row.args)) for row in layers
         if row.section == "backbone"]
        for layers in (alone, whole)
    ]  # fmt: skip
    assert rows[0] == rows[1]
    assert [row.name for row in alone if row.name] == ["stem", "P2", "P3", "P4", "P5"]
    assert all(row.norm is None and row.activation is None for row in alone)

"""The worked example of docs/adding-a-block.md works as written."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from models import registry
from models.builder import build_detector
from models.parser import parse_spec


def code(root: Path, language: str) -> str:
    text = (root / "docs" / "adding-a-block.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0]


@pytest.fixture
def example(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "BLOCKS", dict(registry.BLOCKS))
    module = types.ModuleType("separable_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code(root, "python"), "adding-a-block.md", "exec"), module.__dict__)
    return module.SeparableStage


def test_the_example_has_its_formula_and_takes_c3s_place(root: Path, example: type) -> None:
    for c_in, c, n in ((16, 16, 1), (16, 24, 3)):
        block = example(c_in, c, n)
        expected = (c_in != c) * (c_in + 2) * c + n * (c * c + 13 * c)
        assert sum(p.numel() for p in block.parameters()) == expected
        assert block(torch.randn(1, c_in, 5, 7)).shape == (1, c, 5, 7)
    model = build_detector(parse_spec(yaml.safe_load(code(root, "yaml")), "docs"), classes=3)
    assert model.stride == (8, 16, 32)
    assert [layer.block for layer in model.spec.layers].count("SeparableStage") == 8

"""The worked example of docs/adding-a-block.md and the code of docs/metrics.md work as written."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.checkpoint import model_payload, save_checkpoint
from models import registry
from models.builder import build_detector
from models.yaml.parser import load_spec, parse_spec


def code(root: Path, language: str, page: str = "adding-a-block.md") -> str:
    text = (root / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)[0]


@pytest.fixture
def example(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "BLOCKS", dict(registry.BLOCKS))
    monkeypatch.setattr(registry, "ROWS", ChainMap(registry.BLOCKS, registry.HEADS))
    module = types.ModuleType("separable_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code(root, "python"), "adding-a-block.md", "exec"), module.__dict__)
    return module.SeparableStage


def test_the_example_passes_mypy_as_strict_as_the_source(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "separable.py"
    path.write_text(code(root, "python"))
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_has_its_formula_and_takes_c3s_place(root: Path, example: type) -> None:
    for c_in, c, n in ((16, 16, 1), (16, 24, 3)):
        block = example(c_in, c, n)
        expected = (c_in != c) * (c_in + 2) * c + n * (c * c + 13 * c)
        assert sum(p.numel() for p in block.parameters()) == expected
        assert block(torch.randn(1, c_in, 5, 7)).shape == (1, c, 5, 7)
    model = build_detector(parse_spec(yaml.safe_load(code(root, "yaml")), "docs"), classes=3)
    assert model.stride == (8, 16, 32)
    assert [layer.block for layer in model.spec.layers].count("SeparableStage") == 8


def test_metrics_from_python(
    root: Path,
    rectangles: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / "best.pt"
    model = build_detector(load_spec(str(tiny_model)), classes=3, names=["a", "b", "c"])
    save_checkpoint(weights, model_payload(model))
    text = code(root, "python", "metrics.md")
    for written, here in (
        ("runs/train/exp/weights/best.pt", str(weights)),
        ('"shapes"', repr(str(rectangles))),
        ("image_size=640", "image_size=64"),
    ):
        assert text.count(written) == 1
        text = text.replace(written, here)
    found: dict[str, Any] = {}
    exec(compile(text, "metrics.md", "exec"), found)
    assert (found["metrics"].images, found["metrics"].instances) == (5, 4)
    assert found["metrics"].table() in capsys.readouterr().out

"""benchmarks.detect prints a line for each runtime."""

from __future__ import annotations

import re

from benchmarks.detect import main
from engine.checkpoint import model_payload, save_checkpoint
from models.builder import build_detector
from models.yaml.parser import load_spec


def test_bare_and_end_to_end(tiny_model, rectangles, tmp_path, capsys):
    save_checkpoint(
        tmp_path / "tiny.pt", model_payload(build_detector(load_spec(str(tiny_model)), classes=3))
    )
    flags = ["--weights", str(tmp_path / "tiny.pt"), "--source", str(rectangles.parent / "val")]
    main([*flags, "--img", "64", "--runtimes", "torch", "--repeats", "1", "--batch", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"torch +bare +[\d.]+ +end to end +[\d.]+ +ratio [\d.]+", lines[-1])

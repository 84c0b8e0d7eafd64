"""benchmarks.layouts times every form of a model."""

from __future__ import annotations

import pytest

from benchmarks.layouts import main


def test_a_line_for_each_size_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cfg", "yolov5n-mixconv", "--img", "64", "--batches", "1", "2", "--rounds", "1"]
    assert main(options) == main([*options, "--train"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "px" in line]
    assert [line.count(" in parts ") for line in lines] == [2, 2, 0, 0]
    assert all(" NCHW " in line and " channels last " in line for line in lines)

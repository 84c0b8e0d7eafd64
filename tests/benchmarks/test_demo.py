"""The last step of the demo: what it prints, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import MIN_MAP50, main, report
from utils.errors import FeatherDetError, UserError

FILES = (
    "train/weights/best.pt",
    "train/results.png",
    "val/PR_curve.png",
    "images/0005.jpg",
    "images/0015.jpg",
    "video/shapes.mp4",
)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def reach(folder: Path, map50: float) -> None:
    (folder / "val" / "metrics.json").write_text(json.dumps({"map50": map50, "map": 0.25}))


@pytest.mark.parametrize("map50", [MIN_MAP50, 0.625])
def test_report_names_files_and_metrics(finished: Path, map50: float, capsys) -> None:
    reach(finished, map50)
    main([str(finished)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"weights   {finished}/train/weights/best.pt"
    assert lines[3] == f"images    {finished}/images/*.jpg (2)"
    assert lines[5] == f"mAP50     {map50:.3f}   mAP50-95 0.250   ({finished}/val/metrics.json)"


@pytest.mark.parametrize("map50", [MIN_MAP50 - 0.001, float("nan")])
def test_low_map_fails(finished: Path, map50: float) -> None:
    reach(finished, map50)
    with pytest.raises(FeatherDetError, match=r"the demo failed: .* under 0\.5") as caught:
        report(finished)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("name", FILES[:3])
def test_missing_part_is_named(finished: Path, name: str) -> None:
    (finished / name).unlink()
    with pytest.raises(UserError, match=name):
        report(finished)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"map50": null, "map": 1}'])
def test_unreadable_metrics_are_named(finished: Path, text: str) -> None:
    (finished / "val" / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json: not the metrics of val\.py"):
        report(finished)

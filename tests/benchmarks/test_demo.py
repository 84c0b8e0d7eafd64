"""The demo's verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.demo import FLOOR, main, report
from utils.errors import FeatherDetError, UserError

FILES = (
    "train/weights/best.pt",
    "train/results.png",
    "val/PR_curve.png",
    "pictures/0005.jpg",
    "pictures/0015.jpg",
    "video/shapes.mp4",
)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def reached(folder: Path, map50: float) -> None:
    (folder / "val" / "metrics.json").write_text(json.dumps({"map50": map50, "map": 0.25}))


def test_report_names_places_and_figures(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reached(finished, 0.625)
    assert main([str(finished)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"weights   {finished}/train/weights/best.pt"
    assert lines[3] == f"pictures  {finished}/pictures/*.jpg (2)"
    assert lines[5] == f"mAP50     0.625   mAP50-95 0.250   ({finished}/val/metrics.json)"


@pytest.mark.parametrize("map50", [FLOOR - 0.001, float("nan")])
def test_low_score_fails(finished: Path, map50: float) -> None:
    reached(finished, map50)
    with pytest.raises(FeatherDetError, match=r"under 0\.5: the demo failed") as caught:
        report(finished)
    assert caught.value.exit_code == 1


def test_floor_itself_passes(finished: Path) -> None:
    reached(finished, FLOOR)
    assert "mAP50     0.500" in report(finished)


@pytest.mark.parametrize("name", FILES[:3])
def test_missing_part_is_named(finished: Path, name: str) -> None:
    reached(finished, 0.9)
    (finished / name).unlink()
    with pytest.raises(UserError, match=name):
        report(finished)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"map50": null, "map": 1}'])
def test_unreadable_figures_are_named(finished: Path, text: str) -> None:
    (finished / "val" / "metrics.json").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.json: not the figures of val\.py"):
        report(finished)

from __future__ import annotations

import pytest

pytest.importorskip("pycocotools")

from benchmarks import coco_engines


def test_the_engines_agree_and_are_timed(capsys):
    coco_engines.main(["--images", "6", "--classes", "2", "--detections", "12"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][0] == "featherdet"
    assert rows[-1][0] == "pycocotools"
    assert len({row[4] for row in rows}) == 1  # AP
    assert float(rows[0][4]) > 0
    assert all(float(row[-1]) < 1e-9 for row in rows)

import cv2
import numpy as np

from benchmarks.scan import main


def test_scans_are_timed_and_measured(tmp_path, capsys):
    for name in ("a", "b"):
        for folder in ("images", "labels"):
            (tmp_path / folder / "x").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "images" / "x" / f"{name}.jpg"), np.zeros((48, 64, 3), np.uint8))
    (tmp_path / "labels" / "x" / "a.txt").write_text("79 .5 .5 .1 .1\n")
    assert main(["--images", str(tmp_path / "images"), "--number", "50"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:3] for row in rows[1:]] == [
        ["FeatherDet,", "first", "50"],
        ["FeatherDet,", "cached", "50"],
    ]
    assert all(float(row[3]) > 0 and float(row[5]) > 20 and float(row[6]) < 20 for row in rows[1:])

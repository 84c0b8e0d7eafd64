"""The script for whoever has a GPU, on a CPU and in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import gpu, gpu_rows
from data.index.dataset import load_dataset_config, load_split
from utils.errors import UserError

PEER = """
import json
print("its own message")
for epoch in (1, 2):
    print("row " + json.dumps({"model": "yolov5n", "what": f"epoch {epoch}", "images/s": 0.5}))
raise SystemExit("it ends badly")
"""


def report(folder: Path) -> dict[str, dict]:
    content = json.loads((folder / "gpu.json").read_text())
    return {section["name"]: section for section in content["sections"]}


def test_the_whole_script_runs_on_a_cpu(rectangles, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "PEER", PEER)
    words = [str(tmp_path), "--images", str(rectangles), "--device", "cpu", "--quick"]
    gpu.main([*words, "--peer", sys.executable, "--seconds", "1000"])
    found = report(tmp_path)
    assert list(found) == list(gpu.QUICK)
    what = ["bare", "step", *gpu_rows.WAYS]
    model, few = found["yolov5n"]["rows"], found["yolov5n-cores"]["rows"]
    assert [row["what"] for row in model] == what
    assert [row["what"] for row in few] == what[2:]
    assert not [row["cause"] for row in [*model, *few] if "cause" in row]
    for row in [*model[1:], *few]:
        assert row["of bare"] == pytest.approx(row["images/s"] / model[0]["images/s"])
    for row in few:
        assert row["between epochs s"] > 0
        assert 0 < row["waiting"] < 1
        assert min(row["before ms"], row["network ms"], row["after ms"]) > 0
    peer = found["peer"]
    assert [row["what"] for row in peer["rows"]] == ["epoch 1", "epoch 2"]
    assert peer["cause"] == "exit code 1: it ends badly"
    checks = {row["check"]: row["result"] for row in found["check"]["rows"]}
    assert checks == dict.fromkeys(("DDP", "resume", "--batch-size -1"), "passed")
    latency = [(row["type"], row["batch"]) for row in found["latency"]["rows"]]
    assert latency == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    assert all(row["ms/image"] > 0 for row in found["latency"]["rows"])
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| yolov5n |") == 5 + 3 + 2 + 4
    assert "yolov5n, 2 cores" in capsys.readouterr().out


def test_what_fails_or_takes_too_long_is_in_the_report(rectangles, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        gpu, "PEER", "import time; print('row {\"what\": 1}', flush=True); time.sleep(60)"
    )
    words = [str(tmp_path), "--images", str(rectangles), "--device", "cpu", "--quick"]
    gpu.main([*words, "--sections", "peer", "--peer", sys.executable, "--seconds", "2"])
    found = report(tmp_path)["peer"]
    assert found["cause"] == "stopped after 2 s"
    assert found["seconds"] < 30
    gpu.main([*words, "--sections", "check", "peer", "--seconds", "0"])
    found = report(tmp_path)
    assert found["check"]["cause"] == "left out: the 0 s are over (--seconds)"
    assert found["peer"]["cause"] == "no --peer"


def test_a_row_that_fails_has_its_cause_and_the_others_run(monkeypatch, capsys) -> None:
    def broken(config: object) -> gpu_rows.Row:
        raise RuntimeError("out of something\nand more")

    monkeypatch.setattr(gpu_rows, "distributed_step", broken)
    monkeypatch.setattr(gpu_rows, "resumed", lambda config: {"result": "passed"})
    monkeypatch.setattr(gpu_rows, "fitting_batch", lambda config: {"result": "passed"})
    gpu_rows.main(["--section", "check", "--data", "any", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line.removeprefix("row ")) for line in lines if line.startswith("row ")]
    assert rows[0] == {"check": "DDP", "cause": "RuntimeError: out of something"}
    assert [row.get("result") for row in rows] == [None, "passed", "passed"]


def test_cocos_folders_and_copies(rectangles, tmp_path) -> None:
    """The smaller of the splits that have images; an eighth of them to validate with."""
    coco, target = tmp_path / "coco", tmp_path / "copies"
    (coco / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (coco / f"{split}2017").symlink_to(rectangles.parent / split)
        name = f"instances_{split}2017.json"
        (coco / "annotations" / name).write_bytes(
            (rectangles.parent / f"{split}.json").read_bytes()
        )
    target.mkdir()
    config = gpu.GpuConfig(out="", images=str(coco), quick=True)
    dataset = load_dataset_config(str(gpu.data_of(config, target)))
    assert [len(load_split(dataset, split)) for split in ("train", "val")] == [8, 1]
    content = yaml.safe_load((target / "coco.yaml").read_text())
    assert content["train"]["images"] == str(coco / "val2017")
    (coco / "val2017").unlink()
    (coco / "train2017").unlink()
    with pytest.raises(UserError, match=r"no annotations/instances_SPLIT\.json"):
        gpu.coco_yaml(coco, target / "none.yaml")

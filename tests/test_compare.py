"""compare.py from the command line: whole comparisons of very small models."""

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import compare
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.compare import comparison, setup
from engine.compare import runs as compare_runs
from engine.compare.config import CompareConfig
from engine.compare.plan import model_entries, run_flags, state_of
from engine.compare.record import records_in
from engine.measure.latency import Latency
from engine.measure.roofline import PEAK_SIZES, PeakSizes
from engine.train.config import TrainConfig
from engine.train.loop import fit
from utils.config import parse
from utils.errors import PartlyDoneError, TerminatedError, UserError
from utils.hyp import load_hyp

QUICK = ["--device", "cpu", "--latency-batches", "1", "--latency-seconds", "0.05"]
TRAINING = ["--seeds", "0", "1", "--epochs", "1", "--hyp", "default", "--optimizer", "SGD"]
COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2], dirs_exist_ok=True)"
COMPLAIN = "import sys; print('error: GPU memory ran out'); print('noise'); sys.exit(2)"
DIE = "import os; os.kill(os.getpid(), 9)"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Own caches; neither the peak of the device nor plots are what is tested here."""
    small = PeakSizes(side=32, pixels=4, copy_bytes=1 << 16, repeats=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setitem(PEAK_SIZES, "cpu", small)
        patch.setattr(comparison, "write_plots", lambda results, folder: [])
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_model):
    wide = tmp_path_factory.mktemp("wide") / "wide.yaml"
    wide.write_text("width_multiple: 2\n" + tiny_model.read_text())
    return [str(tiny_model), str(wide)]


@pytest.fixture(scope="module")
def data(rectangles):
    return ["--data", str(rectangles), "--img", "64", "--batch", "4", "--workers", "0"]


@pytest.fixture
def common(data, tmp_path):
    """Data, size and how to measure, under tmp_path/runs."""
    return [*data, *QUICK, "--project", str(tmp_path / "runs")]


@pytest.fixture
def flags(common, models):
    """Two models, two seeds, one epoch."""
    return [*common, *TRAINING, "--cfg", *models]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data, models):
    """The folders of finished runs of the two models, of one epoch, by name."""
    project = tmp_path_factory.mktemp("trained")
    words = [*data, "--epochs", "1", "--patience", "0", "--device", "cpu", "--noplots"]
    words += ["--cache", "none", "--hyp", "default"]
    for model, name in zip(models, ("tiny", "wide"), strict=True):
        named = ["--cfg", model, "--project", str(project), "--name", name]
        fit(parse(TrainConfig, [*words, *named], prog="train.py", description=""))
    return {name: project / name for name in ("tiny", "wide")}


class Fake:
    """Runs that copy a finished run instead of training; .scripts does something else by title."""

    def __init__(self, finished):
        self.finished, self.titles, self.scripts, self.sources = finished, [], {}, {}

    def command(self, plan, run, device):
        self.titles.append(run.title)
        script = self.scripts.get(run.title, COPY)
        source = self.sources.get(run.title, self.finished[run.entry.name])
        return [sys.executable, "-S", "-c", script, str(source), str(plan.run_folder(run))]

    def change(self, title, folder, **changes):
        """Let the run's best.pt say something else."""
        name = title.split()[0]
        self.sources[title] = shutil.copytree(self.finished[name], folder / title)
        best = self.sources[title] / "weights" / "best.pt"
        saved = load_checkpoint(best)
        save_checkpoint(best, saved | {key: saved[key] | new for key, new in changes.items()})


@pytest.fixture
def fake(monkeypatch, trained):
    made = Fake(trained)
    monkeypatch.setattr(compare_runs, "training_command", made.command)
    return made


@pytest.fixture(scope="module")
def original(tmp_path_factory, data, models, trained):
    """The folder of a finished comparison."""
    project = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_runs, "training_command", Fake(trained).command)
        words = [*data, *QUICK, *TRAINING, "--cfg", *models]
        compare.main([*words, "--project", str(project)])
    return project / "exp"


@pytest.fixture
def finished(original, tmp_path):
    """A copy of it, where `flags` continue."""
    return shutil.copytree(original, tmp_path / "runs" / "exp")


def of_records(finished, tmp_path, *more):
    """The command line of a table of the records alone."""
    words = ["--records", str(finished / "records"), "--project", str(tmp_path / "alone")]
    return [*words, *QUICK, *more]


def change(folder, name, edit):
    """Edit the JSON of a record; its file."""
    path = sorted((folder / "records").glob(f"{name}.json"))[0]
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def results_in(folder):
    return json.loads((folder / "results.json").read_text())


def accuracy(results):
    return {row["name"]: row["accuracy"]["AP"]["values"] for row in results["rows"]}


def test_a_table_of_records_that_is_made_again_without_training(flags, fake, tmp_path, capsys):
    folder = tmp_path / "runs" / "exp"
    assert compare.main([*flags, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 2 models" in out
    assert out.count(": to do;") == 4
    assert "44,552 parameters, 0.006 GFLOPs at 64 px" in out
    assert out.count("python train.py --") == 4
    assert not folder.parent.exists()
    assert compare.main(flags) == 0
    assert fake.titles == ["tiny seed 0", "wide seed 0", "tiny seed 1", "wide seed 1"]
    files = {path.name for path in folder.iterdir()}
    assert {"results.json", "table.csv", "table.md", "report.html", "protocol.json"} <= files
    results = results_in(folder)
    tiny, wide = results["rows"]
    assert (tiny["name"], wide["name"], results["baseline"]) == ("tiny", "wide", "tiny")
    assert tiny["difference"] is None
    assert wide["difference"]["AP"]["seeds"] == [0, 1]
    assert wide["cost"]["params"] > tiny["cost"]["params"]
    records = {item.path.name: item for item in records_in(folder / "records")}
    for row in results["rows"]:
        assert row["status"] == "done"
        for run, value in zip(row["runs"], row["accuracy"]["AP"]["values"], strict=True):
            record = records[run["record"]]
            assert record.metrics["coco"]["AP"] == value == run["accuracy"]["AP"]
            assert (record.name, record.seed) == (row["name"], run["seed"])
            assert run["curves"]["epoch"] == [0.0]
            assert f"--seed {run['seed']}" in run["command"]
    assert results["protocol"] == json.loads((folder / "protocol.json").read_text())["protocol"]
    assert not list((folder / "records").rglob("*.pt"))
    assert f"{tiny['accuracy']['AP50']['mean']:.3f}" in (folder / "table.md").read_text()
    with (folder / "table.csv").open() as file:
        aps = [float(line["AP"]) for line in csv.DictReader(file)]
    assert aps == [row["accuracy"]["AP"]["mean"] for row in (tiny, wide)]
    fake.titles.clear()
    capsys.readouterr()
    assert compare.main(flags) == 0  # again: the same folder, nothing to train
    assert fake.titles == []
    assert "4 of 4 runs are done already" in capsys.readouterr().out
    assert accuracy(results_in(folder)) == accuracy(results)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["exp"]


def test_one_failing_model_does_not_end_the_rest(flags, fake, tmp_path, capsys, monkeypatch):
    fake.scripts = {"wide seed 0": COMPLAIN, "wide seed 1": DIE}
    with pytest.raises(PartlyDoneError, match=r"1 of 2 models failed.*wide") as partly:
        compare.main(flags)
    assert partly.value.exit_code == 3
    folder = tmp_path / "runs" / "exp"
    tiny, wide = results_in(folder)["rows"]
    assert (tiny["status"], wide["status"]) == ("done", "failed")
    assert "seed 0: GPU memory ran out; seed 1: the run was ended by SIGKILL" in wide["cause"]
    assert wide["cost"]["params"] > 0
    assert wide["latency"][0]["p50_ms"] > 0
    assert "GPU memory ran out" in (folder / "table.md").read_text()
    assert "wide seed 0 failed: GPU memory ran out" in capsys.readouterr().err
    fake.titles.clear()
    fake.scripts = {"wide seed 0": "import sys; print('a line'); sys.exit(2)"}
    with pytest.raises(PartlyDoneError):
        compare.main(flags)
    assert fake.titles == ["wide seed 0", "wide seed 1"]  # the failed ones again, and only they
    wide = results_in(folder)["rows"][1]
    assert wide["cause"] == "seed 0: a line"  # not the error that its log has of the first start
    assert (wide["status"], wide["seeds"]) == ("partly", [1])
    assert wide["difference"]["AP"]["seeds"] == [1]

    def broken(*_):
        raise ZeroDivisionError("division by zero")

    fake.scripts = {}
    monkeypatch.setattr(compare_runs, "evaluate_run", broken)
    with pytest.raises(PartlyDoneError):  # a fault of the program is this run's alone, too
        compare.main(flags)
    assert results_in(folder)["rows"][1]["cause"] == "seed 0: ZeroDivisionError: division by zero"


def test_a_folder_of_records_is_a_starting_point(flags, fake, finished, tmp_path, capsys):
    records = shutil.copytree(finished / "records", tmp_path / "kept")
    moved = ["--project", str(tmp_path / "other"), "--records", str(records)]
    compare.main([*flags, *moved, "--seeds", "0", "1", "2"])
    assert fake.titles == ["tiny seed 2", "wide seed 2"]
    again = accuracy(results_in(tmp_path / "other" / "exp"))
    assert {name: aps[:2] for name, aps in again.items()} == accuracy(results_in(finished))
    capsys.readouterr()
    compare.main([*flags, *moved, "--epochs", "2", "--dry-run"])
    shown = capsys.readouterr()
    assert "not used, another protocol: training.epochs: 1 and 2" in shown.err
    assert "done;" not in shown.out


def test_a_table_of_records_alone(fake, finished, tmp_path):
    words = of_records(finished, tmp_path, "--baseline", "wide")
    compare.main(words)
    assert fake.titles == []
    first, alone = results_in(finished), results_in(tmp_path / "alone" / "exp")
    assert accuracy(alone) == accuracy(first)
    assert alone["protocol"] == first["protocol"]
    forth = first["rows"][1]["difference"]["AP"]
    back = next(row for row in alone["rows"] if row["name"] == "tiny")["difference"]["AP"]
    assert (back["low"], back["high"]) == pytest.approx((-forth["high"], -forth["low"]))
    change(finished, "*wide-seed1*", lambda record: record["protocol"]["training"].update(epochs=7))
    with pytest.raises(UserError, match=r"one table.*training.epochs: 1 and 7"):
        compare.main(words)
    with pytest.raises(UserError, match="no record"):
        compare.main(["--records", str(tmp_path)])


def test_a_split_that_chose_nothing_can_be_evaluated(flags, common, fake, rectangles, tmp_path):
    """best.pt is chosen on val; the table is made on test."""
    data = tmp_path / "with_test.yaml"
    test = "test: {images: train, annotations: train.json}\n"
    data.write_text(f"path: {rectangles.parent}\n{rectangles.read_text()}{test}")
    words = ["--data", str(data), "--seeds", "0", "--split", "test"]
    assert compare.main([*flags, *words]) == 0
    folder = tmp_path / "runs" / "exp"
    protocol = json.loads((folder / "protocol.json").read_text())["protocol"]
    assert (protocol["split"], protocol["data"]["test_images"]) == ("test", 10)
    assert protocol["data"]["val_images"] == 5
    assert ", 10 test images, 64 px" in (folder / "table.md").read_text()
    (record,) = (item for item in records_in(folder / "records") if item.name == "tiny")
    assert (record.images, record.metrics["images"]) == (10, 10)
    assert record.fingerprint == protocol["data"]["test"]
    compare.main(of_records(folder, tmp_path))
    assert accuracy(results_in(tmp_path / "alone" / "exp")) == accuracy(results_in(folder))
    with pytest.raises(UserError, match="split: test and val"):
        compare.main([*flags, *words, "--split", "val", "--exist-ok"])
    weights = ["--weights", str(fake.finished["tiny"] / "weights" / "best.pt"), "--name", "weights"]
    compare.main([*common, *weights, *words])
    (row,) = results_in(tmp_path / "runs" / "weights")["rows"]
    assert "--task test" in row["runs"][0]["command"]
    assert row["accuracy"]["AP"]["values"][0] == record.accuracy["AP"]


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(trained, monkeypatch):
    """The run must not begin again because compare.py was stopped at that moment."""

    def stopped(*args, **more):
        raise TerminatedError

    assert state_of(trained["tiny"]).startswith("trained")
    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(TerminatedError):
        state_of(trained["tiny"])


def test_profile_only_needs_no_data(common, models, tmp_path, monkeypatch, capsys):
    words = [*common, "--cfg", *models, "--profile-only", "--classes", "3"]
    words += ["--data", "there is none", "--latency-batches", "1", "2"]
    assert compare.main(words) == 0
    results = results_in(tmp_path / "runs" / "exp")
    tiny, wide = results["rows"]
    assert (tiny["status"], wide["status"]) == ("profiled", "profiled")
    assert (tiny["cost"]["classes"], wide["cost"]["classes"]) == (3, 3)
    assert [at["batch"] for at in tiny["latency"]] == [1, 2]
    assert tiny["blocks"]
    assert tiny["accuracy"] is None
    assert results["protocol"]["kind"] == "profile"
    assert results["protocol"]["latency"] == {"dtype": "fp32", "graph": False}
    assert compare.main([*words, "--latency-dtype", "bf16", "--latency-batches", "1"]) == 0
    second = results_in(tmp_path / "runs" / "exp2")  # of another type: another table
    assert second["measurement"]["settings"]["dtype"] == "bf16"
    assert "bf16, eager, models in turn" in (tmp_path / "runs/exp2/table.md").read_text()
    measure = comparison.measure

    def out_of_memory(*args, **more):
        measurement, (row, other) = measure(*args, **more)
        latency = [row.latency[0], Latency(2, "no memory")]
        return measurement, [replace(row, latency=latency), other]

    monkeypatch.setattr(comparison, "measure", out_of_memory)
    with pytest.raises(PartlyDoneError, match="1 latencies could not be measured") as caught:
        compare.main(words)
    assert caught.value.exit_code == 3
    assert "tiny: latency at batch 2 in torch: no memory" in capsys.readouterr().err.splitlines()


def test_both_heads_of_a_model_are_rows(common, models, tmp_path):
    words = [*common, "--cfg", models[0], "--head", "anchor", "free"]
    assert compare.main([*words, "--profile-only", "--classes", "3"]) == 0
    anchor, free = results_in(tmp_path / "runs" / "exp")["rows"]
    assert [row["name"] for row in (anchor, free)] == ["tiny + anchor", "tiny + free"]
    assert [row["model"]["head"] for row in (anchor, free)] == ["anchor", "free"]
    assert anchor["cost"]["backbone"] == free["cost"]["backbone"]
    assert anchor["cost"]["head"] != free["cost"]["head"]
    config = parse(CompareConfig, words, prog="compare.py", description="")
    entries = model_entries(config, classes=3)
    assert run_flags(config, entries[1], 0, {})[2:4] == ["--head", "free"]


def test_checkpoints_are_evaluated_into_the_same_table(trained, common, tmp_path):
    first, copy = trained["tiny"] / "weights" / "best.pt", tmp_path / "second/weights/best.pt"
    copy.parent.mkdir(parents=True)
    shutil.copy(first, copy)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(b"nothing")
    words = ["--weights", str(first), str(copy), str(damaged), *common]
    with pytest.raises(UserError, match=r"tiny and second are the same model"):
        compare.main(words)
    save_checkpoint(copy, {**load_checkpoint(copy), "metrics": {}})
    with pytest.raises(PartlyDoneError, match="damaged"):
        compare.main(words)
    rows = results_in(tmp_path / "runs" / "exp")["rows"]
    assert [row["name"] for row in rows] == ["tiny", "second", "damaged"]
    assert [row["status"] for row in rows] == ["done", "done", "failed"]
    assert rows[0]["accuracy"]["AP"] == rows[1]["accuracy"]["AP"]
    assert rows[1]["difference"]["AP"]["delta"] == 0
    assert "not a checkpoint" in rows[2]["cause"]
    assert rows[0]["training"] is None
    assert rows[0]["runs"][0]["command"].startswith("python val.py --weights")


def test_a_record_is_of_what_was_trained(flags, fake, tmp_path):
    """Edited while the comparison ran: the model's file, hyper-parameters, settings, packages."""
    fake.sources["tiny seed 0"] = fake.finished["wide"]
    fake.change("wide seed 0", tmp_path, hyp={"lr0": 0.5})
    fake.change("tiny seed 1", tmp_path, config={"epochs": 9})
    fake.change("wide seed 1", tmp_path, environment={"torch": "1.0"})
    with pytest.raises(PartlyDoneError, match="2 of 2 models failed"):
        compare.main(flags)
    tiny, wide = results_in(tmp_path / "runs" / "exp")["rows"]
    assert "it has another model" in tiny["runs"][0]["cause"]
    assert "training.epochs: 1 and 9" in tiny["runs"][1]["cause"]
    assert "training.hyp.lr0: 0.01 and 0.5" in wide["runs"][0]["cause"]
    assert "versions.torch" in wide["runs"][1]["cause"]
    assert not list((tmp_path / "runs").rglob("records/*.json"))


def test_runs_of_a_recipe_without_min_updates_are_accepted(flags, fake, tmp_path):
    """Its protocol leaves the key out, as older records do; the checkpoint has it."""
    hyp = asdict(load_hyp("small"))
    assert hyp["min_updates"] == 0
    for name in fake.finished:
        fake.change(f"{name} seed 0", tmp_path, hyp=hyp)
    assert compare.main([*flags, "--hyp", "small", "--seeds", "0"]) == 0


def test_environment_and_settings_are_the_run_s_own(flags, fake, tmp_path):
    fake.change("tiny seed 0", tmp_path, environment={"commit": "0" * 40})
    fake.change("wide seed 1", tmp_path, config={"label_smoothing": 0.1})
    with pytest.raises(PartlyDoneError, match="wide"):
        compare.main(flags)
    folder = tmp_path / "runs" / "exp"
    tiny, wide = results_in(folder)["rows"]
    assert tiny["runs"][0]["environment"]["commit"] == "0" * 40
    assert "trained by different settings" in wide["runs"][1]["cause"]
    assert "label_smoothing: 0.0 and 0.1" in wide["runs"][1]["cause"]
    record = next(item for item in records_in(folder / "records") if item.name == "tiny")
    assert (record.training["epochs"], record.training["cos_lr"]) == (1, False)
    assert not {"project", "name", "device", "data", "seed", "resume"} & set(record.training)
    assert str(tmp_path) not in json.dumps(record.training)
    change(folder, "*tiny-seed1*", lambda record: record["training"].update(cos_lr=True))
    with pytest.raises(UserError, match=r"different settings.*cos_lr"):
        compare.main(flags)
    change(folder, "*tiny-seed1*", lambda record: record["training"].clear())  # an older record
    change(folder, "*wide-seed0*", lambda record: record["training"].pop("cos_lr"))
    fake.sources = {}
    shutil.rmtree(next((folder / "runs").glob("*wide-seed1*")))
    assert compare.main(flags) == 0
    change(folder, "*tiny-seed0*", lambda record: record["protocol"].update(image_size=96))
    with pytest.raises(UserError, match=r"this comparison and .* image_size: 64 and 96"):
        compare.main(flags)


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "other images"])
def test_damaged_detections_are_made_again(flags, finished, tmp_path, capsys, damage):
    first = results_in(finished)
    path = next((finished / "records").glob("*tiny-seed0*.npz"))
    intact = path.read_bytes()
    third = len(intact) // 3
    if damage == "other images":
        with np.load(path) as file:
            np.savez(path, **{**file, "image": np.full_like(file["image"], 5)})
    else:
        zeros = intact[:third] + b"\0" * 9 + intact[third + 9 :]
        path.write_bytes({"empty": b"", "cut": b"PK\x03\x04 cut", "zeros": zeros}[damage])
    with pytest.raises(UserError, match=rf"{path.name}: (not |boxes beyond the 5 images)"):
        compare.main(of_records(finished, tmp_path))
    capsys.readouterr()
    assert compare.main(flags) == 0
    assert "counts as not done" in capsys.readouterr().err
    assert path.read_bytes() == intact
    assert accuracy(results_in(finished)) == accuracy(first)


@pytest.mark.parametrize(
    ("row", "edit", "cause"),
    [
        (0, {"block": "NoBlock"}, "its model: .*NoBlock"),
        (1, {"sources": []}, "its model: .*reads one row, got 0"),
        (0, {"norm": []}, "its ('spec' is of another model|model: )"),
        (-1, {"block": "Conv", "args": {"c_out": 8}}, "its model: .*reads one row"),
        (-1, {"sources": [3, 4]}, "its model: .*RuntimeError: shape"),
        (1, {"args": {"c_out": 24, "kernel": 3, "stride": 2}}, "its 'spec' is of another model"),
    ],
)
def test_a_record_whose_model_is_not_what_was_trained_is_named(
    finished, tmp_path, row, edit, cause
):
    path = change(finished, "*", lambda record: record["spec"]["layers"][row].update(edit))
    with pytest.raises(UserError, match=rf"{path.name}: {cause}"):
        compare.main(of_records(finished, tmp_path))


def test_one_record_twice_is_refused(flags, finished, tmp_path):
    path = next((finished / "records").glob("*tiny-seed0*.json"))
    for suffix in (".json", ".npz"):
        shutil.copy(path.with_suffix(suffix), path.with_name(f"again{suffix}"))
    for words in (flags, of_records(finished, tmp_path)):
        with pytest.raises(UserError, match=r"two records of one run \(tiny seed 0\)"):
            compare.main(words)


def test_the_table_is_there_before_anything_is_measured(flags, fake, tmp_path, monkeypatch):
    def stopped(*args, **more):
        raise KeyboardInterrupt

    measure, folder = comparison.measure, tmp_path / "runs" / "exp"
    monkeypatch.setattr(comparison, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare.main(flags)
    early = results_in(folder)
    assert [row["status"] for row in early["rows"]] == ["done", "done"]
    assert early["measurement"] is None
    assert early["rows"][0]["cost"]["params"] > 0
    assert (folder / "table.md").is_file()
    monkeypatch.setattr(comparison, "measure", measure)
    compare.main(flags)
    assert results_in(folder)["measurement"]["batches"] == [1]
    monkeypatch.setattr(comparison, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):  # nothing new: the measured table stays
        compare.main(flags)
    assert results_in(folder)["measurement"]["batches"] == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--baseline", "tin"), r"--baseline tin: no such row.*'tiny'"),
        (("--cfg", "yolov5n-gost"), "yolov5n-ghost"),
        (("--data", "shape"), "'shapes'"),
        (("--hyp", "defalt"), "default"),
        (("--records", "nowhere"), "no such folder"),
        (("--device", "7"), "--device 7"),
        (("--runtime", "torch", "openvino"), "openvino needs .* pip install openvino$"),
        (("--latency-graph",), "--latency-graph .*on a CPU leave it out"),
        (("--latency-dtype", "fp16"), "--latency-dtype fp16: .*use bf16 or fp32"),
    ],
)
def test_mistakes_end_it_before_anything_is_written(
    flags, fake, tmp_path, change, message, monkeypatch
):
    there = importlib.util.find_spec
    missing = lambda name: None if name == "openvino" else there(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    if change[0] in {"--cfg", "--hyp", "--records", "--device", "--runtime"}:  # before the data
        monkeypatch.setattr(setup, "load_splits", lambda config: 1 / 0)
    with pytest.raises(UserError, match=message):
        compare.main([*flags, *change])
    assert fake.titles == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("finished")
def test_a_changed_protocol_is_refused(flags):
    changes = ["--img", "96", "--optimizer", "Adam", "--hyp", "no-augmentation"]
    every = r"another protocol.*image_size.*optimizer: SGD and Adam.*training\.hyp\."
    with pytest.raises(UserError, match=every):
        compare.main([*flags, "--exist-ok", *changes])


def test_two_at_a_time(flags, fake, tmp_path, monkeypatch):
    """Each waits until the other is there; they share the threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    meeting = (
        "import os, pathlib, sys, time\n"
        "run = pathlib.Path(sys.argv[2])\n"
        "run.with_suffix('.here').touch()\n"
        "end = time.time() + 20\n"
        "while len(list(run.parent.glob('*.here'))) < 2:\n"
        "    time.sleep(0.05)\n"
        "    assert time.time() < end\n"
        "assert os.environ['OMP_NUM_THREADS'] == '1'\n"
    )
    fake.scripts = dict.fromkeys(("tiny seed 0", "wide seed 0"), meeting + COPY)
    compare.main([*flags, "--seeds", "0", "--jobs", "2"])
    rows = results_in(tmp_path / "runs" / "exp")["rows"]
    assert [row["status"] for row in rows] == ["done", "done"]


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_stopped_and_started_again(common, models, tmp_path, monkeypatch, capsys, number, code):
    """Real processes: the half run is saved when compare.py is stopped, and resumed."""
    # The protocol has the number of threads: in this process it must be what the other one has.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    flags = [*common, "--cfg", models[0], "--seeds", "0", "--epochs", "20"]
    command = [sys.executable, "compare.py", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    exp = tmp_path / "runs" / "exp"
    try:
        deadline = time.monotonic() + 240
        while not list(exp.glob("runs/*/weights/last.pt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        errors = process.communicate(timeout=120)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the run, too, where the test failed
        process.communicate()
    assert process.returncode == code
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert compare.main([*flags, "--dry-run"]) == 0
    assert ": half done, " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, "TQDM_DISABLE": "1"})
        assert compare.main(flags) == 0
    (log,) = (exp / "logs").iterdir()
    assert "continue with: --resume" in log.read_text()
    (table,) = exp.glob("runs/*/results.csv")
    with table.open() as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == list(range(20))
    (row,) = results_in(exp)["rows"]
    assert row["status"] == "done"
    assert row["training"]["epochs"] == 20
    assert row["training"]["images_per_second"]["mean"] > 0
    assert 0 <= row["training"]["wait_share"]["mean"] <= 1

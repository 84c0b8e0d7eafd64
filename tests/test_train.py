"""train.py from the command line."""

import subprocess
import sys

import pytest

import train
from engine.train import setup
from utils.errors import UserError

FLAGS = (
    "--weights --cfg --data --hyp --epochs --batch-size --imgsz --rect --resume --nosave --noval"
    " --noautoanchor --noplots --cache --device --multi-scale --single-cls --optimizer --sync-bn"
    " --workers --project --name --exist-ok --cos-lr --label-smoothing --patience --freeze"
    " --save-period --seed --close-mosaic --img --batch"
)


def command(*flags):
    return subprocess.run(
        [sys.executable, "train.py", *flags], capture_output=True, text=True, check=False
    )


def test_help_names_every_flag_of_the_ecosystem(capsys):
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for flag in FLAGS.split():
        assert f"{flag} " in text or f"{flag}," in text or f"{flag}\n" in text, flag


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epoch", "3"), "--epochs"),
        (("--batch-siz", "3"), "--batch-size"),
        (("--optimizer", "RMSProp"), "SGD"),
        (("--imgsz", "large"), "--imgsz"),
        (("--data", "shape"), "'shapes'"),
        (("--label-smoothing", "1"), "label-smoothing"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_thing(flags, message):
    with pytest.raises(UserError, match=message):
        train.main(list(flags))


def test_a_mistake_ends_with_code_2_and_one_line(tmp_path):
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("lr0: 0.01\nmomentun: 0.9\n")
    done = command("--hyp", str(hyp), "--device", "cpu", "--project", str(tmp_path / "runs"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "hyp.yaml:2" in done.stderr
    assert "'momentum'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--weights yolov5s.pt", "publish yolov5s.pt at https://"),
        ("--weights yolov5s.pt --cfg yolov5n", "publish yolov5s.pt at https://"),
        ("--weights file", "file: not a checkpoint: the file is empty"),
        ("--cfg yolov5n-gost", "did you mean 'yolov5n-ghost'"),
        ("--backbone ghosnet-1.0", "did you mean 'ghostnet-1.0'"),
        ("--backbone-weights a.pth", "--backbone-weights a.pth: no such file"),
        ("--fit gflop=4", "did you mean 'gflops'"),
        ("--hyp defaul", "did you mean 'default'"),
        ("--device 7", "--device 7: "),
        ("--amp fp16", "mixed precision is for CUDA"),
        ("--project file", "file is a file"),
        ("--name ..", "must be a folder inside --project"),
    ],
)
def test_mistakes_are_found_before_any_data_are_read(flags, message, tmp_path, monkeypatch):
    def read(name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(setup, "load_dataset_config", read)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        train.main(["--device", "cpu", *flags.split()])
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_short_run_ends_with_code_0(train_flags, tmp_path):
    done = command(*train_flags, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "mAP50-95" in done.stdout
    assert "box_loss" in done.stderr
    assert (tmp_path / "runs" / "exp" / "weights" / "best.pt").is_file()

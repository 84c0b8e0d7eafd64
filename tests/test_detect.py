"""detect.py from the command line to the files and the exit code."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect
from engine.checkpoint import load_checkpoint, model_payload, save_checkpoint
from engine.predict import console
from engine.predict import run as prediction
from models.builder import build_detector
from models.yaml.parser import load_spec
from tests.data.sources.test_sources import Server, video
from utils.errors import FeatherDetError, UserError

NAMES = ["person", "bus", "traffic light"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random yolov5n weights; at a low threshold they find something everywhere."""
    torch.manual_seed(0)
    model = build_detector(load_spec("yolov5n"), classes=3, names=NAMES)
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    save_checkpoint(path, model_payload(model))
    return path


@pytest.fixture
def call(weights, tmp_path, monkeypatch, capfd):
    """Run detect.main in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        common = ["--weights", str(weights), "--img", "64", "--device", "cpu"]
        common += ["--conf-thres", "0.0001", "--max-det", "3"]
        error = ""
        try:
            code = detect.main([*common, *map(str, arguments)])
        except FeatherDetError as failure:
            code, error = failure.exit_code, f"error: {failure}\n"
        captured = capfd.readouterr()
        return code, captured.out, captured.err + error

    return run


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_images_with_every_file_asked_for(call, tmp_path):
    a, b = picture(tmp_path / "x" / "a.jpg"), picture(tmp_path / "y" / "a.jpg", 1, (64, 32))
    before = a.read_bytes(), b.read_bytes()
    code, out, err = call(
        *("--source", a, b, "--save-txt", "--save-conf", "--save-csv", "--save-crop")
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"image 1/2 {a}: 64x64 ")
    assert lines[1].startswith(f"image 2/2 {b}: 64x32 ")
    assert lines[-2].startswith("Speed: ")
    assert lines[-1] == "Results saved to runs/detect/exp"
    run = tmp_path / "runs" / "detect" / "exp"
    crops = {name for name in files(run) if name.startswith("crops/")}
    assert len(crops) == 6
    names = {"a.jpg", "a_2.jpg", "labels/a.txt", "labels/a_2.txt", "predictions.csv"}
    assert set(files(run)) == names | crops
    assert (a.read_bytes(), b.read_bytes()) == before
    assert np.loadtxt(run / "labels" / "a.txt").shape == (3, 6)
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        assert [row["source"] for row in csv.DictReader(file)] == [str(a)] * 3 + [str(b)] * 3


def test_runs_are_numbered_and_drawing_options_reach_the_image(call, tmp_path):
    a = picture(tmp_path / "a.png")
    for options in ([], ["--hide-conf"], ["--hide-labels"], ["--line-thickness", "6"]):
        assert call("--source", a, *options)[0] == 0
    assert call("--source", a, "--nosave")[0] == 0
    assert call("--source", a, "--exist-ok", "--name", "exp2", "--hide-conf")[0] == 0
    names = [f"detect/exp{number}/a.png" for number in ("", 2, 3, 4)]
    assert files(tmp_path / "runs") == names
    assert len({(tmp_path / "runs" / name).read_bytes() for name in names}) == 4


def test_names_of_data_and_classes_by_number_and_name(call, tmp_path):
    text = "path: .\ntrain: .\nval: .\nnames: [Mensch, Bus, Ampel]\n"
    (tmp_path / "german.yaml").write_text(text, encoding="utf-8")
    options = ("--nosave", "--data", "german.yaml", "--classes", "1", "Ampel")
    code, out, err = call("--source", picture(tmp_path / "a.jpg"), *options)
    assert (code, err) == (0, "")
    assert "Mensch" not in out
    assert "Bus" in out or "Ampel" in out


def test_video_with_labels_per_frame(call, tmp_path):
    path = video(tmp_path / "clip.avi", 6)
    code, out, err = call("--source", path, "--save-txt", "--vid-stride", 2)
    assert (code, err) == (0, "")
    assert "video 1/1 " in out
    assert "clip.avi: 3 frames 64x64 9 detections in 3 of them, " in out
    run = tmp_path / "runs" / "detect" / "exp"
    assert files(run) == ["clip.mp4", *(f"labels/clip_{n}.txt" for n in (1, 3, 5))]
    capture = cv2.VideoCapture(str(run / "clip.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (3, 5)
    capture.release()


def test_bad_files_among_good_ones_exit_3(weights, root, tmp_path):  # D1 D7 D8
    """As a command, with every kind of fault that is skipped and named; decoders are silent."""
    folder = tmp_path / "in"
    picture(folder / "a.jpg")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")  # macOS's metadata: no source
    (folder / "b.jpg").write_bytes(b"")
    (folder / "c.mp4").write_bytes(b"")
    path = video(folder / "d.avi", 20)
    data = bytearray(path.read_bytes())
    part = slice(len(data) // 3, len(data) * 2 // 3)
    data[part] = bytes(len(data[part]))
    path.write_bytes(data)
    options = ["--weights", weights, "--img", "64", "--device", "cpu", "--source", "in"]
    command = [sys.executable, root / "detect.py", *options, "x" * 300 + ".jpg"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    long, *empty, incomplete, last = done.stderr.splitlines()
    assert long.startswith("skipped: xxx")
    assert "name too long" in long
    assert empty == ["skipped: in/b.jpg: empty file", "skipped: in/c.mp4: empty file"]
    assert incomplete.startswith("incomplete: in/d.avi: read ")
    assert incomplete.endswith(" of 20 frames")
    assert last == "error: 4 sources skipped or cut short, see above"
    assert "image 1/4 in/a.jpg: 64x64 " in done.stdout
    assert "Speed: " in done.stdout


@pytest.mark.parametrize(
    "source", ["missing.jpg", "empty", "bad.jpg", "bad.mp4", "file:///etc/passwd"]
)
def test_nothing_to_read_exits_2_and_makes_no_run_folder(call, tmp_path, source):  # D3 D5 D6
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "bad.mp4").write_bytes(b"")
    code, out, err = call("--source", source)
    assert code == 2
    assert out == ""
    assert source in err
    assert err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "runs").exists()


def test_lost_stream_exits_4_and_keeps_its_recording(call, tmp_path):  # D10
    with Server() as camera:

        def end_after_a_frame() -> None:
            while not (tmp_path / "runs").exists() and not camera.down.wait(0.1):
                pass
            camera.down.set()

        threading.Thread(target=end_after_a_frame, daemon=True).start()
        shown = camera.url("/live")
        url = shown.replace("//", "//user:secret@")
        code, out, err = call("--source", url, "--stream-timeout", 1)
    assert code == 4
    assert f"{shown}: connection lost; retrying for 1 s" in err
    assert err.splitlines()[-1].startswith(f"error: {shown}: lost for 1 s, given up: ")
    assert f"stream 1/1 {shown}: frame " in out
    assert "Speed: " in out
    assert "secret" not in out + err
    (recording,) = (tmp_path / "runs" / "detect" / "exp").iterdir()
    assert recording.name == "_".join(re.findall(r"[\w.]+", shown)[1:]) + ".mp4"
    capture = cv2.VideoCapture(str(recording))
    done, frame = capture.read()
    capture.release()
    assert done
    assert np.median(frame) > 150, "black frames were recorded"


def test_view_without_a_display_stops_before_any_work(call, tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    code, out, err = call("--source", picture(tmp_path / "a.jpg"), "--view-img")
    assert (code, out) == (2, "")
    assert "this machine has no display" in err
    monkeypatch.setenv("DISPLAY", ":987")  # there is none
    with pytest.raises(UserError, match="cannot open one"):
        console.require_display()


def test_view_shows_annotated_frames_until_q(call, tmp_path, monkeypatch):
    shown, waits, keys = [], [], iter([-1, ord("q")])
    monkeypatch.setattr(prediction, "require_display", lambda: None)
    monkeypatch.setattr(console.cv2, "imshow", lambda title, image: shown.append((title, image)))
    monkeypatch.setattr(console.cv2, "waitKey", lambda wait: waits.append(wait) or next(keys))
    a = picture(tmp_path / "a.png")
    code, out, _ = call("--source", a, a, a, "--view-img", "--nosave")
    assert code == 0
    assert [title for title, _ in shown] == [str(a), str(a)]
    assert waits == [0, 0]
    assert not np.array_equal(shown[0][1][..., ::-1], np.asarray(Image.open(a)))
    assert [line.split()[1] for line in out.splitlines()[:-1]] == ["1/3", "2/3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save-conf"], "--save-conf does nothing without --save-txt"),
        (["--source", ""], "--source has an empty name"),
        (["--vid-stride", "0"], "--vid-stride must be at least 1"),
        (["--line-thickness", "0"], "--line-thickness"),
        (["--conf-thres", "1.5"], "--conf-thres must be at most 1, got 1.5"),
        (["--max-det", "0"], "--max-det must be at least 1"),
        (["--stream-timeout", "0"], "--stream-timeout must be at least 0.1"),
        (["--img", "65"], "stride 32"),
        (["--half"], "needs a CUDA device"),
        (["--classes", "buss"], "did you mean 'bus'"),
        (["--sorce", "x"], "did you mean '--source'"),
        (["--weights", "missing.pt"], "missing.pt: no such file"),
        (["--weights", "yolov5s.pt"], "YOLOv5's authors publish yolov5s.pt at https://"),
        (["--img", "64", "65"], "stride 32"),
        (["--project", "a.jpg"], "a.jpg is a file"),
    ],
)
def test_impossible_options_exit_2_in_one_line(call, tmp_path, arguments, message):
    code, out, err = call("--source", picture(tmp_path / "a.jpg"), *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_sizes_named_and_not_named(call, weights, tmp_path):
    """The size of the checkpoint's training by default; two numbers are the canvas."""
    path = picture(tmp_path / "a.jpg")
    out = call("--source", path, "--nosave", "--imgsz", 96, 128)[1]
    assert f"{path}: 96x128 " in out
    content = load_checkpoint(weights)
    for size, line in ((96, "96 (the size of its training)"), (None, "640 (the default)")):
        save_checkpoint(tmp_path / "own.pt", {**content, "config": {"imgsz": size}})
        detect.main(["--weights", "own.pt", "--source", str(path), "--nosave", "--device", "cpu"])
        assert call("--source", path, "--nosave")[1].startswith(f"own.pt: --img {line}\n")


def test_augment_finds_more_candidates(call, tmp_path):
    a, found = picture(tmp_path / "a.jpg"), []
    for name, options in (("exp", []), ("exp2", ["--augment"])):
        options += ["--max-det", 3000, "--iou-thres", 1, "--conf-thres", 0]
        call("--source", a, "--nosave", "--save-csv", *options)
        table = tmp_path / "runs" / "detect" / name / "predictions.csv"
        found.append(len(table.read_text(encoding="utf-8").splitlines()) - 1)
    assert found[0] == 3 * (8 * 8 + 4 * 4 + 2 * 2)
    assert found[1] == 3 * found[0]  # 0.83 and 0.67 of 64 both pad to 64


def test_genuine_weights_on_real_pictures(call, shared):
    source = shared / "datasets" / "coco_tiny" / "val2017" / "000000436738.jpg"
    options = ["--img", 640, "--conf-thres", 0.5, "--max-det", 1000, "--source", source]
    code, out, _ = call("--weights", shared / "weights" / "yolov5n.pt", *options)
    assert code == 0
    assert "2 persons, 1 bus, 3 cars" in out

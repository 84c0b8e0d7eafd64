"""What a detection run prints and writes, and that nothing of the user's is overwritten."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data.sources.frames import Frame, Sources
from engine.measure.bench import Speed
from engine.predict.config import DetectConfig
from engine.predict.console import Console
from engine.predict.outputs import Outputs, safe_name
from engine.predict.result import Result
from utils.boxes import Detections
from utils.errors import UserError

NAMES = ("cat", "../evil/..", "行")
FOUND = Detections(
    torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.4, 0.4, 0.6, 0.6]]),
    torch.tensor([0.875, 0.25]),
    torch.tensor([0, 1]),
)
NONE = Detections(*(column[:0] for column in vars(FOUND).values()))


def result(
    label: str = "in/a.jpg",
    *,
    item: int = 1,
    kind: str = "image",
    number: int = 1,
    found: Detections = FOUND,
) -> Result:
    image = np.full((80, 40, 3), 100, np.uint8)
    image[20:60, 10:30] = 250
    path = Path(label) if kind != "stream" else None
    frame = Frame(image, kind, label, path, item, 9, number, 4, 10.0)
    return Result(image, found, NAMES, Speed(1.0, 12.34, 3.0), (64, 32), frame)


def write(folder: Path, *results: Result, inputs: tuple[Path, ...] = (), **options) -> Path:
    """Write results in a run of its own; its folder."""
    config = DetectConfig(weights="w.pt", source=("x",), project=str(folder), **options)
    with Outputs(config, inputs=inputs) as outputs:
        for one in results:
            outputs.write(one)
    return outputs.folder


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def frames_of(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return count


def test_a_line_per_image_video_and_stream_frame_and_the_mean_times(capsys):
    with Console():
        pass
    with Console() as console:
        console.show(result("in/1"))
        console.show(result("in/2", item=2, found=NONE))
        for number in range(1, 5):
            console.show(result("in/3", kind="video", item=3, number=number))
        console.show(result("in/4", kind="video", item=4, found=NONE))
        console.show(result("in/5", kind="stream", item=5, number=17))
        console.problem("skipped: x: empty file")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "image 1/9 in/1: 64x32 1 cat, 1 ../evil/.., 12.3ms",
        "image 2/9 in/2: 64x32 (no detections), 12.3ms",
        "video 3/9 in/3: 4 frames 64x32 8 detections in 4 of them, 12.3ms per frame",
        "video 4/9 in/4: 1 frames 64x32 0 detections in 0 of them, 12.3ms per frame",
        "stream 5/9 in/5: frame 17 64x32 1 cat, 1 ../evil/.., 12.3ms",
        "Speed: 1.0 ms pre-process, 12.3 ms inference, 3.0 ms NMS per image",
    ]
    assert captured.err == "skipped: x: empty file\n"  # no bar where stderr is no terminal


def test_all_files_of_an_image(tmp_path):
    everything = dict.fromkeys(("save_txt", "save_conf", "save_csv", "save_crop"), True)
    run = write(tmp_path / "runs", result(), **everything)
    assert run == tmp_path / "runs" / "exp"
    crops = ["crops/cat/a_1.jpg", "crops/evil/a_2.jpg"]
    assert files(run) == ["a.jpg", *crops, "labels/a.txt", "predictions.csv"]
    assert (run / "labels/a.txt").read_text(encoding="utf-8") == (
        "0 0.500000 0.500000 0.500000 0.500000 0.875000\n"
        "1 0.012500 0.006250 0.005000 0.002500 0.250000\n"
    )
    crop = np.asarray(Image.open(run / crops[0]))
    assert crop.shape == (40, 20, 3)
    assert np.allclose(crop, 250, atol=3), "a crop holds no drawn lines"
    assert np.asarray(Image.open(run / crops[1])).shape == (1, 1, 3)
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["source", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2"]
    assert rows[1] == ["in/a.jpg", "1", "0", "cat", "0.87500", "10.00", "20.00", "30.00", "60.00"]
    assert len(rows) == 3


def test_equal_names_from_different_folders_do_not_meet(tmp_path):
    labels = ["x/a.jpg", "y/a.jpg", "z/a.png", "z/A.bmp", "z/a_2.gif"]
    results = [result(label, item=item) for item, label in enumerate(labels)]
    run = write(tmp_path, *results, save_txt=True, save_crop=True)
    images = {path.name for path in run.iterdir() if path.is_file()}
    assert images == {"a.jpg", "a_2.jpg", "a_3.png", "A_4.bmp", "a_2_2.jpg"}
    assert {p.stem for p in (run / "labels").iterdir()} == {Path(name).stem for name in images}
    assert len(list((run / "crops" / "cat").iterdir())) == 5


def test_names_too_long_for_the_file_system_are_cut(tmp_path):
    names = ("a" * 251 + ".gif", "a" * 250 + "b.gif", "行" * 83 + ".png")
    results = [
        replace(result(name, item=item), names=("行" * 100, "b", "c"))
        for item, name in enumerate(names)
    ]
    run = write(tmp_path, *results, save_txt=True, save_crop=True)
    images = sorted(path.name for path in run.glob("*.*"))
    assert images == [f"{'a' * 200}.jpg", f"{'a' * 200}_2.jpg", f"{'行' * 66}.png"]
    assert len(list((run / "crops").rglob("*.jpg"))) == 6
    assert len(list((run / "labels").iterdir())) == 3


def test_two_streams_are_recorded_in_parallel(tmp_path):
    streams = [(1, "rtsp://cam:554/a?b=c"), (2, "webcam 0")] * 3
    run = write(tmp_path, *(result(name, item=item, kind="stream") for item, name in streams))
    assert files(run) == ["cam_554_a_b_c.mp4", "webcam 0.mp4"]
    assert [frames_of(run / name) for name in files(run)] == [3, 3]


def test_a_video_is_whole_after_an_error_and_named_if_the_disk_was_full(tmp_path):
    path = tmp_path / "exp" / "clip.mp4"
    config = DetectConfig("w.pt", ("x",), project=str(tmp_path), exist_ok=True)

    def run(then: BaseException | None) -> None:
        with Outputs(config) as outputs:
            outputs.write(result("clip.avi", kind="video"))
            if then:
                raise then
            path.unlink()  # what is written from here on is lost, as on a full disk
            path.write_bytes(b"")

    with pytest.raises(KeyboardInterrupt):
        run(KeyboardInterrupt())
    assert frames_of(path) == 1
    with pytest.raises(UserError, match=r"clip\.mp4: the video could not be written"):
        run(None)


def test_the_source_is_never_overwritten(tmp_path):
    path = tmp_path / "exp" / "images" / "a.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(path)
    inputs = Sources(path).files
    (tmp_path / "link").symlink_to(tmp_path / "exp" / "images")
    for name in ("exp", "exp/images", ".", "link"):
        with pytest.raises(UserError, match="contains the source"):
            write(tmp_path, name=name, inputs=inputs, exist_ok=True)
    assert write(tmp_path, result(), inputs=inputs) == tmp_path / "exp2"


def test_an_impossible_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot create the run folder"):
        write(tmp_path / "file", result())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["labels/a.txt", "predictions.csv"])
def test_a_full_disk_names_the_file(tmp_path, name):
    """The disk is full for one file: its name leads to a device without room."""
    (tmp_path / "exp" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "exp" / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match=rf"{name}: cannot write: No space left"):
        write(tmp_path, result(), save_txt=True, save_csv=True, exist_ok=True)


def test_safe_name():
    kept = {name: name for name in ("traffic light", "行人")}
    changed = {"../../etc/passwd": "etc_passwd", "...": "unnamed", "C:\\x": "C_x"}
    assert {text: safe_name(text) for text in kept | changed} == kept | changed

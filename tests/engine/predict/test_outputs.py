"""Files of a detection run: names, contents, and nothing of the user's overwritten."""

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
from engine.predict.outputs import Outputs, safe_name
from engine.predict.predictor import Result
from utils.boxes import Detections
from utils.errors import UserError

NAMES = ("cat", "../evil/..", "行")
FOUND = Detections(
    torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.4, 0.4, 0.6, 0.6]]),
    torch.tensor([0.875, 0.25]),
    torch.tensor([0, 1]),
)


def result(
    label: str = "in/a.jpg", *, item: int = 1, kind: str = "image", number: int = 1
) -> Result:
    image = np.full((80, 40, 3), 100, np.uint8)
    image[20:60, 10:30] = 250
    path = Path(label) if kind != "stream" else None
    frame = Frame(image, kind, label, path, item, 9, number, None, 10.0)
    return Result(image, FOUND, NAMES, Speed(1, 2, 3), (64, 32), frame)


def outputs_in(folder: Path, *, inputs: tuple[Path, ...] = (), **options: object) -> Outputs:
    options = {"weights": "w.pt", "source": ("x",), "project": str(folder), **options}
    return Outputs(DetectConfig(**options), inputs=inputs)  # type: ignore[arg-type]


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_all_files_of_an_image(tmp_path):
    everything = dict.fromkeys(("save_txt", "save_conf", "save_csv", "save_crop"), True)
    with outputs_in(tmp_path / "runs", **everything) as outputs:
        outputs.write(result())
    run = tmp_path / "runs" / "exp"
    assert outputs.folder == run
    assert files(run) == [
        "a.jpg",
        "crops/cat/a_1.jpg",
        "crops/evil/a_2.jpg",
        "labels/a.txt",
        "predictions.csv",
    ]
    assert (run / "labels/a.txt").read_text(encoding="utf-8") == (
        "0 0.500000 0.500000 0.500000 0.500000 0.875000\n"
        "1 0.012500 0.006250 0.005000 0.002500 0.250000\n"
    )
    crop = np.asarray(Image.open(run / "crops/cat/a_1.jpg"))
    assert crop.shape == (40, 20, 3)
    assert np.allclose(crop, 250, atol=3), "a crop holds no drawn lines"
    assert np.asarray(Image.open(run / "crops/evil/a_2.jpg")).shape == (1, 1, 3)
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["source", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2"]
    assert rows[1] == ["in/a.jpg", "1", "0", "cat", "0.87500", "10.00", "20.00", "30.00", "60.00"]
    assert len(rows) == 3


def test_equal_names_from_different_folders_do_not_meet(tmp_path):
    with outputs_in(tmp_path, save_txt=True, save_crop=True) as outputs:
        for item, label in enumerate(["x/a.jpg", "y/a.jpg", "z/a.png", "z/A.bmp", "z/a_2.gif"], 1):
            outputs.write(result(label, item=item))
    assert files(tmp_path / "exp")[:1] == ["A_4.bmp"]
    stems = {"a", "a_2", "a_3", "A_4", "a_2_2"}
    pictures = {p.name for p in (tmp_path / "exp").iterdir() if p.is_file()}
    assert pictures == {"a.jpg", "a_2.jpg", "a_3.png", "A_4.bmp", "a_2_2.jpg"}
    assert {p.stem for p in (tmp_path / "exp" / "labels").iterdir()} == stems
    assert len(list((tmp_path / "exp" / "crops" / "cat").iterdir())) == 5


def test_two_streams_are_recorded_in_parallel(tmp_path):
    with outputs_in(tmp_path) as outputs:
        for number in (1, 2, 3):
            for item, label in ((1, "rtsp://cam:554/a?b=c"), (2, "webcam 0")):
                outputs.write(result(label, item=item, kind="stream", number=number))
    assert files(tmp_path / "exp") == ["cam_554_a_b_c.mp4", "webcam 0.mp4"]
    assert [frames_of(tmp_path / "exp" / name) for name in files(tmp_path / "exp")] == [3, 3]


def frames_of(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return count


def test_a_video_is_whole_after_an_error_and_named_if_the_disk_was_full(tmp_path):
    path = tmp_path / "exp" / "clip.mp4"

    def write(then: BaseException | None) -> None:
        with outputs_in(tmp_path, exist_ok=True) as outputs:
            outputs.write(result("clip.avi", kind="video"))
            if then:
                raise then
            path.unlink()  # what is written from here on is lost, as on a full disk
            path.write_bytes(b"")

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert frames_of(path) == 1
    with pytest.raises(UserError, match=r"clip\.mp4: the video could not be written"):
        write(None)


def test_the_source_is_never_overwritten(tmp_path):
    path = tmp_path / "exp" / "images" / "a.jpg"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(path)
    inputs = Sources(path).files
    (tmp_path / "link").symlink_to(tmp_path / "exp" / "images")
    for name in ("exp", "exp/images", ".", "link"):
        with pytest.raises(UserError, match="contains the source"):
            outputs_in(tmp_path, name=name, inputs=inputs, exist_ok=True)
    with outputs_in(tmp_path, inputs=inputs) as outputs:
        outputs.write(result())
    assert outputs.folder == tmp_path / "exp2"


def test_an_impossible_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with (
        pytest.raises(UserError, match="cannot create the run folder"),
        outputs_in(tmp_path / "file") as outputs,
    ):
        outputs.write(result())


def test_names_too_long_for_the_file_system_are_cut(tmp_path):
    config = dict.fromkeys(("save_txt", "save_crop"), True)
    with outputs_in(tmp_path, **config) as outputs:
        for item, name in enumerate(["a" * 251 + ".gif", "a" * 250 + "b.gif", "行" * 83 + ".png"]):
            outputs.write(replace(result(name, item=item), names=("行" * 100, "b", "c")))
    images = sorted(path.name for path in (tmp_path / "exp").glob("*.*"))
    assert images == [f"{'a' * 200}.jpg", f"{'a' * 200}_2.jpg", f"{'行' * 66}.png"]
    assert len(list((tmp_path / "exp" / "crops").rglob("*.jpg"))) == 6
    assert len(list((tmp_path / "exp" / "labels").iterdir())) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["labels/a.txt", "predictions.csv"])
def test_a_full_disk_names_the_file(tmp_path, name):
    """The disk is full for one file: its name leads to a device without room."""
    (tmp_path / "exp" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "exp" / name).symlink_to("/dev/full")

    def run() -> None:
        with outputs_in(tmp_path, save_txt=True, save_csv=True, exist_ok=True) as outputs:
            outputs.write(result())

    with pytest.raises(UserError, match=rf"{name}: cannot write: No space left"):
        run()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("../../etc/passwd", "etc_passwd"),
        ("a/b", "a_b"),
        ("...", "unnamed"),
        ("traffic light", "traffic light"),
        ("行人", "行人"),
        ("C:\\x", "C_x"),
    ],
)
def test_safe_name(text, name):
    assert safe_name(text) == name

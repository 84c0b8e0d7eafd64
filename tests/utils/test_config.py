"""Dataclasses as command lines, and small utilities."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

from utils.config import check_options, default_workers, option, parse, parse_given
from utils.errors import WAITING, UserError, nearest
from utils.files import check_run_dir, find_config, new_run_dir
from utils.hyp import Hyperparameters, choose_recipe, load_hyp
from utils.seeding import generator


@dataclass(frozen=True)
class Config:
    weights: str = option(help="weights")
    imgsz: int = option(640, help="size", flags=("--img",))
    classes: tuple[int, ...] | None = option(None, help="labels")
    half: bool = option(False, help="half")
    conf: float = option(0.25, help="threshold", min=0, max=1)
    resume: str | None = option(None, help="run", const="newest")
    seed: int = option(0, help="random")

    def __post_init__(self) -> None:
        check_options(self)


def run(*argv: str) -> Config:
    return parse(Config, argv, prog="x", description="d")


def test_flags_spellings_and_types() -> None:
    typed = ["--weights", "a.pt", "--img", "640", "--classes", "0", "3", "--half", "--resume"]
    config, given = parse_given(Config, typed, prog="x", description="d")
    assert config == Config("a.pt", 640, (0, 3), True, 0.25, "newest")
    assert given == {"weights", "imgsz", "classes", "half", "resume"}  # also with their default
    assert run("--weights", "a", "--imgsz", "64") == Config("a", 64)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--weights a --imgz 3", "unknown argument '--imgz'; did you mean '--imgsz'"),
        ("--weights a --imgsz big", "invalid int value: 'big'"),
        ("", "--weights"),
        ("--weights a --conf 2", "--conf must be at most 1, got 2.0"),
        ("--weights a --conf -1", "--conf must be at least 0, got -1.0"),
        ("--weights a --conf nan", "--conf must be at least 0, got nan"),
        ("--weights a --weight b", "unknown argument '--weight'"),
        ("--imgz 3", "unknown argument '--imgz'; did you mean '--imgsz'"),  # before --weights
        ("--weights a --xyz=3", "unknown argument '--xyz=3' .see --help"),
        ("--weights a --img 3 x", "unknown argument 'x'"),
    ],
)
def test_bad_command_lines(argv: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(*argv.split())


def test_help_shows_defaults_that_say_something(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert "size (default: 640)" in text
    assert not any(word in text for word in ("None", "False", "(default: )"))
    assert "random (default: 0)" in text


def test_workers_are_shared_by_the_ranks_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for ranks, workers in {"1": 8, "4": 4, "64": 1, "x": 8, "0": 8}.items():
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert default_workers() == workers


def test_recipes() -> None:
    assert load_hyp("default") == load_hyp("auto") == Hyperparameters(min_updates=1000)
    assert load_hyp("demo") == load_hyp("small")
    off = load_hyp("no-augmentation")
    assert (off.mosaic, off.fliplr, off.scale, off.hsv_s, off.translate) == (0, 0, 0, 0, 0)
    assert off.lr0 == Hyperparameters().lr0


@pytest.mark.parametrize(
    ("hyp", "optimizer", "images", "batch", "chosen"),
    [
        ("auto", "auto", 639, 16, ("small", "AdamW")),  # 100 epochs of 639 / 64: 998 updates
        ("auto", "auto", 640, 16, ("default", "SGD")),
        ("auto", "auto", 640, 128, ("small", "AdamW")),
        ("auto", "SGD", 48, 16, ("default", "SGD")),
        ("auto", "Adam", 99_999, 16, ("small", "Adam")),
        ("default", "auto", 48, 16, ("default", "SGD")),
        ("small", "auto", 99_999, 16, ("small", "AdamW")),
        ("demo", "auto", 48, 16, ("demo", "AdamW")),  # small's former name
        ("cfg/train/small.yaml", "auto", 48, 16, ("cfg/train/small.yaml", "AdamW")),
        ("hyp.VOC", "auto", 48, 16, ("hyp.VOC", "SGD")),
        ("mine.yaml", "AdamW", 48, 16, ("mine.yaml", "AdamW")),
    ],
)
def test_a_recipe_by_the_length_of_the_run(hyp, optimizer, images, batch, chosen, capsys) -> None:
    run = {"images": images, "epochs": 100, "batch_size": batch}
    assert choose_recipe(hyp, optimizer, **run, pretrained=False) == chosen
    both = hyp == optimizer == "auto"
    text = f"--hyp {chosen[0]} --optimizer {chosen[1]}: {images} images x 100 epochs / "
    assert capsys.readouterr().out.startswith(text if both else "")
    fine = choose_recipe(hyp, optimizer, **run, pretrained=True)
    short = hyp == "auto" and chosen[0] == "small"
    assert fine == (("finetune", chosen[1]) if short else chosen)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1", "h.yaml:1: unknown hyper-parameter 'lr'; did you mean 'lr"),
        ("lr0: fast", "h.yaml:1: lr0 must be a number from 0 to 10, got 'fast'"),
        ("box: -1", "box must be a number from 0 to 1e+09, got -1"),
        ("mosaic: 2", "mosaic must be a number from 0 to 1, got 2"),
        ("momentum: .nan", "momentum must be a number from 0 to 0.9999, got nan"),
        ("box: .inf", "box must be a number from 0 to 1e+09, got inf"),
        ("lr0: true", "h.yaml:1: lr0 must be a number from 0 to 10, got True"),
        ("[1, 2]: 5", "h.yaml:1: a key must be one word"),
        ("lr0: 1\0", "h.yaml: not plain YAML: unacceptable character"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "h.yaml"
    path.write_text("lr0: 1e-3")
    assert load_hyp(str(path)).lr0 == 0.001
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        load_hyp(str(path))


def test_configs_are_found_as_users_type_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ablations/vgg16", "ablations/vgg16.yaml", "cfg/ablations/vgg16"):
        assert find_config(name, "").as_posix().endswith("cfg/ablations/vgg16.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("coco", "coco.yaml"):
        assert find_config(name, "data").as_posix().endswith("cfg/data/coco.yaml")
    assert capsys.readouterr().err == ""
    for _ in range(2):  # a shipped file takes no other place unsaid
        assert find_config("here/coco.yaml", "data").name == "coco.yaml"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("here/coco.yaml does not exist; ")
    assert line.endswith("cfg/data/coco.yaml is used instead")
    for name in (f"{tmp_path}/coco.yaml", "./coco.yaml", "../coco.yaml", "~/coco.yaml"):
        with pytest.raises(UserError, match=r"coco\.yaml: no such file"):
            find_config(name, "data")
    mine = tmp_path / "here" / "coco.yaml"
    mine.parent.mkdir()
    mine.write_text("")
    for name in ("here/coco", "here/coco.yaml", f"{tmp_path}/here/coco"):
        assert find_config(name, "data").resolve() == mine.resolve()
    (tmp_path / "coco.yaml").write_text("")
    assert find_config("coco", "data").resolve() != tmp_path / "coco.yaml"  # a name of cfg/data
    assert find_config("coco.yaml", "data").resolve() == tmp_path / "coco.yaml"
    with pytest.raises(UserError, match="File name too long"):
        find_config("x" * 300, "data")


def test_run_folders_started_at_once_differ(tmp_path: Path) -> None:
    with ThreadPool(8) as pool:
        made = pool.map(lambda _: new_run_dir(str(tmp_path / "runs"), "exp"), range(8))
    assert len({path.name for path in made}) == 8
    assert {path.name for path in made} == {"exp", *(f"exp{n}" for n in range(2, 9))}
    assert new_run_dir(str(tmp_path / "runs"), "exp", exist_ok=True).name == "exp"


def test_a_run_folder_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_run_dir(str(tmp_path / "runs" / "deep"), "exp")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    for project in ("file", "file/below"):
        with pytest.raises(UserError, match=r"exp: cannot create the run folder: .*file is a file"):
            check_run_dir(str(tmp_path / project), "exp")
    with pytest.raises(UserError, match="must be a folder inside --project"):
        check_run_dir(str(tmp_path), "..")


@pytest.mark.parametrize("name", ["", "..", "a/../../b", "/tmp/x", "."])
def test_a_run_stays_inside_its_project(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="must be a folder inside --project"):
        new_run_dir(str(tmp_path / "runs"), name)


def test_nearest_and_generators() -> None:
    assert nearest("Conv2", ["Conv", "C3"]) == "; did you mean 'Conv'?"
    assert nearest("zzz", ["Conv"]) == ""
    assert nearest("Cove", ["Conv1"]) == ""  # 2 * 3 / 9, under 0.7
    one, same, other = (
        generator(*key).integers(1 << 60) for key in ((1, 2, 3), (1, 2, 3), (1, 3, 2))
    )
    assert one == same != other


def script(root: Path, body: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python whose main has this body, run as all scripts are."""
    head = "import os, signal, time\nfrom utils.errors import *\nfrom utils.terminal import say\n"
    text = f"{head}def main(argv):\n    {body}\nrun_script(main)"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(text)} {' '.join(argv)}"
    return subprocess.run(
        ["bash", "-c", command], cwd=root, env={**os.environ, **env}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("raise UserError('bad value')", 2, "error: bad value"),
        (r"raise UserError('a\x1b[2J\nb \udcff')", 2, r"error: a [2J b \udcff"),
        (r"raise ValueError('a\x1b[2J\nb')", 1, "internal error: ValueError: a [2J b"),
        ("raise PartlyDoneError('2 of 3')", 3, "error: 2 of 3"),
        ("raise SourceLostError('gone')", 4, "error: gone"),
        ("1 / 0", 1, "internal error: ZeroDivisionError"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, "terminated"),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(9)", 129, "terminated"),
        ("return 0", 0, ""),
    ],
)
def test_exit_codes_and_one_line(root: Path, body: str, code: int, text: str) -> None:
    done = script(root, body)
    assert done.returncode == code
    assert done.stderr.startswith(text)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if text else 0)


def test_openmp_waits_briefly_unless_the_user_says_how_long(root: Path, monkeypatch) -> None:
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    body = f"print(*(os.environ.get(name) for name in {WAITING}))"
    assert script(root, body).stdout == "None 10000 1\n"
    for position, name in enumerate(WAITING):
        words = ["None"] * 3
        words[position] = "7"
        assert script(root, body, **{name: "7"}).stdout.split() == words


def test_a_closed_stdout_is_no_error_and_a_terminal_that_is_not_utf8_shows_escapes(root) -> None:
    closed = script(root, "say('x')", ">&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    done = script(root, "print('\u7d30')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u7d30\n", "")


def test_a_traceback_is_printable_too(root: Path) -> None:
    lines = script(root, r"raise UserError('a\x1b[2Jb')", "--debug").stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: a [2Jb"
    assert all(line.isprintable() for line in lines)

"""README.md and CONTRIBUTING.md are true: commands parse, files exist, the cost table is counted."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from models.profile.counting import profile_spec
from models.yaml.parser import load_spec

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT + GUIDE, re.DOTALL)
MAX_LINES = 255


def commands() -> list[str]:
    lines = [line for language, body in BLOCKS if not language for line in body.splitlines()]
    return [
        line.split("  #")[0].strip()
        for line in lines
        if re.match(r"(python|torchrun|make) ", line.strip())
    ]


COMMANDS = commands()
PYTHON_COMMANDS = [line for line in COMMANDS if not re.match("make|python -m pytest", line)]


def main_module(words: list[str]) -> tuple[str, list[str]]:
    """'python -m a.b --flag' or 'torchrun ... train.py --flag' -> (module, its arguments)."""
    if words[1] == "-m":
        return f"{words[2]}.__main__", words[3:]
    script = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[script].removesuffix(".py"), words[script + 1 :]


def known_flags(
    module: str, capsys: pytest.CaptureFixture[str], *, subcommand: tuple[str, ...] = ()
) -> set[str]:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).main([*subcommand, "--help"])
    assert caught.value.code == 0
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))


def test_the_two_commands_come_first() -> None:
    first = [line.split("#")[0].strip() for line in BLOCKS[0][1].splitlines()]
    assert first == ["make demo", "make test"]


def test_readme_is_short() -> None:
    assert len(TEXT.splitlines()) < MAX_LINES


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join([*COMMANDS, makefile])))
    rules = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    assert {"demo", "test", "setup"} <= named <= rules


def test_ci_calls_the_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": "make test"}


def test_commits_are_checked_like_make_lint_and_make_type() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0][
        "hooks"
    ]
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("$(BIN)", ".venv/bin")
    assert [hook["language"] for hook in hooks] == ["system"] * 3
    assert all(hook["entry"] in makefile for hook in hooks)


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_flags_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module, arguments = main_module(shlex.split(command))
    flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
    subcommand = ("voc",) if module == "data.convert.__main__" else ()
    assert flags <= known_flags(module, capsys, subcommand=subcommand)


def test_flags_in_prose_exist(capsys: pytest.CaptureFixture[str]) -> None:
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    named = set(re.findall(r"`(--[a-z][\w-]*)", prose))
    known = {"--debug"}  # taken by utils.errors.run_script for every script
    for module in ("train", "val", "detect", "models.profile.__main__"):
        known |= known_flags(module, capsys)
    assert named
    assert named <= known


PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
EXAMPLES = {
    "models/blocks/separable.py",
    "cfg/yolov5n-separable.yaml",
    "data/coco.yaml",
    "docs/results/NAME/",
}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    names = re.findall(
        r"`((?:cfg|docs|tests|models|data|engine|utils|benchmarks)/[\w./-]*\w/?)`", text
    )
    missing += [name for name in names if name not in EXAMPLES and not (ROOT / name).exists()]
    assert missing == []


def test_every_folder_of_the_source_has_its_line() -> None:
    named = set(re.findall(r"`([a-z]+/(?:[a-z]+/)?)`", TEXT[TEXT.index("## Layout") :]))
    for room in ("engine", "models", "data"):
        for folder in (ROOT / room).glob("[a-z]*/"):
            name = f"{room}/{folder.name}/"
            assert name in named or f"`{folder.name}/`" in TEXT or not any(folder.glob("*.py")), (
                name
            )


TABLE = re.findall(r"^\| `(yolov5\*[\w-]*)` \|[^|]*\|(.*)\|$", TEXT, re.MULTILINE)


@pytest.mark.parametrize(("family", "cells"), TABLE)
def test_table_is_what_profile_counts(family: str, cells: str) -> None:
    for size, cell in zip("nsl", cells.split("|"), strict=True):
        profile = profile_spec(load_spec(family.replace("*", size)), image_size=640, classes=80)
        expected = f"{profile.params / 1e6:.2f} M, {profile.flops / 1e9:.1f}"
        assert cell.strip() == expected


def test_table_has_every_family() -> None:
    assert len(TABLE) == 10

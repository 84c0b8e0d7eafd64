"""The house rules that a reader of docs/architecture.md relies on, checked on the syntax trees."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = tuple(sorted(path.name for path in ROOT.glob("*.py")))
COMMANDS = tuple(Path(name).stem for name in SCRIPTS if name != "hubconf.py")
MODULES = (
    "models.profile.__main__",
    "data.convert.__main__",
    "data.index.__main__",
    "data.shapes.__main__",
)
ROOMS = ("featherdet", "engine", "models", "data", "utils")
# Who may import whom; benchmarks are scripts in a folder.
ALLOWED = {
    "utils": {"utils"},
    "data": {"data", "utils"},
    "models": {"models", "utils"},
    "engine": {"engine", "models", "data", "utils"},
    "featherdet": {"featherdet", "engine", "models", "data", "utils"},
    "benchmarks": {"benchmarks", "engine", "models", "data", "utils"},
}
LONGEST_FILE = 320
LARGEST_FOLDER = 16  # Python files
LINES = 27_360  # Python outside tests/; goes down, and up only with a capability
SCRIPT_LINES = 1_150  # JavaScript, CSS and HTML of our own
REPORTING = {"nncf", "onnxruntime", "openvino"}  # to their makers, unless told otherwise
# What runs text or bytes from outside as code.
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNSAFE_LOADERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
}
# Reads genuine YOLOv5 checkpoints, which are pickles, with a find_class that imports nothing.
MAY_IMPORT_PICKLE = "models/weights/restricted.py"
# torch.compile and re.compile are attributes, so that the names above mean the builtins.


def sources() -> Iterator[Path]:
    for name in SCRIPTS:
        yield ROOT / name
    for room in ALLOWED:
        yield from sorted((ROOT / room).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = tuple(map(relative, sources()))


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module or ""


def dotted(node: ast.AST) -> str:
    """'torch.load' for the expression torch.load; '' for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def test_there_is_something_to_check() -> None:
    assert {"train.py", "val.py", "detect.py"} <= set(SCRIPTS)
    assert len(SOURCES) > 50


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_one_way(name: str) -> None:
    room = name.split("/")[0]
    allowed = ALLOWED.get(room, set(ROOMS))
    own = {target.split(".")[0] for target in imported(tree(name))} & {*ALLOWED, "tests"}
    assert own <= allowed, f"{name} imports {', '.join(sorted(own - allowed))}"
    reporting = {target.split(".")[0] for target in imported(tree(name))} & REPORTING
    assert not reporting, f"{name} imports {reporting} without `without_telemetry`"
    stems = {Path(script).stem for script in SCRIPTS}
    assert not {target.split(".")[0] for target in imported(tree(name))} & stems


def test_no_import_circles() -> None:
    """Neither at import, nor in functions, nor for types alone."""
    modules = {name.removesuffix(".py").replace("/", "."): name for name in SOURCES}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        targets = set()
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
                targets |= inner or {node.module or ""}
            elif isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
        graph[module] = targets & set(modules)
    while leaves := [module for module, targets in graph.items() if not targets & set(graph)]:
        for module in leaves:
            del graph[module]
    assert sorted(graph) == []


@pytest.mark.parametrize("room", ["engine", "models", "data"])
def test_rooms_have_no_loose_files_and_are_small(room: str) -> None:
    loose = {
        "engine": {"checkpoint.py", "distributed.py"},
        "models": {
            "spec.py",
            "builder.py",
            "detector.py",
            "registry.py",
        },
        "data": set(),
    }[room]
    assert {path.name for path in (ROOT / room).glob("*.py")} == {"__init__.py", *loose}
    for folder in {path.parent for path in (ROOT / room).rglob("*.py")}:
        assert len(list(folder.glob("*.py"))) <= LARGEST_FOLDER, folder.name


def test_the_house_does_not_grow() -> None:
    """Size is a budget: a line is added where a reader would miss it."""
    assert sum(len((ROOT / name).read_text("utf-8").splitlines()) for name in SOURCES) <= LINES
    assets = (ROOT / "engine" / "compare" / "report" / "assets").glob("*.*")
    assert sum(len(path.read_text("utf-8").splitlines()) for path in assets) <= SCRIPT_LINES


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh Python has loaded after `code`."""
    script = f"import contextlib, io, sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("module", [*COMMANDS, *MODULES])
def test_help_needs_no_torch(module: str) -> None:
    """So that it prints at once."""
    loaded = loaded_after(
        f"from {module} import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['--help'])"
    )
    assert not loaded & {"torch", "matplotlib"}


def test_the_predictor_needs_neither_plots_nor_the_training_loader() -> None:
    loaded = loaded_after("from engine.predict.predictor import Predictor")
    assert not loaded & {"matplotlib", "data.loading.loader"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_wildcards_no_path_editing_no_code_from_data(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{name}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert dotted(node) != "sys.path", f"{name}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in RUNS_CODE, f"{name}:{node.lineno} calls {called}"
            assert called != "os.system", f"{name}:{node.lineno}"
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                wrong = (keyword.arg, value) in {
                    ("shell", True),
                    ("weights_only", False),
                    ("allow_pickle", True),
                }
                assert not wrong, f"{name}:{node.lineno} {keyword.arg}={value}"


@pytest.mark.parametrize("name", SOURCES)
def test_no_unpickling(name: str) -> None:
    module = tree(name)
    unsafe = {target.split(".")[0] for target in imported(module)} & UNSAFE_LOADERS
    assert unsafe == ({"pickle"} if name == MAY_IMPORT_PICKLE else set())
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and dotted(node.func) == "torch.load":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            flag = given.get("weights_only")
            assert isinstance(flag, ast.Constant), f"{name}:{node.lineno}"
            assert flag.value is True, f"{name}:{node.lineno}"
        if isinstance(node, ast.Call) and dotted(node.func).startswith("yaml."):
            assert dotted(node.func) in {"yaml.SafeLoader", "yaml.safe_load", "yaml.safe_dump"}, (
                f"{name}:{node.lineno} {dotted(node.func)}"
            )


@pytest.mark.parametrize("name", SOURCES)
def test_files_stay_short(name: str) -> None:
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{name} has {lines} lines: it is two things"


@pytest.mark.parametrize("name", SOURCES)
def test_importing_has_no_effect(name: str) -> None:
    """A module's body defines; it neither prints nor sets global states."""
    for node in tree(name).body:
        if isinstance(node, ast.Expr):
            text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
            assert text, f"{name}:{node.lineno} runs at import"
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            assert test in {"__name__ == '__main__'", "TYPE_CHECKING"}, f"{name}:{node.lineno}"
        assert not isinstance(node, ast.For | ast.While | ast.With | ast.Delete), (
            f"{name}:{node.lineno}"
        )


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_wiring(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [item for item in ast.walk(node) if isinstance(item, ast.FunctionDef)]
            assert inner == [node], f"{name}:{node.lineno} {node.name} has a nested function"
        assert not isinstance(node, ast.For | ast.While) or len(node.body) <= 5, (
            f"{name}:{node.lineno}: a long loop belongs in engine/"
        )


def test_nothing_is_left_half_done() -> None:
    pattern = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
    found = [
        f"{name}:{number}"
        for name in SOURCES
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_every_dependency_has_its_reason() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for file in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            name = re.match(r"[A-Za-z][\w-]*", line)
            if name:
                assert f"`{name[0]}`" in text, f"{file}: {name[0]} is not in docs/architecture.md"

"""`import featherdet`: the command lines from a program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import featherdet
from utils.errors import UserError


@pytest.fixture(scope="module")
def run(rectangles: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory):
    return featherdet.train(
        data=rectangles,
        cfg=tiny_model,
        img=64,
        batch=4,
        epochs=2,
        workers=0,
        device="cpu",
        cache=None,  # the default
        cos_lr=False,
        noplots=True,
        project=tmp_path_factory.mktemp("runs"),
        name="mine",
    )


def test_a_run_and_what_it_gives(run) -> None:
    assert run.folder.name == "mine"
    assert (run.best.name, run.last.parent) == ("best.pt", run.best.parent)
    assert run.best.is_file()
    assert [row["epoch"] for row in run.rows] == [0, 1]
    found = featherdet.evaluate(run.best, workers=0, noplots=True, project=run.folder, device="cpu")
    assert found is not None
    assert found.map == run.metrics.map  # the same data and size
    model = featherdet.load_model(run.best, device="cpu")
    assert not model.training
    assert [level.shape[:4] for level in model(torch.zeros(1, 3, 64, 64))] == [
        (1, 3, 8, 8),
        (1, 3, 4, 4),
        (1, 3, 2, 2),
    ]
    result = featherdet.Predictor(run.best, conf=0.0)(np.zeros((64, 64, 3), np.uint8))
    assert result.names == ("red", "green", "blue")
    assert featherdet.UserError is UserError
    assert "Predictor" in featherdet.__all__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "unknown argument '--epoch=3'; did you mean '--epochs'"),
        ({"epochs": "many"}, "argument --epochs: invalid int value: 'many'"),
        ({"cache": False}, "argument --cache: invalid choice: 'False'"),
        ({"cos_lr": "yes"}, "argument --cos-lr: ignored explicit argument 'yes'"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"data": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ],
)
def test_what_a_user_can_fix_is_a_user_error(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        featherdet.train(**settings)
    assert str(caught.value).startswith(message)


def test_commands_without_data_raise_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing.pt"):
        featherdet.evaluate(tmp_path / "missing.pt")
    with pytest.raises(UserError, match="nothing to compare"):
        featherdet.compare()
    with pytest.raises(UserError, match="--include: invalid choice: 'tensorrt'"):
        featherdet.export("a.pt", include=["tensorrt"])
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        featherdet.fit  # noqa: B018


def test_importing_is_cheap_and_a_foreign_package_of_our_name_is_named(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").touch()
    code = (
        "import sys, featherdet\nassert not {'torch', 'numpy', 'cv2'} & set(sys.modules)\n"
        "try:\n    featherdet.Predictor\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == (
        f"FeatherDet's package 'utils' is hidden by {tmp_path / 'utils' / '__init__.py'}: models,"
        " data, utils, engine and cfg are top-level names; rename yours\n"
    )


def test_the_examples_of_the_docs(
    root: Path, rectangles: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (root / "docs" / "python-api.md").read_text(encoding="utf-8")
    first, callbacks, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    small = f'data={str(rectangles)!r}, cfg={str(tiny_model)!r}, img=64, batch=4, epochs=1, device="cpu", workers=0, noplots=True'
    first = first.replace('data="mine.yaml", cfg="yolov5n", img=640, epochs=50', small)
    first = first.replace("evaluate(run.best)", "evaluate(run.best, workers=0, noplots=True)")
    first = first.replace("image.jpg", str(rectangles.parent / "val" / "0.png"))
    names: dict[str, Any] = {}
    exec(
        compile(first + callbacks.replace('data="mine.yaml"', small), "python-api.md", "exec"),
        names,
    )
    assert names["metrics"].map == names["run"].metrics.map
    assert (tmp_path / "runs" / "train" / "exp2").is_dir()
    with pytest.raises(RuntimeError, match="pruned"):
        names["Prune"]().on_epoch_end(None, {"epoch": 9, "metrics/mAP_0.5": 0.05})

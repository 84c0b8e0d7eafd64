from contextlib import ExitStack

import pytest

from engine import distributed
from engine.train.model import MAX_BATCH, batch_on_line
from engine.train.setup import prepare_run


@pytest.mark.parametrize(
    ("used", "budget", "expected"),
    [
        ({1: 200, 2: 300, 4: 500}, 450, 3),  # 100 + 100 per image
        ({1: 200, 2: 300, 4: 500}, 900, 8),
        ({1: 200, 2: 300}, 10**6, 4),  # not further than measured is believed
        ({1: 200}, 100, 0),
        ({1: 200}, 300, 1),
        ({}, 100, 0),
        ({512: 1000, 1024: 2000}, 10**9, MAX_BATCH),
    ],
)
def test_batch_on_the_line_of_memory(used, budget, expected):
    assert batch_on_line(used, budget) == expected


def test_anchors_of_a_recipe_are_found_for_the_data(settings, tmp_path, capsys):
    """YOLOv5's key `anchors`: so many of each level, whatever the model file has."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("anchors: 2.4\n")
    world = distributed.start("cpu")
    with ExitStack() as locks:
        run = prepare_run(settings("--hyp", recipe, "--noautoanchor"), world, locks)
    anchors = run.state.model.head.anchors
    assert anchors.shape[1] == 2
    assert run.state.model.spec.anchors == 2
    assert "anchors" in capsys.readouterr().out.lower()

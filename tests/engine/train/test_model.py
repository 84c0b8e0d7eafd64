import pytest

from engine.train.model import MAX_BATCH, batch_on_line


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

import json

import pytest


@pytest.fixture
def sample(root):
    """results.json of three rows without texts and columns, the test's own to change."""
    return json.loads((root / "tests/engine/compare/data_compare_sample.json").read_text())

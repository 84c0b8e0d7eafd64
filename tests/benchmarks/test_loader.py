from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from benchmarks import loader
from data.index.dataset import load_dataset_config, load_split
from utils.errors import FeatherDetError

QUICK = ("--img", "64", "--batch", "4", "--copies", "2", "--batches", "1", "--repeats", "1")
PEER = """
import sys
print("its own message", flush=True)
print("rate ready", flush=True)
for line in sys.stdin:
    print("rate", 0.5, flush=True)
"""


def test_the_rates_stand_next_to_the_peers(rectangles, monkeypatch, capsys):
    monkeypatch.setattr(loader, "PEER", PEER)
    loader.main(["--data", str(rectangles), *QUICK, "--peer", sys.executable])
    _, *lines = capsys.readouterr().out.splitlines()
    for line, cache in zip(lines[:2], ("none", "ram"), strict=True):
        own, ratio = re.fullmatch(
            rf"augment cpu +cache {cache} +own +([\d.]+)  peer +0\.5  ratio ([\d.]+)", line
        ).groups()
        assert float(ratio) == pytest.approx(float(own) / 0.5, rel=0.01)
    for line, cache in zip(lines[2:], ("none", "device"), strict=True):
        assert re.fullmatch(rf"augment device +cache {cache} +own +[\d.]+  ", line)


def test_a_peer_that_ends_is_an_error(rectangles, monkeypatch):
    monkeypatch.setattr(loader, "PEER", "")
    with pytest.raises(FeatherDetError, match="ended without an answer"):
        loader.main(["--data", str(rectangles), *QUICK, "--peer", sys.executable])


def test_copies_have_the_labels_of_the_images(rectangles, tmp_path):
    index = load_split(load_dataset_config(str(rectangles)), "train")
    copies, file = loader.copied(index, 2 * len(index), tmp_path)
    read = load_split(load_dataset_config(str(file)), "train")
    assert len(copies) == len(read) == 2 * len(index)
    for number, (copy, found) in enumerate(zip(copies.records, read.records, strict=True)):
        assert copy.path == found.path
        original = index.records[number % len(index)]
        assert copy.path.read_bytes() == original.path.read_bytes()
        np.testing.assert_allclose(found.boxes, original.boxes, atol=1e-3)
        np.testing.assert_array_equal(found.labels, original.labels)

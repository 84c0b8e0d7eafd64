import os

import pytest
import yaml

from utils.errors import UserError
from utils.files import locked, write_bytes, write_text, write_yaml


def test_files_are_written_completely(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    write_yaml(path, {"name": "exp", "freeze": ["1", "2"], "hyp": None})
    assert yaml.safe_load(path.read_text()) == {"name": "exp", "freeze": ["1", "2"], "hyp": None}
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_mix(tmp_path, monkeypatch):
    """The second one writes while the first flushes its file to the disk."""
    path, real = tmp_path / "a.bin", os.fsync

    def second(descriptor):
        monkeypatch.setattr(os, "fsync", real)
        write_bytes(path, b"second" * 100)
        assert path.read_bytes() == b"second" * 100

    monkeypatch.setattr(os, "fsync", second)
    write_bytes(path, b"first")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("present", [False, True])
def test_what_cannot_be_written_is_named_and_the_previous_file_stays(
    tmp_path, monkeypatch, present
):
    path = tmp_path / "a.txt"
    if present:
        path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    kept = "; the previous file is intact" if present else ""
    with pytest.raises(UserError) as caught:
        write_text(path, "new")
    assert str(caught.value) == f"{path}: could not be written (No space left on device){kept}"
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"] * present


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert list(tmp_path.iterdir()) == [tmp_path / ".lock"]

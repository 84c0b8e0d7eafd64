"""YAML as data: SafeLoader only, no duplicate keys, every value knows its line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

MAX_BYTES = 2**20  # of a file; PyYAML reads about 100 kB of numbers in a second
MAX_NODES = 100_000  # after expanding aliases; a model file has about 300


Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A parsed file: `data` in plain Python types, and lines by key path."""

    path: Path
    data: Any
    lines: dict[Key, int]

    def at(self, *key: str | int) -> str:
        """'file:line' of the value at `key`, or of the nearest parent that has a line."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"

    def mapping(self) -> dict[str, Any]:
        """The data as a mapping with text keys; UserError otherwise."""
        if not isinstance(self.data, dict):
            found = "nothing" if self.data is None else f"a {type(self.data).__name__}"
            raise UserError(f"{self.path}:1: expected 'key: value' lines, found {found}")
        return self.data


def load_yaml(path: Path) -> Document:
    """Read a YAML file as plain data. Raises UserError with file and line; runs nothing."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}: over {MAX_BYTES // 2**20} MiB; refused")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(path, None, {})
        lines: dict[Key, int] = {}
        _collect_lines(node, (), lines, path)
        return Document(path, loader.construct_document(node), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(f"{path}:{line}: not plain YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not plain YAML: {error}") from error


def _collect_lines(node: yaml.Node, key: Key, lines: dict[Key, int], path: Path) -> None:
    if len(lines) > MAX_NODES:
        raise UserError(f"{path}: over {MAX_NODES} values after expanding aliases; refused")
    lines[key] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, (*key, index), lines, path)
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, value in node.value:
            where = f"{path}:{name.start_mark.line + 1}"
            if not isinstance(name, yaml.ScalarNode):
                raise UserError(f"{where}: a key must be one word, not a list or a mapping")
            if name.value in seen:
                raise UserError(f"{where}: key {name.value!r} appears twice")
            seen.add(name.value)
            _collect_lines(value, (*key, str(name.value)), lines, path)

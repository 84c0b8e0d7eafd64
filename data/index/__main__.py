"""Decode every image of a data set: `python -m data.index --data NAME`.

The scan of a large data set reads headers and ends of files, which shows what was cut off. This
finds damage in between as well. Later runs leave out what it has found.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.index.dataset import load_dataset_config, load_split
from utils.config import option, parse
from utils.errors import PartlyDoneError, run_script


@dataclass(frozen=True)
class CheckConfig:
    """The command line of `python -m data.index`."""

    data: str = option(help="data set YAML, its folder, or a name in cfg/data")


def main(argv: list[str] | None = None) -> None:
    """Check all splits."""
    config = parse(CheckConfig, argv, prog="python -m data.index", description=__doc__ or "")
    dataset = load_dataset_config(config.data)
    skipped = sum(load_split(dataset, split, decode=True).skipped() for split in dataset.splits)
    if skipped:
        raise PartlyDoneError(f"images left out: {skipped}")


if __name__ == "__main__":
    run_script(main)

"""Convert annotations of other programs to a data set with a data.yaml, ready for train.py.

`python -m data.convert voc|coco|yolo|labelme SRC OUT`; SRC is never changed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.convert.indexed import read_coco_folder, read_yolo_folder
from data.convert.pairs import read_pairs
from data.convert.splits import Converted, cut, write_set
from utils.config import check_options, option, parse
from utils.errors import PartlyDoneError, UserError
from utils.terminal import say, warn

FORMATS = ("voc", "coco", "yolo", "labelme")
USAGE = f"python -m data.convert {'|'.join(FORMATS)} SRC OUT [options]"


@dataclass(frozen=True)
class ConvertConfig:
    """The command line of `python -m data.convert`; the first three are given without flags."""

    format: str = option(help="annotation format of SRC", choices=FORMATS)
    src: str = option(help="folder of images and annotations (coco: or the JSON file)")
    out: str = option(help="new folder for images, COCO JSON and data.yaml")
    val: float = option(
        0.2, help="share of the images for validation if SRC has no val split", min=0, max=0.9
    )
    seed: int = option(0, help="seed of the random split", min=0)
    link: bool = option(False, help="link to the images of SRC instead of copying them")
    classes: tuple[str, ...] = option(
        (), help="class names in order; default: those of SRC (voc, labelme: alphabetical)"
    )
    images: str = option("", help="folder of the images if they are not in SRC (not for yolo)")

    def __post_init__(self) -> None:
        check_options(self)
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"--classes: a name appears twice: {' '.join(self.classes)}")


def convert(config: ConvertConfig) -> Converted:
    """Read SRC and write OUT. Raises UserError for an OUT that is not empty and unusable input."""
    src, out = Path(config.src), Path(config.out)
    for path in (src, Path(config.images or src)):
        if not path.is_dir() and not (path.is_file() and path == src and config.format == "coco"):
            raise UserError(f"{path}: no such folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; remove it or choose another folder")
    if out.resolve().is_relative_to(src.resolve()):
        raise UserError(f"{out} is inside {src}, which is never changed; choose a folder elsewhere")
    if config.format in {"voc", "labelme"}:
        found = read_pairs(config.format, src, Path(config.images or src), config.classes)
    elif config.format == "yolo":
        if config.images:
            raise UserError(
                "--images: images and labels of YOLO exports are found in SRC itself; leave the"
                " flag out"
            )
        found = read_yolo_folder(src, config.classes)
    else:
        if config.classes:
            raise UserError("--classes: a COCO JSON brings its own class names; leave the flag out")
        found = read_coco_folder(src, Path(config.images) if config.images else None)
    if "val" not in found.splits:
        found = cut(found, config.val, config.seed)
    write_set(found, out, link=config.link)
    return found


def main(argv: list[str] | None = None) -> None:
    """`python -m data.convert voc|coco|yolo|labelme SRC OUT`."""
    given = argv or ["--help"]
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), given))
    if len(words) not in {0, 3} and not {"-h", "--help"} & {*given}:
        raise UserError(f"expected: {USAGE}")
    flags = zip(("--format", "--src", "--out"), words, strict=False)
    rest = given[len(words) :]
    config = parse(
        ConvertConfig,
        [*itertools.chain(*flags), *rest],
        prog="python -m data.convert",
        usage=USAGE,
        description=__doc__ or "",
    )
    found = convert(config)
    for split, records in found.splits.items():
        labels = Counter(int(n) for record in records for n in record.labels[~record.crowd])
        empty = sum(not len(record.labels) for record in records)
        crowds = sum(int(record.crowd.sum()) for record in records)
        boxes = f"{labels.total()} boxes, {empty} background" + (f", {crowds} crowd" * bool(crowds))
        say(f"{split}: {len(records)} images, {boxes}")
        counts = ", ".join(f"{name} {labels[i]}" for i, name in enumerate(found.names) if labels[i])
        say(f"  {counts}")
        if missing := [name for i, name in enumerate(found.names) if not labels[i]]:
            warn(f"warning: {split} has no box of {', '.join(missing)}")
    lowered = Counter(name.lower() for name in found.names)
    if alike := [name for name in found.names if lowered[name.lower()] > 1]:
        warn(f"warning: these class names differ only in case: {', '.join(alike)}")
    out = f'"{config.out}"' if " " in config.out else config.out
    say(f"wrote {config.out}/data.yaml; to train:\n  python train.py --data {out}")
    skipped = found.skipped
    if any(skipped):
        raise PartlyDoneError(
            f"skipped: {skipped[0]} images, {skipped[1]} boxes; the rest was converted; see"
            f" {config.out}/problems.txt"
        )

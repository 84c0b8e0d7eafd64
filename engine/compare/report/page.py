"""report.html: a comparison as one file that needs nothing else, not even a network.

The page is made in the browser from results.json, which is embedded in it; the scripts and styles
are those of assets/, and the file's own policy lets a browser run no others.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import cv2
import numpy as np

from engine.compare.schema import Boxes, Example

ASSETS = Path(__file__).parent / "assets"
LIBRARY = "uplot/uPlot.iife.min.js"
STYLES = ("uplot/uPlot.min.css", "report.css")
SCRIPTS = (
    "dom.js", "columns.js", "table.js", "pareto.js", "curves.js", "costs.js", "examples.js",
    "sections.js", "main.js",
)  # fmt: skip
LONGEST_SIDE = 640  # pixels of an example
QUALITY = 82  # of its JPEG
LEAST_SCORE = 0.05  # of an example's boxes; the page shows those from a threshold of its reader
BOX_DIGITS, SCORE_DIGITS = 1, 4


def write_report(
    results: Mapping[str, Any], folder: Path, *, examples: Sequence[Example] = ()
) -> Path:
    """Write `folder`/report.html from the record of a comparison (compare_schema.Results).

    examples: validation pictures with the boxes of each row, by its name.  The path is returned.
    ValueError for a figure that JSON has no word for (NaN, infinity).
    """
    path = folder / "report.html"
    path.write_text(page(results, examples), encoding="utf-8")
    return path


def page(results: Mapping[str, Any], examples: Sequence[Example] = ()) -> str:
    """The text of report.html."""
    library = _asset(LIBRARY)
    script = "\n".join(map(_asset, SCRIPTS))
    style = "\n".join(map(_asset, STYLES))
    heading = html.escape(_heading(results))
    return Template(_asset("template.html")).substitute(
        policy=_policy(scripts=(library, script), style=style),
        title=f"{heading} · FeatherDet",
        heading=heading,
        style=style,
        results=_embedded(results),
        examples=_embedded([_example(item) for item in examples]),
        library=library,
        script=script,
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _heading(results: Mapping[str, Any]) -> str:
    names = [row["name"] for row in results["rows"]]
    first = results["baseline"] or (names[0] if names else "no model")
    others = len(names) - 1
    title = f"{first} and {others} {'other' if others == 1 else 'others'}" if others > 0 else first
    data = (results["protocol"].get("data") or {}).get("name")
    return f"{title} on {data}" if data else title


def _policy(*, scripts: Sequence[str], style: str) -> str:
    """A Content-Security-Policy: these scripts and this style, embedded pictures, nothing else."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in: it has no '<', '>' or '&'."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _example(example: Example) -> dict[str, Any]:
    height, width = example.image.shape[:2]
    return {
        "name": example.name,
        "width": width,
        "height": height,
        "picture": _jpeg(example.image),
        "truth": _boxes(example.truth),
        "found": {name: _boxes(boxes) for name, boxes in example.found.items()},
    }


def _boxes(found: Boxes) -> dict[str, Any]:
    kept = np.ones(len(found.boxes), dtype=bool)
    if found.scores is not None:
        kept = found.scores >= LEAST_SCORE
    scores = None if found.scores is None else found.scores[kept]
    return {
        "boxes": _rounded(found.boxes[kept], BOX_DIGITS),
        "labels": found.labels[kept].tolist(),
        "scores": None if scores is None else _rounded(scores, SCORE_DIGITS),
    }


def _rounded(values: np.ndarray, digits: int) -> list[Any]:
    return np.asarray(values, dtype=np.float64).round(digits).tolist()


def _jpeg(image: np.ndarray) -> str:
    """RGB (H, W, 3) uint8 as a data URI, shrunk to LONGEST_SIDE."""
    shrink = min(LONGEST_SIDE / max(image.shape[:2]), 1.0)
    if shrink < 1:
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), options)
    if not done:
        raise ValueError(f"an example of shape {image.shape} cannot be written as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()

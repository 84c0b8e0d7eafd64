"""report.html: a comparison as one file that needs nothing else, not even a network.

The browser builds the page from results.json, which is embedded in it.  The scripts and styles are
those of assets/; the Content-Security-Policy of the file allows no others.
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

from engine.compare.report.examples import Example
from engine.evaluate.box_table import BoxTable

ASSETS = Path(__file__).parent / "assets"
LIBRARY = "uplot/uPlot.iife.min.js"
STYLES = ("uplot/uPlot.min.css", "report.css")
SCRIPTS = (
    "dom.js", "table.js", "pareto.js", "curves.js", "costs.js", "examples.js", "sections.js",
    "main.js",
)  # fmt: skip
MAX_SIDE = 640  # pixels of an example
JPEG_QUALITY = 82
MIN_SCORE = 0.05  # of the detections in an example; the page has a threshold above it
BOX_DIGITS, SCORE_DIGITS = 1, 4


def write_report(
    results: Mapping[str, Any], folder: Path, *, examples: Sequence[Example] = ()
) -> Path:
    """Write `folder`/report.html from results.json as `text.complete` gives it; return its path.

    examples: validation images with the boxes of each row.  ValueError for NaN and infinity, which
    JSON cannot hold.
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
    """A Content-Security-Policy: these scripts and this style, embedded images, nothing else."""
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(value: Any) -> str:
    """JSON without '<', '>' and '&', so that it cannot end the script element around it."""
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
        "image": _jpeg(example.image),
        "ground_truth": _boxes(example.ground_truth),
        "detections": {
            name: {
                **_boxes(found := table.take(table.scores >= MIN_SCORE)),
                "scores": _rounded(found.scores, SCORE_DIGITS),
            }
            for name, table in example.detections.items()
        },
    }


def _boxes(table: BoxTable) -> dict[str, Any]:
    return {"boxes": _rounded(table.boxes, BOX_DIGITS), "labels": table.labels.tolist()}


def _rounded(values: np.ndarray, digits: int) -> list[Any]:
    return np.asarray(values, dtype=np.float64).round(digits).tolist()


def _jpeg(image: np.ndarray) -> str:
    """RGB (H, W, 3) uint8 as a data URI, shrunk to MAX_SIDE."""
    shrink = min(MAX_SIDE / max(image.shape[:2]), 1.0)
    if shrink < 1:
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), options)
    if not done:
        raise ValueError(f"cannot write an example of shape {image.shape} as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()

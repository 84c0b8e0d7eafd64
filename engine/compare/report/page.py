"""report.html: a comparison as one file that needs nothing else, not even a network.

The browser builds the page from results.json, which is embedded in it.  The scripts and styles are
those of assets/; the Content-Security-Policy of the file allows no others.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import cv2
import numpy as np

from engine.compare.protocol import Splits
from engine.compare.report.tables import ModelRuns
from engine.evaluate.matching import BoxTable
from engine.evaluate.metrics import by_id, truth_of
from utils.images import ImageError, read_image

ASSETS = Path(__file__).parent / "assets"
LIBRARY = "uplot/uPlot.iife.min.js"
STYLES = ("uplot/uPlot.min.css", "report.css")
SCRIPTS = (
    "dom.js", "export.js", "table.js", "pareto.js", "curves.js", "costs.js", "examples.js",
    "sections.js", "main.js",
)  # fmt: skip
EXAMPLES = 6
MAX_SIDE = 640  # pixels of an example
JPEG_QUALITY = 82
MIN_SCORE = 0.05  # of the detections in an example; the page has a threshold above it
BOX_DIGITS, SCORE_DIGITS = 1, 4


def page(results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text of report.html, from results.json as `text.complete` gives it.

    examples: of `example`.  ValueError for NaN and infinity, which JSON cannot hold.
    """
    library = _asset(LIBRARY)
    script = "\n".join(map(_asset, SCRIPTS))
    style = "\n".join(map(_asset, STYLES))
    names = [row["name"] for row in results["rows"]]
    heading = results["baseline"] or (names[0] if names else "no model")
    if len(names) > 1:
        heading += f" and {len(names) - 1} {'other' if len(names) == 2 else 'others'}"
    if data := results["protocol"].get("data"):
        heading += f" on {data['name']}"
    heading = html.escape(heading)
    return Template(_asset("template.html")).substitute(
        policy=_policy(scripts=(library, script), style=style),
        title=f"{heading} · FeatherDet",
        heading=heading,
        style=style,
        results=_embedded(results),
        examples=_embedded(list(examples)),
        library=library,
        script=script,
    )


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _policy(*, scripts: Sequence[str], style: str) -> str:
    """A Content-Security-Policy: these scripts and this style, embedded images, nothing else."""
    digests = [hashlib.sha256(text.encode()).digest() for text in (style, *scripts)]
    styled, *allowed = [f"'sha256-{base64.b64encode(one).decode()}'" for one in digests]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src {styled}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _embedded(value: Any) -> str:
    """JSON without '<', '>' and '&', so that it cannot end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def example(
    name: str, image: np.ndarray, truth: BoxTable, detections: Mapping[str, BoxTable]
) -> dict[str, Any]:
    """What the page shows of an image, RGB (H, W, 3) uint8, shrunk to MAX_SIDE as a data URI.

    Boxes are in pixels of `image`; `detections` are by the name of the row.
    """

    def columns(table: BoxTable) -> dict[str, Any]:
        corners = table.boxes.astype(np.float64).round(BOX_DIGITS).tolist()
        return {"boxes": corners, "labels": table.labels.tolist()}

    found = {}
    for row, table in detections.items():
        kept = table.take(table.scores >= MIN_SCORE)
        scores = kept.scores.astype(np.float64).round(SCORE_DIGITS).tolist()
        found[row] = {**columns(kept), "scores": scores}
    height, width = image.shape[:2]
    shrink = min(MAX_SIDE / max(height, width), 1.0)
    small = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    data = cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), quality)[1].tobytes()
    return {
        "name": name,
        "width": width,
        "height": height,
        "image": "data:image/jpeg;base64," + base64.b64encode(data).decode(),
        "ground_truth": columns(truth),
        "detections": found,
    }


def examples(splits: Splits | None, models: Sequence[ModelRuns]) -> list[dict[str, Any]]:
    """Images spread evenly over those with boxes; detections of the first seed of each row.

    Empty without data or evaluated models.  An image that can no longer be read is left out.
    """
    detections = {
        item.entry.name: item.finished[0].detections() for item in models if item.finished
    }
    if splits is None or not detections:
        return []
    records = by_id(splits.evaluated)
    with_boxes = [index for index, record in enumerate(records) if not record.crowd.all()]
    chosen = np.linspace(0, len(with_boxes) - 1, min(EXAMPLES, len(with_boxes))).round().astype(int)
    found = []
    for index in (with_boxes[position] for position in chosen):
        path, truth = records[index].path, truth_of([records[index]])
        here = {name: table.take(table.image == index) for name, table in detections.items()}
        with contextlib.suppress(ImageError):
            found.append(example(path.name, read_image(path), truth.take(~truth.crowd), here))
    return found

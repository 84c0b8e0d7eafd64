"""report.html as text: one file, its record inside, nothing that a name could break out of."""

import base64
import hashlib
import json
import math
import re
from collections import defaultdict
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from engine.compare.report.columns import at
from engine.compare.report.page import ASSETS, MAX_SIDE, SCRIPTS, example, page
from engine.compare.report.text import complete
from engine.evaluate.matching import BoxTable

HOSTILE = "</script><img src=x onerror=alert(1)><!-- $heading ${title} & \u2028 é"
POLICY = "Content-Security-Policy"
FETCHING = {"src", "href", "srcset", "poster", "action", "formaction", "data", "background"}


class Elements(HTMLParser):
    """The tags with their attributes, and the texts of all elements by their id, else their tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], defaultdict(list), [""]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = self.texts[dict(attrs).get("id") or tag]
        self._open.append("")

    def handle_data(self, data):
        self._open[-1] += data

    def handle_endtag(self, tag):
        self._open = [""]


def embedded(text, what="results"):
    return json.loads(Elements(text).texts[f"{what}-json"][0])


@pytest.fixture
def results(sample):
    return complete(sample)


def shown(name="a.jpg", height=60, width=80):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = 250  # red
    boxes = np.array([[1.04, 2, 3, 4], [5, 6, 7, 8]])
    table = BoxTable.detections(np.zeros(2, int), np.array([0, 2]), boxes, np.array([0.9, 0.01]))
    return example(name, image, table.take(np.zeros(0, int)), {"m": table})


def test_the_file_holds_the_record_value_by_value(results):
    awkward = {"a": 0.1 + 0.2, "b": 1e-300, "c": 2**53 - 1, "d": HOSTILE}
    for protocol in (results["protocol"], awkward):
        record = {**results, "protocol": protocol}
        assert embedded(page(record)) == record
    for value in (math.nan, math.inf):  # JSON cannot hold them
        with pytest.raises(ValueError, match="JSON"):
            page({**results, "protocol": {"a": value}})


def test_hostile_names_add_no_element(results):
    bad = json.loads(json.dumps(results).replace("yolov5n-ghost", json.dumps(HOSTILE)[1:-1]))
    bad["baseline"] = bad["rows"][0]["name"] = bad["protocol"]["data"]["name"] = HOSTILE
    text = page(bad, [shown(HOSTILE)])
    plain, hostile = Elements(page(results, [shown()])), Elements(text)
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert embedded(text) == bad
    assert embedded(text, "examples")[0]["name"] == HOSTILE
    assert HOSTILE in hostile.texts["h1"][0]


def test_nothing_is_fetched(results):
    elements = Elements(page(results, [shown()]))
    for tag, attributes in elements.tags:
        for name in FETCHING & set(attributes):
            assert attributes[name].startswith(("data:", "#")), f"{tag} {name}={attributes[name]}"
    assert not re.search(r"url\(|@import|@font-face", "".join(elements.texts["style"]))
    asks = r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\("
    assert not re.search(asks, "".join(elements.texts["script"]))


def test_policy_names_the_very_scripts_and_styles_of_the_file(results):
    elements = Elements(page(results))
    policies = [had["content"] for _, had in elements.tags if had.get("http-equiv") == POLICY]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policies[0].split(";")}
    assert (rules["default-src"], rules["img-src"]) == (["'none'"], ["data:"])
    for kind, count in (("script", 2), ("style", 1)):
        digests = [hashlib.sha256(text.encode()).digest() for text in elements.texts[kind]]
        sums = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        assert rules[f"{kind}-src"] == sums
        assert len(sums) == count


def test_heading_names_the_models_and_the_data_set(results):
    alone = {**results, "rows": results["rows"][:1], "protocol": {}}
    none = {**results, "rows": [], "baseline": None, "protocol": {}}
    heads = [Elements(page(one)).texts["h1"] for one in (results, alone, none)]
    assert heads == [["yolov5n and 2 others on bccd"], ["yolov5n"], ["no model"]]


def test_examples_are_small_jpegs_with_boxes_in_their_own_pixels(results):
    large = shown("b.jpg", 1280, 640)
    first, second = embedded(page(results, [shown(), large]), "examples")
    assert (first["width"], first["height"]) == (80, 60)
    detected = {"boxes": [[1.0, 2.0, 3.0, 4.0]], "labels": [0], "scores": [0.9]}
    assert first["detections"] == {"m": detected}
    assert first["ground_truth"] == {"boxes": [], "labels": []}
    for item, shape in ((first, (60, 80)), (second, (MAX_SIDE, MAX_SIDE // 2))):
        kind, data = item["image"].split(",")
        assert kind == "data:image/jpeg;base64"
        pixels = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape[:2] == shape
        assert pixels[5, 5, 2] > 240  # BGR: red stays red
        assert pixels[5, 5, 0] < 15
    assert (second["width"], second["height"]) == (640, 1280)  # boxes are in these


def test_every_asset_is_used_and_the_library_is_what_its_note_says():
    note = (ASSETS / "uplot/README.md").read_text()
    sums = dict(re.findall(r"\| (\S+) \| \S+ \| ([0-9a-f]{64}) \|", note))
    assert set(sums) == {path.name for path in (ASSETS / "uplot").iterdir()} - {"README.md"}
    for name, digest in sums.items():
        assert hashlib.sha256((ASSETS / "uplot" / name).read_bytes()).hexdigest() == digest
    assert "MIT" in (ASSETS / "uplot/LICENSE").read_text()
    version = re.search(r"# uPlot ([\d.]+)", note)[1]
    assert f"(v{version})" in (ASSETS / "uplot/uPlot.iife.min.js").read_text()[:100]
    assert {path.name for path in ASSETS.glob("*.js")} == set(SCRIPTS)
    for path in ASSETS.rglob("*.js"):  # none can end its script element early
        assert not re.search("</script|<!--", path.read_text(), re.IGNORECASE)


def numbers(record, path):
    """The paths of all numbers of a part of a row; of a Spread or Difference its own."""
    if isinstance(record, dict) and not {"mean", "low"} & set(record):
        for key in set(record) - {"image_size", "classes", "batch", "epochs", "layers", "counts"}:
            yield from numbers(record[key], f"{path}.{key}")
    elif isinstance(record, list):
        for index, value in enumerate(record):
            yield from numbers(value, f"{path}.{index}")
    elif isinstance(record, dict | int | float):
        yield path


def test_every_number_of_a_row_has_a_cell_that_shows_it(results):
    columns = {column["path"]: column for column in results["columns"]}
    parts = ("accuracy", "classes", "difference", "errors", "cost", "latency", "energy", "training")
    for index, row in enumerate(results["rows"]):
        known = {path for part in parts for path in numbers(row[part], part)}
        known = {
            path for path in known if not path.endswith((".instances", ".ap50", ".other_p50_ms"))
        }
        assert known <= set(columns)
        for path, column in columns.items():
            cell, found = column["cells"][index], at(row, path)
            value = found.get("mean", found.get("delta")) if isinstance(found, dict) else found
            assert cell["value"] == value
            text, share = cell["text"].removesuffix("%"), 0.01 if cell["text"].endswith("%") else 1
            if value is None:
                assert text in {"not measured", "not defined", "not trained", "failed", "baseline"}
            elif column["format"] != "duration":  # rounded to the last decimal
                last = 0.5000001 * share * 10.0 ** -len(text.partition(".")[2])
                assert float(text) * share == pytest.approx(value / column["scale"], abs=last)

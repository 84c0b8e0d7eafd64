"""report.html as text: one file, its record inside, nothing that a name could break out of."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from engine.compare.report.page import ASSETS, LONGEST_SIDE, SCRIPTS, page, write_report
from engine.compare.schema import Boxes, Example

HOSTILE = "</script><img src=x onerror=alert(1)><!-- $heading ${title} & \u2028 é"
FETCHING = {"src", "href", "srcset", "poster", "action", "formaction", "data", "background"}


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts, styles and the heading."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self._open = [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style", "h1", "title"):
            self._open = dict(attrs).get("id") or f"{tag}{sum(t == tag for t, _ in self.tags)}"

    def handle_data(self, data):
        if self._open:
            self.texts[self._open] = self.texts.get(self._open, "") + data

    def handle_endtag(self, tag):
        self._open = None


@pytest.fixture(scope="module")
def results(root):
    return json.loads((root / "tests/engine/compare/data_compare_sample.json").read_text())


def example(name="a.jpg", height=60, width=80):
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = 250  # red
    found = Boxes(
        np.array([[1.04, 2, 3, 4], [5, 6, 7, 8]]), np.array([0, 2]), np.array([0.9, 0.01])
    )
    return Example(name, image, Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), None), {"m": found})


def test_the_file_holds_the_record_value_by_value(results, tmp_path):
    path = write_report(results, tmp_path)
    assert path == tmp_path / "report.html"
    elements = Elements(path.read_text(encoding="utf-8"))
    assert json.loads(elements.texts["results-json"]) == results


def test_record_of_awkward_numbers_and_signs_comes_back(results):
    awkward = {**results, "protocol": {"a": 0.1 + 0.2, "b": 1e-300, "c": 2**53 - 1, "d": HOSTILE}}
    assert json.loads(Elements(page(awkward)).texts["results-json"]) == awkward


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_without_a_word_in_json_are_refused(results, value):
    with pytest.raises(ValueError, match="JSON"):
        page({**results, "protocol": {"a": value}})


def test_hostile_names_add_no_element(results):
    bad = json.loads(json.dumps(results).replace("yolov5n-ghost", "NAME"))
    text = json.dumps(bad).replace("NAME", json.dumps(HOSTILE)[1:-1])
    bad = json.loads(text)
    bad["baseline"] = bad["rows"][0]["name"] = HOSTILE
    bad["protocol"]["data"]["name"] = HOSTILE
    plain, hostile = Elements(page(results, [example()])), Elements(page(bad, [example(HOSTILE)]))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert json.loads(hostile.texts["results-json"]) == bad
    assert json.loads(hostile.texts["examples-json"])[0]["name"] == HOSTILE
    assert HOSTILE in hostile.texts["h11"]


def test_nothing_is_fetched(results):
    text = page(results, [example()])
    elements = Elements(text)
    for tag, attributes in elements.tags:
        for name in FETCHING & set(attributes):
            assert attributes[name].startswith(("data:", "#")), f"{tag} {name}={attributes[name]}"
    style = elements.texts["style1"]
    assert not re.search(r"url\(|@import|@font-face", style)
    scripts = "".join(text for name, text in elements.texts.items() if name.startswith("script"))
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(", scripts
    )


def test_policy_names_the_very_scripts_and_styles_of_the_file(results):
    elements = Elements(page(results))
    policy = next(
        attributes["content"]
        for tag, attributes in elements.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]

    def sums(kind):
        texts = [text for name, text in elements.texts.items() if re.fullmatch(rf"{kind}\d+", name)]
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]

    assert rules["script-src"] == sums("script")
    assert rules["style-src"] == sums("style")
    assert len(rules["script-src"]) == 2


def test_heading_says_who_is_compared_on_what(results):
    assert Elements(page(results)).texts["h11"] == "yolov5n and 2 others on bccd"
    alone = {**results, "rows": results["rows"][:1], "protocol": {}}
    assert Elements(page(alone)).texts["h11"] == "yolov5n"
    none = {**results, "rows": [], "baseline": None, "protocol": {}}
    assert Elements(page(none)).texts["h11"] == "no model"


def test_examples_are_small_jpegs_with_boxes_in_their_own_pixels(results):
    large = example("b.jpg", 1280, 640)
    first, second = json.loads(Elements(page(results, [example(), large])).texts["examples-json"])
    assert (first["width"], first["height"]) == (80, 60)
    assert first["found"]["m"] == {"boxes": [[1.0, 2.0, 3.0, 4.0]], "labels": [0], "scores": [0.9]}
    assert first["truth"] == {"boxes": [], "labels": [], "scores": None}
    for item, shape in ((first, (60, 80)), (second, (LONGEST_SIDE, LONGEST_SIDE // 2))):
        kind, data = item["picture"].split(",")
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


def test_no_script_can_be_ended_early_by_an_asset():
    for path in ASSETS.rglob("*.js"):
        assert "</script" not in path.read_text().lower()
        assert "<!--" not in path.read_text()

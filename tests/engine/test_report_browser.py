"""report.html in a real browser: headless Chromium, told what to do by the DevTools protocol.

Chrome DevTools Protocol over a pipe: JSON messages, each ended by a zero byte, on the file
descriptors 3 and 4 of the browser, so neither a port nor a driver program is needed.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.compare_schema import Boxes, Example
from engine.report import write_report

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 60  # for one answer of a browser on a busy machine
HOSTILE = '</script><img src=x onerror="window.harmed = 1"><!-- ${1} `'

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed (apt: chromium)"
)

LAUNCH = """
import os, sys
read, write = (os.dup(int(number)) for number in sys.argv[1:3])
os.dup2(read, 3)  # a copy is the lowest free number, so `write` is beyond 3
os.dup2(write, 4)
for number in (3, 4):
    os.set_inheritable(number, True)  # also where a copy was there already
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab of a browser; `asked` are the addresses it loaded, `complaints` its console."""

    def __init__(self, profile: Path):
        there, self._send = os.pipe()
        self._receive, back = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-extensions"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        command = [sys.executable, "-c", LAUNCH, str(there), str(back), BROWSER, *flags]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, pass_fds=(there, back), stdin=quiet, stdout=quiet, stderr=quiet
        )
        os.close(there)
        os.close(back)
        os.set_blocking(self._receive, False)
        self._rest, self._number, self._session = b"", 0, None
        self.asked, self.complaints, self._loaded = [], [], False
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(item["targetId"] for item in targets if item["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda item: item.get("id") == self._number, method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _until(self, wanted, what):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            for message in self._messages():
                self._note(message)
                if wanted(message):
                    return message
            if self._process.poll() is not None:
                raise RuntimeError(f"the browser ended with {self._process.returncode}")
            time.sleep(0.005)
        raise TimeoutError(f"the browser gave no answer to {what} in {SECONDS} s")

    def _messages(self):
        """The messages that came, one at a time: what follows the wanted one waits its turn."""
        while True:
            if b"\0" in self._rest:
                first, self._rest = self._rest.split(b"\0", 1)
                yield json.loads(first)
                continue
            try:
                part = os.read(self._receive, 1 << 20)
            except BlockingIOError:
                return
            if not part:
                return
            self._rest += part

    def _note(self, message):
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, path):
        self._loaded = False
        self.call("Page.navigate", url=path.as_uri())
        if not self._loaded:
            self._until(lambda _: self._loaded, "Page.navigate")
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, script):
        """The value of a JavaScript expression (of its promise)."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    def resize(self, width, height=900):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")

    def colours(self, scheme):
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")

    def key(self, name, code):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=name, code=name,
                windowsVirtualKeyCode=code, text="\r" if name == "Enter" else "",
            )  # fmt: skip

    def screenshot(self, path):
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self):
        self._session = None
        try:
            self.call("Browser.close")
            self._process.wait(timeout=20)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._send)
        os.close(self._receive)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def variant(row, name, *, ap, milliseconds, flops):
    copy = json.loads(json.dumps(row))
    copy["name"] = name
    copy["accuracy"]["AP"] = {"mean": ap, "sd": 0.01, "values": [ap - 0.005, ap + 0.005]}
    copy["latency"][0]["p50_ms"] = milliseconds
    copy["cost"]["flops"] = flops
    return copy


@pytest.fixture(scope="module")
def results(root):
    """The sample, and rows whose places are known: fast, slow, and beaten by all."""
    sample = json.loads((root / "tests/engine/data_compare_sample.json").read_text())
    model = sample["rows"][1]
    sample["rows"] += [
        variant(model, "fast", ap=0.3, milliseconds=5.0, flops=800_000_000),
        variant(model, "slow", ap=0.5, milliseconds=40.0, flops=900_000_000),
        variant(model, "beaten", ap=0.2, milliseconds=50.0, flops=990_000_000),
        {**variant(model, "costs only", ap=0.0, milliseconds=9.0, flops=1), "status": "profiled"},
    ]
    sample["rows"][4]["difference"]["AP"].update(delta=0.09, low=0.05, high=0.12)
    sample["rows"][-1].update(accuracy=None, classes=None, difference=None, errors=None)
    sample["rows"][-1].update(training=None, runs=[], seeds=[])
    return sample


def examples_of(results, name="a.jpg"):
    image = np.full((60, 80, 3), 128, dtype=np.uint8)
    boxes = np.array([[5.0, 5.0, 40.0, 40.0], [30.0, 20.0, 70.0, 55.0]])
    labels = np.array([0, 2])
    found = Boxes(boxes + 1, labels, np.array([0.9, 0.1]))
    by_name = {row["name"]: found for row in results["rows"] if row["accuracy"]}
    return [Example(name, image, Boxes(boxes, labels, None), by_name)]


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return write_report(results, folder, examples=examples_of(results))


@pytest.fixture
def opened(page, written):
    page.asked.clear()
    page.complaints.clear()
    page.colours("light")
    page.resize(1280)
    page.open(written)
    return page


NAMES_SHOWN = (
    "[...document.querySelectorAll('#results-table tbody .label')].map((n) => n.textContent)"
)
FRONT = "document.getElementById('pareto-front').textContent"
PATHS_TRUE_BUT_NOT_FIGURES = ("image_size", "classes", "batch", "epochs")


def at(record, path):
    for key in path.split("."):
        record = record[int(key)] if isinstance(record, list) else record[key]
    return record


def numbers(record, path=""):
    """The paths of all figures of a part of a row; of a Spread its mean."""
    if isinstance(record, dict) and "mean" in record:
        record = {"mean": record["mean"]}
    if isinstance(record, dict) and "delta" in record and "low" in record:
        record = {"delta": record["delta"]}
    if isinstance(record, dict):
        for key, value in record.items():
            if key not in (*PATHS_TRUE_BUT_NOT_FIGURES, "layers", "counts", "ap50"):
                yield from numbers(value, f"{path}.{key}")
    elif isinstance(record, list):
        for place, value in enumerate(record):
            yield from numbers(value, f"{path}.{place}")
    elif isinstance(record, (int, float)):
        yield path


def test_every_cell_is_the_record_s_figure_and_no_figure_is_missing(opened, results):
    cells = opened.run(
        """[...document.querySelectorAll('#results-table tbody tr')].flatMap((line) =>
            [...line.querySelectorAll('td')].map((cell) => ({
                row: Number(line.dataset.row), path: cell.dataset.path, value: cell.dataset.value,
                text: cell.querySelector('.figure-main').textContent,
                spread: cell.querySelector('.spread')?.textContent ?? '',
                unit: document.querySelector(`thead [data-key="${cell.dataset.key}"] .unit`)?.textContent ?? '',
            })))"""
    )
    scales = {"M": 1e6, "G": 1e9, "MB": 1e6, "%": 0.01, "min": 60}
    shown = set()
    for cell in cells:
        row = results["rows"][cell["row"]]
        if cell.get("path") is None:
            assert cell["text"] in {
                "not measured", "not defined", "not trained", "failed", "baseline",
            }  # fmt: skip
            continue
        shown.add((cell["row"], cell["path"]))
        value = at(row, cell["path"])
        assert float(cell["value"]) == value
        scale = scales.get(cell["unit"].split(",")[0], 1)
        assert_shows(cell["text"].rstrip("*"), value / scale, digits=3)
        holder = at(row, cell["path"].rpartition(".")[0])
        if cell["path"].endswith(".mean"):
            assert_shows(cell["spread"].strip(" ±"), holder["sd"] / scale)
        elif cell["path"].endswith(".delta") and "low" in holder:
            low, high = cell["spread"].strip(" []").split(", ")
            assert_shows(low, holder["low"])
            assert_shows(high, holder["high"])
            assert cell["text"].endswith("*") == holder["significant"]
    for place, row in enumerate(results["rows"]):
        for part in ("accuracy", "classes", "difference", "errors", "cost", "energy", "training"):
            for path in numbers(row[part], part):
                assert path.endswith(".instances") or (place, path) in shown
        for path in numbers(row["latency"], "latency"):
            assert (place, path) in shown


def assert_shows(text, value, *, digits=1):
    """`text` is `value`, rounded to its last decimal, with 3 decimals or so many digits."""
    plain = text.replace("\u2212", "-").replace(",", "")
    decimals = len(plain.partition(".")[2])
    assert abs(float(plain) - value) <= 0.5000001 * 10**-decimals
    assert decimals >= 3 or float(plain) == value or abs(value) >= 10 ** (digits - 1 - decimals)


def test_headings_sort_rows_and_absent_figures_come_last(opened, results):
    have = {r["name"]: r["accuracy"]["AP"]["mean"] for r in results["rows"] if r["accuracy"]}
    absent = [row["name"] for row in results["rows"] if not row["accuracy"]]
    falling = sorted(have, key=lambda name: -have[name])
    heading = "document.querySelector('thead [data-key=\"accuracy.AP\"]')"
    first = opened.run(NAMES_SHOWN)
    assert first == [row["name"] for row in results["rows"]]
    expected = [(falling, "descending"), (falling[::-1], "ascending"), (None, "none")]
    for order, said in expected:
        opened.run(f"{heading}.querySelector('button').click()")
        assert opened.run(NAMES_SHOWN) == (first if order is None else order + absent)
        assert opened.run(f"{heading}.getAttribute('aria-sort')") == said


def test_headings_sort_by_the_keyboard(opened, results):
    opened.run("document.querySelector('thead [data-key=\"cost.flops\"] button').focus()")
    opened.key("Enter", 13)
    flops = {r["name"]: r["cost"]["flops"] for r in results["rows"] if r["cost"]}
    assert opened.run(NAMES_SHOWN)[: len(flops)] == sorted(flops, key=flops.get)


def enter(page, identifier, value, event):
    page.run(
        f"""(() => {{ const node = document.getElementById('{identifier}');
            node.value = '{value}'; node.dispatchEvent(new Event('{event}')); }})()"""
    )
    page.run("new Promise((done) => setTimeout(done, 50))")


def test_rows_are_filtered_by_words_and_limits_in_table_and_chart(opened):
    enter(opened, "filter-words", "ghost cfg", "input")
    assert opened.run(NAMES_SHOWN) == ["yolov5n-ghost", "fast", "slow", "beaten", "costs only"]
    enter(opened, "filter-words", "nothing like this", "input")
    assert opened.run(NAMES_SHOWN) == []
    enter(opened, "filter-words", "", "input")
    enter(opened, "limit-key", "accuracy.AP", "change")
    enter(opened, "limit-value", "0.4", "input")
    opened.run("document.getElementById('limit-add').click()")
    assert opened.run(NAMES_SHOWN) == ["yolov5n", "slow"]
    assert "fast" not in opened.run(FRONT)
    opened.run("document.querySelector('.chips button').click()")
    assert len(opened.run(NAMES_SHOWN)) == 7
    assert "fast" in opened.run(FRONT)
    assert opened.complaints == []


def test_groups_of_columns_are_shown_and_hidden(opened):
    visible = "document.querySelector('thead [data-key=\"cost.backbone.macs\"]').checkVisibility()"
    assert not opened.run(visible)
    opened.run("document.querySelector('[data-columns=\"Cost by section\"]').click()")
    assert opened.run(visible)


def front_by_hand(results, x, y, signs):
    points = {}
    for row in results["rows"]:
        try:
            points[row["name"]] = (signs[0] * at(row, x), signs[1] * at(row, y))
        except (TypeError, IndexError):  # failed or not trained
            continue
    return {
        name
        for name, a in points.items()
        if not any(
            b[0] >= a[0] and b[1] >= a[1] and b != a for other, b in points.items() if other != name
        )
    }, len(points)


@pytest.mark.parametrize(
    ("x", "y", "paths", "signs"),
    [
        ("latency.1.p50_ms", "accuracy.AP", ("latency.0.p50_ms", "accuracy.AP.mean"), (-1, 1)),
        ("cost.flops", "accuracy.AP", ("cost.flops", "accuracy.AP.mean"), (-1, 1)),
        ("accuracy.AP", "cost.flops", ("accuracy.AP.mean", "cost.flops"), (1, -1)),
        ("cost.intensity", "cost.params", ("cost.intensity", "cost.params"), (1, -1)),
    ],
)
def test_chart_takes_the_axes_chosen_and_finds_the_front_anew(opened, results, x, y, paths, signs):
    enter(opened, "pareto-x", x, "change")
    enter(opened, "pareto-y", y, "change")
    plot = "document.getElementById('pareto-plot')"
    assert opened.run(f"[{plot}.dataset.x, {plot}.dataset.y]") == [x, y]
    front, points = front_by_hand(results, *paths, signs)
    said = opened.run(FRONT).removeprefix("On the front: ").split(", ")
    assert set(said) == front
    assert opened.run("document.querySelectorAll('.point').length") == points
    lines = opened.run("document.querySelector('.overlay .front').getAttribute('d')")
    assert lines.startswith("M")
    assert lines.count("L") == 2 * (len(front) - 1)
    assert opened.complaints == []


def test_known_front_and_its_turn(opened):
    enter(opened, "pareto-x", "latency.1.p50_ms", "change")
    enter(opened, "pareto-y", "accuracy.AP", "change")
    assert opened.run(FRONT) == "On the front: fast, yolov5n, slow"
    enter(opened, "pareto-y-better", "-1", "change")  # who asks for the lowest AP
    assert opened.run(FRONT) == "On the front: fast, beaten"


def test_points_stand_where_the_figures_are(opened, results):
    enter(opened, "pareto-x", "cost.flops", "change")
    places = opened.run(
        """[...document.querySelectorAll('.point')].map((point) =>
            [Number(point.dataset.row), parseFloat(point.style.left), parseFloat(point.style.top)])"""
    )
    rows = [results["rows"][index] for index, _, _ in places]
    xs = np.array([row["cost"]["flops"] for row in rows], dtype=float)
    ys = np.array([row["accuracy"]["AP"]["mean"] for row in rows])
    for values, pixels, sign in ((xs, [p[1] for p in places], 1), (ys, [p[2] for p in places], -1)):
        assert np.corrcoef(values, pixels)[0, 1] == pytest.approx(sign, abs=1e-6)
    assert opened.run("document.querySelectorAll('.overlay .error').length") == len(places)
    opened.run("document.getElementById('pareto-errors').click()")
    opened.run("new Promise((done) => setTimeout(done, 50))")
    assert opened.run("document.querySelectorAll('.overlay .error').length") == 0


def test_pointer_shows_a_point_and_a_click_its_row(opened):
    opened.run("document.getElementById('pareto').scrollIntoView({behavior: 'instant'})")
    spot = opened.run(
        """(() => { const box = document.querySelector('.point[data-row="4"]').getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; })()"""
    )
    mouse = {"x": spot[0], "y": spot[1], "button": "left", "clickCount": 1}
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=spot[0], y=spot[1])
    tip = opened.run("document.querySelector('.tip:not([hidden])').innerText")
    assert tip.startswith("slow")
    assert "0.500 ± 0.010" in tip
    opened.call("Input.dispatchMouseEvent", type="mousePressed", **mouse)
    opened.call("Input.dispatchMouseEvent", type="mouseReleased", **mouse)
    card = opened.run("document.getElementById('pareto-card').innerText")
    assert card.startswith("slow")
    assert "0.500 ± 0.010" in card
    assert opened.run("document.querySelector('tr.selected').dataset.row") == "4"


def test_curves_layers_errors_and_examples_show_the_record(opened, results):
    names = opened.run("[...document.getElementById('curves-name').options].map((o) => o.value)")
    assert names == [key for key in results["rows"][0]["runs"][0]["curves"] if key != "epoch"]
    enter(opened, "curves-name", "train/box_loss", "change")
    assert "train/box_loss" in opened.run("document.getElementById('curves-plot').ariaLabel")
    layers = results["rows"][1]["cost"]["layers"]
    enter(opened, "layer-model", "1", "change")
    lines = "[...document.querySelectorAll('#%s tbody tr')].map((line) => line.innerText)"
    shown = opened.run(lines % "layer-table")
    assert len(shown) == len(layers)
    for text, layer in zip(shown, layers, strict=True):
        assert layer["block"] in text
        assert layer["bound"] is None or layer["bound"] in text
    enter(opened, "layer-kind", "blocks", "change")
    assert len(opened.run(lines % "block-table")) == len(results["rows"][1]["blocks"])
    errors = opened.run(lines % "error-table")
    assert len(errors) == sum(row["errors"] is not None for row in results["rows"])
    for value in results["rows"][0]["errors"]["delta"].values():
        assert f"{value:.3f}" in errors[0]
    boxes = "[...document.querySelectorAll('#example-strip svg.picture, #example-strip > figure > svg')].map((s) => s.querySelectorAll('g').length)"
    found = sum(row["accuracy"] is not None for row in results["rows"])
    assert opened.run(boxes) == [2] + [1] * found  # at 0.25 one of the two scores stays out
    enter(opened, "example-confidence", "0.05", "input")
    assert opened.run(boxes) == [2] + [2] * found
    assert opened.complaints == []


def test_protocol_and_commands_are_the_record_s(opened, results):
    shown = opened.run(
        """Object.fromEntries([...document.querySelectorAll('#protocol-tables td')].map((cell) =>
            [cell.closest('table').dataset.protocol + '.' + cell.dataset.path, cell.textContent]))"""
    )
    assert shown["training.hyp.momentum"] == str(results["protocol"]["training"]["hyp"]["momentum"])
    assert shown["general.seeds"] == "0, 1"
    assert shown["data.val"] == results["protocol"]["data"]["val"]
    assert shown["measurement.roof.ridge"] == "5"
    commands = opened.run(
        "[...document.querySelectorAll('.command code')].map((c) => c.textContent)"
    )
    runs = [[run["command"] for run in row["runs"]] for row in results["rows"] if row["runs"]]
    assert commands == [results["command"], *("\n".join(lines) for lines in runs)]


def test_copy_button_copies_the_command(opened, results):
    opened.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    opened.run("document.querySelector('.command .copy').click()")
    opened.run("new Promise((done) => setTimeout(done, 200))")
    assert opened.run("document.querySelector('.command .copy').textContent") == "Copied"
    assert opened.run("navigator.clipboard.readText()") == results["command"]


def test_nothing_is_loaded_but_the_file_and_nothing_complains(opened, written):
    for width in (1280, 400):
        opened.resize(width)
    assert opened.asked[0] == written.as_uri()
    assert all(address.startswith(("data:", written.as_uri())) for address in opened.asked)
    assert opened.complaints == []


def test_the_page_s_policy_refuses_other_scripts_and_requests(opened):
    opened.run(
        """(() => { const script = document.createElement('script');
            script.textContent = 'window.harmed = 1'; document.body.append(script); })()"""
    )
    assert opened.run("window.harmed ?? null") is None
    assert (
        opened.run("fetch('data:text/plain,x').then(() => 'loaded', () => 'refused')") == "refused"
    )
    assert any("Content Security Policy" in text for text in opened.complaints)


CONTRAST = """
((selectors) => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
  const light = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const part = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [paper, ...selectors.map((selector) => {
    const ink = light(getComputedStyle(document.querySelector(selector)).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  })];
})(['body', '.lead', '.caption', '.status', '.cause', '.absent', '.contents a', '.better .figure-main', '.worse .figure-main'])
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll('body *')]
  .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
  .filter((node) => node.checkVisibility() && !node.closest('svg, script, .hidden-text'))
  .map((node) => parseFloat(getComputedStyle(node).fontSize)))
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_readable(opened, width, scheme):
    opened.colours(scheme)
    opened.resize(width)
    wide, window = opened.run(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= window
    assert opened.run(SMALLEST) >= 11  # CSS pixels
    paper, *contrasts = opened.run(CONTRAST)
    assert paper > 0.9 if scheme == "light" else paper < 0.05
    assert min(contrasts) >= 4.5  # WCAG 2, level AA
    plot = "document.querySelector('#pareto-plot canvas').getBoundingClientRect()"
    assert opened.run(f"{plot}.right") <= window
    assert opened.complaints == []


def test_colours_can_be_chosen(opened):
    paper = "getComputedStyle(document.body).backgroundColor"
    before = opened.run(paper)
    for _ in range(2):  # light, dark
        opened.run("document.getElementById('theme').click()")
    assert opened.run(paper) != before
    assert opened.complaints == []


def test_paper_has_a_table_for_each_group_of_columns(opened, results):
    names, groups = (
        len(results["rows"]),
        "document.querySelectorAll('[data-columns]:checked').length",
    )
    opened.run("dispatchEvent(new Event('beforeprint'))")
    tables = opened.run(
        """[...document.querySelectorAll('.on-paper table')].map((table) =>
            [table.querySelectorAll('tbody .label').length, table.querySelectorAll('tbody td').length])"""
    )
    assert len(tables) == opened.run(groups)
    assert all(labels == names and cells >= names for labels, cells in tables)
    opened.run("dispatchEvent(new Event('afterprint'))")
    assert opened.run("document.querySelectorAll('.on-paper table').length") == 0
    assert opened.complaints == []


def test_hostile_names_stay_text(page, results, tmp_path):
    page.asked.clear()
    page.complaints.clear()
    bad = json.loads(json.dumps(results))
    bad["command"] = bad["protocol"]["data"]["name"] = HOSTILE
    bad["protocol"]["data"]["classes"] = [HOSTILE, HOSTILE, HOSTILE]
    bad["protocol"][HOSTILE] = {HOSTILE: HOSTILE}
    for number, row in enumerate(bad["rows"]):
        row["name"] = f"{HOSTILE}{number}"
        row["cause"] = row["model"]["source"] = HOSTILE
        row["model"]["notes"] = [HOSTILE]
        for run in row["runs"]:
            run["command"] = HOSTILE
            run["curves"] = {**run["curves"], HOSTILE: run["curves"].get("epoch", [])}
        for layer in (row["cost"] or {"layers": []})["layers"]:
            layer["block"] = layer["name"] = HOSTILE
        for item in row["classes"] or []:
            item["name"] = HOSTILE
    bad["baseline"] = bad["rows"][0]["name"]
    page.open(write_report(bad, tmp_path, examples=examples_of(bad, HOSTILE)))
    assert page.run(NAMES_SHOWN) == [row["name"] for row in bad["rows"]]
    assert HOSTILE in page.run("document.querySelector('h1').textContent")
    assert page.run("document.querySelectorAll('img').length") == 0
    page.resize(400)
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.run("window.harmed ?? null") is None
    assert page.complaints == []
    assert all(address.startswith(("data:", "file:")) for address in page.asked)


SAID = "document.getElementById('standfirst').textContent"
FACT = """Object.fromEntries([...document.querySelectorAll('#facts div')].map((item) =>
    [item.querySelector('dt').textContent, item.querySelector('dd').textContent]))"""


def test_code_and_place_of_the_runs_are_said_as_they_are(opened, results, tmp_path):
    assert opened.run(SAID).endswith("under one protocol on one kind of device.")
    assert opened.run(FACT)["Code"] == "0123456789ab"
    assert "runs on" not in opened.run(FACT)["Device"]
    other = json.loads(json.dumps(results))
    other["protocol"]["device"] = {"name": "NVIDIA H100", "threads": None}
    other["rows"][0]["runs"][0]["environment"]["commit"] = "f" * 40 + "-dirty"
    opened.open(write_report(other, tmp_path))
    said = "runs on NVIDIA H100, costs measured on cpu (x86_64), 2 threads."
    assert opened.run(SAID).endswith(said)
    code = opened.run(FACT)["Code"]
    assert code.startswith("ffffffffffff-dirty, 0123456789ab")
    assert "warning: 2 commits in one table; warning: uncommitted changes" in code
    assert "runs on NVIDIA H100" in opened.run(FACT)["Device"]


def test_energy_says_its_batch(opened, results, tmp_path):
    spent = json.loads(json.dumps(results))
    watts = {"joules_per_image": 0.5, "watts": 9.0, "batch": 32, "source": "x"}
    spent["rows"][0]["energy"] = watts
    opened.open(write_report(spent, tmp_path))
    names = opened.run(
        "[...document.querySelectorAll('#pareto-x option')].map((item) => item.textContent)"
    )
    assert "Energy at batch 32, J/image" in names


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_or_failed_comparison_is_a_page_too(page, results, tmp_path, rows):
    page.complaints.clear()
    poor = json.loads(json.dumps(results))
    poor["rows"] = [dict(poor["rows"][2], cost=None)][:rows]
    poor.update(baseline=None, measurement=None, protocol={"kind": "train"})
    page.open(write_report(poor, tmp_path))
    assert len(page.run(NAMES_SHOWN)) == rows
    assert page.complaints == []

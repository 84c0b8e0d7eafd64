"""report.html in a real browser: headless Chromium, driven by Selenium."""

import copy
import json
import shutil

import numpy as np
import pytest

from engine.compare.report import page as report
from engine.compare.report.text import complete
from engine.evaluate.matching import BoxTable

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "headless=new no-sandbox disable-gpu disable-dev-shm-usage disable-sync"
    " disable-background-networking disable-component-update"
)


class Page:
    """One tab of a browser."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1280, scheme="light"):
        """The report at a width and in a colour scheme, with the logs empty before."""
        self.resize(width)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get("about:blank")
        self.complaints(), self.asked()
        self.driver.get(path.as_uri())
        self.settle()

    def settle(self):
        """Wait until what has changed is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

    def run(self, expression, *arguments):
        """The value of a JavaScript expression, or of its promise."""
        return self.driver.execute_script(f"return ({expression.strip()})", *arguments)

    def resize(self, width):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.settle()

    def find(self, selector):
        """An element, scrolled to the middle, where the mouse reaches it."""
        node = self.driver.find_element("css selector", selector)
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", node)
        return node

    def click(self, selector):
        self.find(selector).click()
        self.settle()

    def enter(self, identifier, value, event="change"):
        """Put a value into a field or a select, as a reader does."""
        node = self.find(f"#{identifier}")
        self.run("arguments[0].value = arguments[1]", node, value)
        self.run("arguments[0].dispatchEvent(new Event(arguments[1]))", node, event)
        self.settle()

    def texts(self, selector):
        found = "[...document.querySelectorAll(arguments[0])].map((node) => node.textContent)"
        return self.run(found, selector)

    def models(self):
        """The names in the table of results, from top to bottom."""
        return self.texts("#results-table tbody .label")

    def front(self):
        return self.find("#pareto-front").text.removeprefix("Pareto front: ").split(", ")

    def complaints(self):
        """What the console has reported since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked(self):
        """The addresses requested since the last call."""
        log = self.driver.get_log("performance")
        events = [json.loads(entry["message"])["message"] for entry in log]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


@pytest.fixture(scope="session")
def page():
    """The browser's tab; skips where the browser, its driver or Selenium is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    program = shutil.which("chromedriver")
    if browser is None or program is None:
        pytest.skip("no chromium with chromedriver (Debian: chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=program)  # so that none is downloaded
    driver = webdriver.Chrome(options=options, service=service)
    yield Page(driver)
    driver.quit()


@pytest.fixture(scope="session")
def results(root):
    """The sample, and rows at known positions: fast, slow, and beaten by all."""
    sample = json.loads((root / "tests/engine/compare/data_compare_sample.json").read_text())
    for name, ap, milliseconds, flops in (
        ("fast", 0.3, 5.0, 800_000_000),
        ("slow", 0.5, 40.0, 900_000_000),
        ("beaten", 0.2, 50.0, 990_000_000),
        ("costs only", 0.0, 9.0, 1),
    ):
        row = copy.deepcopy(sample["rows"][1])
        row["name"], row["latency"][0]["p50_ms"], row["cost"]["flops"] = name, milliseconds, flops
        row["accuracy"]["AP"] = {"mean": ap, "sd": 0.01, "values": [ap - 0.005, ap + 0.005]}
        sample["rows"].append(row)
    sample["rows"][4]["difference"]["AP"].update(delta=0.09, low=0.05, high=0.12)
    untrained = dict.fromkeys(("accuracy", "classes", "difference", "errors", "training"))
    sample["rows"][-1].update(untrained, runs=[], seeds=[], status="profiled")
    return complete(sample)


def write(results, folder, *, image="a.jpg"):
    """The report of results, with one image: two ground-truth boxes, two detections per model."""
    boxes = np.array([[5.0, 5.0, 40.0, 40.0], [30.0, 20.0, 70.0, 55.0]])
    table = BoxTable.detections(np.zeros(2, int), np.array([0, 2]), boxes, np.array([0.9, 0.1]))
    found = {row["name"]: table for row in results["rows"] if row["accuracy"]}
    grey = np.full((60, 80, 3), 128, dtype=np.uint8)
    path = folder / "report.html"
    path.write_text(report.page(complete(results), [report.example(image, grey, table, found)]))
    return path


@pytest.fixture(scope="session")
def written(results, tmp_path_factory):
    """The path of the report of `results`."""
    return write(results, tmp_path_factory.mktemp("compare"))


@pytest.fixture
def opened(page, written):
    """The tab with the report opened anew; at the end the console must have stayed silent."""
    page.open(written)
    yield page
    assert page.complaints() == []

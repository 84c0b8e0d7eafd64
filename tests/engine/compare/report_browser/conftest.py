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

from engine.compare.report.page import write_report
from engine.compare.schema import Boxes, Example

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
SECONDS = 60  # for one answer of a browser on a busy machine

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

    def rows_shown(self):
        """The names in the table of results, from top to bottom."""
        labels = "document.querySelectorAll('#results-table tbody .label')"
        return self.run(f"[...{labels}].map((node) => node.textContent)")

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


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The browser's tab; skips where there is no browser."""
    if BROWSER is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (apt: chromium)")
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


@pytest.fixture(scope="session")
def results(root):
    """The sample, and rows whose places are known: fast, slow, and beaten by all."""
    sample = json.loads((root / "tests/engine/compare/data_compare_sample.json").read_text())
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


@pytest.fixture(scope="session")
def examples_of():
    """Of results, by a name: one picture with two true boxes, and two found by each model."""

    def make(results, name="a.jpg"):
        image = np.full((60, 80, 3), 128, dtype=np.uint8)
        boxes = np.array([[5.0, 5.0, 40.0, 40.0], [30.0, 20.0, 70.0, 55.0]])
        labels = np.array([0, 2])
        found = Boxes(boxes + 1, labels, np.array([0.9, 0.1]))
        by_name = {row["name"]: found for row in results["rows"] if row["accuracy"]}
        return [Example(name, image, Boxes(boxes, labels, None), by_name)]

    return make


@pytest.fixture(scope="session")
def written(results, examples_of, tmp_path_factory):
    """The report of `results`."""
    folder = tmp_path_factory.mktemp("compare")
    return write_report(results, folder, examples=examples_of(results))


@pytest.fixture
def opened(page, written):
    """The browser's tab, with the report opened anew in it."""
    page.asked.clear()
    page.complaints.clear()
    page.colours("light")
    page.resize(1280)
    page.open(written)
    return page

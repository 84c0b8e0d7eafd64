"""report.html in a browser: it fetches nothing, is readable everywhere, and names stay text."""

from copy import deepcopy

import pytest

from tests.engine.compare.report_browser.conftest import write

HOSTILE = '</script><img src=x onerror="window.harmed = 1"><!-- ${1} `'
WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
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
})(['body', '.lead', '.caption', '.status', '.cause', '.absent', '.contents a', '.u-legend td', '.better .main', '.worse .main'])
"""
SMALLEST = """
Math.min(...[...document.querySelectorAll('body *')]
  .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
  .filter((node) => node.checkVisibility() && !node.closest('svg, script, .hidden-text'))
  .map((node) => parseFloat(getComputedStyle(node).fontSize)))
"""


def test_nothing_is_loaded_but_the_file_and_nothing_complains(opened, written):
    opened.resize(400)
    asked = opened.asked()
    assert asked[0] == written.as_uri()
    assert all(address.startswith(("data:", written.as_uri())) for address in asked)


def test_the_policy_of_the_page_refuses_other_scripts_and_requests(opened):
    opened.run("document.body.append(document.createElement('script'))")
    opened.run("document.body.lastChild.append('window.harmed = 1')")
    assert opened.run("window.harmed ?? null") is None
    assert opened.run("fetch('data:text/plain,x').then(() => 'loaded', () => 0)") == 0
    assert any("Content Security Policy" in text for text in opened.complaints())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_readable(page, written, width, scheme):
    page.open(written, width=width, scheme=scheme)
    content, window = page.run(WIDTHS)
    assert content <= window
    assert page.run(SMALLEST) >= 11  # CSS pixels
    paper, *contrasts = page.run(CONTRAST)
    assert paper > 0.9 if scheme == "light" else paper < 0.05
    assert min(contrasts) >= 4.5  # WCAG 2, level AA
    assert page.complaints() == []


def test_colours_can_be_chosen_and_paper_has_a_table_for_each_group_of_columns(opened, results):
    colours = []
    for theme in ("system", "light", "dark"):
        assert opened.find("#theme").text == f"Colours: {theme}"
        colours.append(opened.run("getComputedStyle(document.body).backgroundColor"))
        opened.click("#theme")
    assert colours[0] == colours[1] != colours[2]
    opened.run("dispatchEvent(new Event('beforeprint'))")
    assert len(opened.texts(".on-paper table")) == 1  # of the essential columns
    opened.run("dispatchEvent(new Event('afterprint'))")
    opened.click("#all-columns")
    groups = len(opened.texts("[data-columns]:checked"))
    opened.run("dispatchEvent(new Event('beforeprint'))")
    assert len(opened.texts(".on-paper table")) == groups
    assert len(opened.texts(".on-paper tbody .label")) == groups * len(results["rows"])
    opened.run("dispatchEvent(new Event('afterprint'))")
    assert opened.texts(".on-paper table") == []


def test_hostile_names_stay_text(page, results, tmp_path):
    bad = deepcopy(results)
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
    page.open(write(bad, tmp_path, image=HOSTILE), width=400)
    assert page.models() == [row["name"] for row in bad["rows"]]
    assert HOSTILE in page.find("h1").text
    assert page.texts("img") == []
    content, window = page.run(WIDTHS)
    assert content <= window
    assert page.run("window.harmed ?? null") is None
    assert page.complaints() == []
    assert all(address.startswith(("data:", "file:", "about:")) for address in page.asked())


@pytest.mark.parametrize("rows", [0, 1])
def test_an_empty_or_failed_comparison_is_a_page_too(page, results, tmp_path, rows):
    poor = deepcopy(results)
    poor["rows"] = [dict(poor["rows"][2], cost=None)][:rows]
    poor.update(baseline=None, measurement=None)
    page.open(write(poor, tmp_path))
    assert len(page.models()) == rows
    assert page.complaints() == []

"""report.html in a browser: it fetches nothing, is readable everywhere, and names stay text."""

import json

import pytest

from engine.compare.report.page import write_report

HOSTILE = '</script><img src=x onerror="window.harmed = 1"><!-- ${1} `'


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


def test_hostile_names_stay_text(page, results, examples_of, tmp_path):
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
    assert page.rows_shown() == [row["name"] for row in bad["rows"]]
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
    assert len(page.rows_shown()) == rows
    assert page.complaints == []

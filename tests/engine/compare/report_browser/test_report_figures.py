"""report.html in a browser: table and charts show the record and obey their reader."""

import csv
import time

import cv2
import numpy as np
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")


def test_every_cell_has_its_text_and_no_column_is_missing(opened, results):
    shown = opened.run(
        """[...document.querySelectorAll('#results-table tbody tr')].map((line) =>
            [...line.querySelectorAll('td')].map((cell) => [cell.dataset.path, cell.textContent]))"""
    )
    for index, line in enumerate(shown):
        cells = {column["path"]: column["cells"][index] for column in results["columns"]}
        texts = [[path, f"{one['text']} {one['spread']}".strip()] for path, one in cells.items()]
        assert line == [[path, text.replace("-", "\u2212")] for path, text in texts]
    assert opened.texts("thead [data-path='cost.flops'] .unit") == ["G"]
    assert opened.texts(".best[data-path='accuracy.AP']") == ["0.500 ± 0.010"]


def test_headings_sort_rows_by_mouse_and_keyboard_and_absent_numbers_come_last(opened, results):
    have = {r["name"]: r["accuracy"]["AP"]["mean"] for r in results["rows"] if r["accuracy"]}
    absent = [row["name"] for row in results["rows"] if not row["accuracy"]]
    falling = sorted(have, key=lambda name: -have[name])
    first = opened.models()
    assert first == [row["name"] for row in results["rows"]]
    heading = "thead [data-path='accuracy.AP']"
    for order, state in ((falling, "descending"), (falling[::-1], "ascending"), (None, "none")):
        opened.click(f"{heading} button")
        assert opened.models() == (first if order is None else order + absent)
        assert opened.find(heading).get_attribute("aria-sort") == state
    opened.find("thead [data-path='cost.flops'] button").send_keys(webdriver.Keys.ENTER)
    flops = {r["name"]: r["cost"]["flops"] for r in results["rows"] if r["cost"]}
    assert opened.models()[: len(flops)] == sorted(flops, key=flops.get)


def limit(opened, key, sign, value):
    opened.enter("limit-key", key)
    opened.enter("limit-sign", sign)
    opened.enter("limit-value", value, "input")
    opened.click("#limit-add")


def test_groups_of_columns_are_hidden_and_rows_filtered_in_table_and_chart(opened):
    heading = opened.find("thead [data-path='cost.backbone.macs']")
    displayed = "[...document.querySelectorAll('thead [data-path]')].filter((n) => n.checkVisibility()).map((n) => n.dataset.path)"
    essential = ["accuracy.AP", "difference.AP", "accuracy.AP50", "cost.params", "cost.flops"]
    essential += ["latency.0.p50_ms", "latency.1.p50_ms", "speedup.latency.0.factor"]
    assert opened.run(displayed) == ["name", *essential, "training.seconds"]
    spans = "[...document.querySelectorAll('#results-table thead tr:first-child th')].filter((n) => !n.hidden).map((n) => n.colSpan)"
    assert opened.run(spans) == [3, 2, 2, 1, 1]
    opened.click("#all-columns")
    assert "accuracy.APs" in opened.run(displayed)
    assert not heading.is_displayed()
    opened.click("[data-columns='Cost by section']")
    assert heading.is_displayed()
    ghosts = ["yolov5n-ghost", "fast", "slow", "beaten", "costs only"]
    for words, names in (("ghost cfg", ghosts), ("nothing like this", [])):
        opened.enter("filter-words", words, "input")
        assert opened.models() == names
    opened.enter("filter-words", "", "input")
    limit(opened, "cost.flops", "≤", "0.85")  # G, as shown
    assert "slow" not in opened.models()
    opened.click(".chips button")
    limit(opened, "accuracy.AP", "≥", "0.4")
    assert opened.models() == opened.front() == ["yolov5n", "slow"]
    opened.click(".chips button")
    assert opened.front() == ["fast", "yolov5n", "slow"]
    assert len(opened.models()) == 7


@pytest.mark.parametrize(
    ("x", "y", "front"),
    [
        ("latency.0.p50_ms", "accuracy.AP", ["fast", "yolov5n", "slow"]),
        ("accuracy.AP", "latency.0.p50_ms", ["fast", "yolov5n", "slow"]),
        ("cost.flops", "accuracy.AP", ["yolov5n-ghost", "slow"]),
        ("cost.flops", "latency.0.p50_ms", ["costs only", "fast"]),
    ],
)
def test_chart_takes_the_chosen_axes_and_their_front(opened, results, x, y, front):
    opened.enter("pareto-x", x)
    opened.enter("pareto-y", y)
    plot = opened.find("#pareto-plot")
    assert [plot.get_attribute(f"data-{axis}") for axis in "xy"] == [x, y]
    assert opened.front() == front
    absent = opened.find("#pareto-missing").text.count("(")
    assert len(opened.texts(".point")) + absent == len(results["rows"])


def test_points_are_where_the_numbers_are_a_drag_zooms_and_bars_can_be_hidden(opened, results):
    positions = """[...document.querySelectorAll('.point')].map((point) =>
        [Number(point.dataset.row), parseFloat(point.style.left), parseFloat(point.style.top)])"""
    opened.enter("pareto-x", "cost.flops")
    spots = opened.run(positions)
    rows, left, top = zip(*spots, strict=True)
    flops = [results["rows"][index]["cost"]["flops"] for index in rows]
    ap = [results["rows"][index]["accuracy"]["AP"]["mean"] for index in rows]
    assert np.corrcoef(flops, left)[0, 1] == pytest.approx(1, abs=1e-6)
    assert np.corrcoef(ap, top)[0, 1] == pytest.approx(-1, abs=1e-6)
    over = opened.find("#pareto-plot .u-over")
    width = over.size["width"]

    def mouse():
        actions = webdriver.ActionChains(opened.driver)
        return actions.move_to_element_with_offset(over, 2 - width // 2, 0)

    mouse().click_and_hold().move_by_offset(width // 2, 0).release().perform()
    opened.settle()
    assert 0 < len(opened.run(positions)) < len(spots)
    mouse().double_click().perform()
    opened.settle()
    assert opened.run(positions) == spots
    drawn = "document.querySelector('#pareto-plot canvas').toDataURL()"
    before = opened.run(drawn)
    opened.click("#pareto-errors")
    assert opened.run(drawn) != before  # without error bars


def test_a_point_shows_its_numbers_and_a_click_its_model(opened):
    point = opened.find(".point[data-row='4']")  # 'slow'
    webdriver.ActionChains(opened.driver).move_to_element(point).perform()
    tip = point.find_element("css selector", ".tip").text  # '' while it is hidden
    point.click()
    for text in (tip, opened.find("#pareto-card").text):
        assert text.startswith("slow")
        assert "0.500 ± 0.010" in text
    assert opened.find("tr.selected").get_attribute("data-row") == "4"


def test_curves_are_those_of_the_record_and_the_legend_hides_a_model(opened, results):
    names = opened.run("[...document.getElementById('curves-name').options].map((o) => o.value)")
    assert names == [key for key in results["rows"][0]["runs"][0]["curves"] if key != "epoch"]
    opened.enter("curves-name", "train/box_loss")
    assert "train/box_loss" in opened.find("#curves-plot").get_attribute("aria-label")
    last = [run["curves"]["train/box_loss"][-1] for run in results["rows"][0]["runs"]]
    assert opened.find(".u-legend .model .u-label").text == "yolov5n"
    shown = float(opened.find(".u-legend .model .u-value").text)
    assert shown == pytest.approx(np.mean(last), rel=5e-3)
    opened.find(".u-legend .model th").send_keys(webdriver.Keys.ENTER)
    assert len(opened.texts(".u-legend .u-off")) == len(last)  # all its seeds
    opened.click(".u-legend .model th")
    assert opened.texts(".u-legend .u-off") == []


def test_layers_errors_and_examples_show_the_record(opened, results):
    layers = results["rows"][1]["cost"]["layers"]
    opened.enter("layer-model", "1")
    shown = opened.texts("#layer-table tbody tr")
    assert len(shown) == len(layers)
    for text, layer in zip(shown, layers, strict=True):
        assert layer["block"] in text
        assert layer["bound"] is None or layer["bound"] in text
    opened.enter("layer-kind", "blocks")
    assert len(opened.texts("#block-table tbody tr")) == len(results["rows"][1]["blocks"])
    errors = opened.texts("#error-table tbody tr")
    assert len(errors) == sum(row["errors"] is not None for row in results["rows"])
    for value in results["rows"][0]["errors"]["delta"].values():
        assert f"{value:.3f}" in errors[0]
    count = "[...document.querySelectorAll('#example-strip > figure > svg')].map((s) => s.querySelectorAll('g').length)"
    models = sum(row["accuracy"] is not None for row in results["rows"])
    assert opened.run(count) == [2] + [1] * models  # one of the two scores is below 0.25
    opened.enter("example-confidence", "0.05", "input")
    assert opened.run(count) == [2] + [2] * models


def test_head_protocol_and_commands_are_those_of_the_record_and_can_be_copied(opened, results):
    assert opened.find("#lead").text == results["lead"]
    assert opened.texts("#facts dt") == [fact["name"] for fact in results["summary"]]
    shown = opened.run(
        """Object.fromEntries([...document.querySelectorAll('#protocol-tables td')].map((cell) =>
            [cell.closest('table').dataset.protocol + '.' + cell.dataset.path, cell.textContent]))"""
    )
    assert shown["training.hyp.momentum"] == str(results["protocol"]["training"]["hyp"]["momentum"])
    assert shown["general.seeds"] == "0, 1"
    assert shown["data.val"] == results["protocol"]["data"]["val"]
    runs = [[run["command"] for run in row["runs"]] for row in results["rows"] if row["runs"]]
    commands = [results["command"], *("\n".join(lines) for lines in runs)]
    assert opened.texts(".command code") == commands
    granted = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    opened.driver.execute_cdp_cmd("Browser.grantPermissions", granted)
    opened.click(".command .copy")
    assert opened.find(".command .copy").text == "Copied"
    assert opened.run("navigator.clipboard.readText()") == results["command"]


def test_what_is_shown_is_saved_as_csv_latex_and_png(opened, results, tmp_path):
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    opened.driver.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    opened.enter("filter-words", "yolov5n", "input")
    for name in ("csv", "latex", "png"):
        opened.click(f"#export-{name}")
    wanted = {"table.csv", "table.tex", "pareto.png"}
    for _ in range(100):
        if wanted <= {path.name for path in tmp_path.iterdir()}:
            break
        time.sleep(0.1)
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line["model"] for line in lines] == opened.models()[:7]
    for line, row in zip(lines, results["rows"], strict=False):
        assert float(line["params"]) == row["cost"]["params"]
        ap = row["accuracy"] and row["accuracy"]["AP"]["mean"]
        assert float(line["AP"] or -1) == pytest.approx(-1 if ap is None else ap, rel=1e-12)
    tex = (tmp_path / "table.tex").read_text().splitlines()
    assert tex[0] == r"\begin{tabular}{lrrrrrrrrr}"
    assert tex[2].startswith(r"Model & AP & $\Delta$AP & AP50 & Params, M & FLOPs, G & Median,")
    assert tex[4].startswith(r"yolov5n & 0.410 $\pm$ 0.014 & baseline & \textbf{0.760} $\pm$ 0.014")
    assert r"yolov5n-ghost & 0.365 $\pm$ 0.007 & $-$0.045 [$-$0.055, $-$0.035]*" in tex[5]
    picture = cv2.imread(str(tmp_path / "pareto.png"))
    width, height = opened.run("[report.pareto.plot.width, report.pareto.plot.height]")
    assert picture.shape[:2] == (height, width)
    shown = opened.run(MARKER)
    pixel = picture[round(shown[1]), round(shown[0])][::-1].tolist()
    assert pixel == pytest.approx([0x2F, 0x6F, 0xC4], abs=40)  # of the baseline's marker


MARKER = """(({ plot }) => {
    const style = document.querySelector(".point[data-row='0']").style;
    return [plot.bbox.left + parseFloat(style.left) + 3, plot.bbox.top + parseFloat(style.top) + 2];
})(report.pareto)"""
TITLES = """(async () => {
    const cut = [];
    for (const { path } of report.numeric) {
        Object.assign(report.pareto.axes, { x: path, y: path });
        report.pareto.draw();
        await new Promise((done) => setTimeout(done));
        const { plot } = report.pareto;
        for (const axis of [0, 1]) {
            plot.ctx.font = "13px system-ui, sans-serif";
            const text = plot.axes[axis].label(plot, axis);
            const room = axis ? plot.bbox.height : plot.bbox.width;
            if (text.includes("…") || plot.ctx.measureText(text).width > room + 20) cut.push([path, axis, text]);
        }
    }
    return cut;
})()"""
CROSSED = """(({ plot, front }) => {
    const over = plot.over.getBoundingClientRect();
    const spots = front.map(({ x, y }) => [over.left + plot.valToPos(x.value, "x"), over.top + plot.valToPos(y.value, "y")]);
    const tags = [...document.querySelectorAll(".point .tag")].filter((tag) => !tag.hidden).map((tag) => [tag.textContent, tag.getBoundingClientRect()]);
    return [tags.length, tags.filter(([, box]) => spots.some(([x, y], index) => {
        const [endX, endY] = spots[index + 1] ?? [over.right, y];
        const level = box.top < y && box.bottom > y && box.left < endX && box.right > x;
        return level || (box.left < endX && box.right > endX && box.top < y && box.bottom > endY && endY < y);
    })).map(([name]) => name)];
})(report.pareto)"""


@pytest.mark.parametrize("width", [1280, 400])
def test_no_name_covers_the_front_and_no_axis_title_is_cut(page, written, width):
    page.open(written, width=width)
    count, crossed = page.run(CROSSED)  # AP over latency
    assert count >= 4
    assert crossed == []
    assert page.run(TITLES) == []
    assert page.complaints() == []

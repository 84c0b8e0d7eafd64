"""report.html in a browser: every figure is the record's, and table and charts obey their reader."""

import numpy as np
import pytest

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
    first = opened.rows_shown()
    assert first == [row["name"] for row in results["rows"]]
    expected = [(falling, "descending"), (falling[::-1], "ascending"), (None, "none")]
    for order, said in expected:
        opened.run(f"{heading}.querySelector('button').click()")
        assert opened.rows_shown() == (first if order is None else order + absent)
        assert opened.run(f"{heading}.getAttribute('aria-sort')") == said


def test_headings_sort_by_the_keyboard(opened, results):
    opened.run("document.querySelector('thead [data-key=\"cost.flops\"] button').focus()")
    opened.key("Enter", 13)
    flops = {r["name"]: r["cost"]["flops"] for r in results["rows"] if r["cost"]}
    assert opened.rows_shown()[: len(flops)] == sorted(flops, key=flops.get)


def enter(page, identifier, value, event):
    page.run(
        f"""(() => {{ const node = document.getElementById('{identifier}');
            node.value = '{value}'; node.dispatchEvent(new Event('{event}')); }})()"""
    )
    page.run("new Promise((done) => setTimeout(done, 50))")


def test_rows_are_filtered_by_words_and_limits_in_table_and_chart(opened):
    enter(opened, "filter-words", "ghost cfg", "input")
    assert opened.rows_shown() == ["yolov5n-ghost", "fast", "slow", "beaten", "costs only"]
    enter(opened, "filter-words", "nothing like this", "input")
    assert opened.rows_shown() == []
    enter(opened, "filter-words", "", "input")
    enter(opened, "limit-key", "accuracy.AP", "change")
    enter(opened, "limit-value", "0.4", "input")
    opened.run("document.getElementById('limit-add').click()")
    assert opened.rows_shown() == ["yolov5n", "slow"]
    assert "fast" not in opened.run(FRONT)
    opened.run("document.querySelector('.chips button').click()")
    assert len(opened.rows_shown()) == 7
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

"""What readers are shown of a comparison: table.md, table.csv, the console and the plots."""

import csv
import io
import json

import cv2
import numpy as np
import pytest

from engine.compare.report.columns import cell, columns_of, duration
from engine.compare.report.drawn import pareto_front, table_of
from engine.compare.report.plots import pareto_plot, write_plots
from engine.compare.report.text import complete, console, csv_table, markdown
from engine.compare.schema import DONE, PROFILED


def test_the_markdown_table_shows_the_results(sample):
    text = markdown(sample)
    lines = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("|")]
    first, ghost, broken = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
    assert first["model"] == "yolov5n"
    assert first["AP"] == "0.410 ± 0.014"
    assert first["APs"] == "-"
    assert first["GFLOPs"] == "1.034"
    assert first["ms/image at 1, p50 / p90"] == "12.50 / 15.00"
    assert first["J/image"] == "not measured"
    assert [head for head in first if head.startswith("images/s")] == ["images/s at 32"]
    assert ghost["ΔAP [95 %]"] == "-0.045 [-0.055, -0.035]*"
    assert broken["ms/image at 32, p50 / p90"] == "failed"
    assert "GPU memory ran out" in broken["failed"]
    assert sample["command"] in text
    spent = {"joules_per_image": 0.5, "watts": 9.0, "batch": 32, "source": "x"}
    sample["rows"][0]["energy"] = spent
    assert " | J/image at 32 | " in markdown(sample)


@pytest.mark.parametrize(
    ("commits", "shown"),
    [
        (["a" * 40], ["Runs by commit aaaaaaaaaaaa."]),
        (["a" * 40, "b" * 40], ["**Warning**: runs of 2 commits: aaaaaaaaaaaa, bbbbbbbbbbbb."]),
        (["a" * 40 + "-dirty"], ["aaaaaaaaaaaa-dirty", "**Warning**: some", "uncommitted changes"]),
    ],
)
def test_the_commits_of_the_runs_are_shown_and_warned_of(sample, commits, shown):
    runs = [run for row in sample["rows"] for run in row["runs"] if run["status"] == DONE]
    for index, run in enumerate(runs):
        run["environment"]["commit"] = commits[index % len(commits)]
    text = markdown(sample)
    assert all(part in text for part in shown)
    assert text.count("Warning") == sum(part.count("Warning") for part in shown)


def test_where_the_runs_were_made_is_stated_if_not_here(sample):
    assert "another device" not in markdown(sample)
    sample["protocol"]["device"]["threads"] = 7
    assert "another device: cpu (x86_64), torch threads: 7." in markdown(sample)


def test_how_times_were_taken_is_stated(sample):
    measured = "fp32, eager, models in turn"
    layouts = "the faster one: channels last; NCHW for yolov5n-ghost at 1."
    assert measured in markdown(sample)
    assert layouts in markdown(sample)
    sample["measurement"]["settings"].update(dtype="fp16", graph=True)
    for row in sample["rows"]:
        for one in row["latency"]:
            one["layout"] = "NCHW"
    text = markdown(sample)
    assert "fp16, CUDA graphs, models in turn" in text
    assert "the faster one: NCHW." in text
    item = {"name": "Timing", "value": "fp16, CUDA graphs", "detail": "NCHW"}
    assert item in complete(sample)["summary"]


def test_other_runtimes_have_columns_and_a_sentence(sample):
    """In onnxruntime the ghost model is faster: that is the first runtime, torch the second."""
    measured = sample["measurement"]
    measured["runtimes"] = ["onnxruntime", "torch"]
    measured["settings"]["versions"] = {"onnxruntime": "1.2", "torch": "2"}
    for row, p50 in zip(sample["rows"], (8.0, 4.0, 2.0), strict=True):
        own = {"runtime": "onnxruntime", "layout": None, "other_p50_ms": None, "p50_ms": p50}
        row["latency"] = [{**one, **own} for one in row["latency"]] + row["latency"]
    columns = {column.path: column for column in columns_of(sample)}
    first, second = (columns[f"latency.{index}.p50_ms"] for index in (0, 2))
    assert first.title == "Median latency at batch 1, onnxruntime"
    assert second.csv == "batch 1 torch p50_ms"
    assert "latency.0.memory_bytes" not in columns
    assert "latency.2.memory_bytes" in columns
    assert [cell(first, row, "").text for row in sample["rows"]] == ["8.00", "4.00", "2.00"]
    text = markdown(sample)
    heads = text.splitlines()[0].split(" | ")
    assert "ms/image at 1, onnxruntime, p50 / p90" in heads
    assert "images/s at 32, onnxruntime" in heads
    assert "onnxruntime 1.2 run the exported network in float32, with its decoding" in text
    assert "the faster one: channels last; NCHW for yolov5n-ghost at 1." in text
    assert max(map(len, console(sample).splitlines())) <= 120
    (line, *_) = csv.DictReader(io.StringIO(csv_table(sample)))
    assert float(line["batch 1 onnxruntime p50_ms"]) == 8
    assert line["batch 32 torch layout"] == "channels last"
    made = complete(sample)
    assert made["fronts"]["accuracy.AP"]["latency.0.p50_ms"] == [0, 1]
    timing = next(item for item in made["summary"] if item["name"] == "Timing")
    assert timing["value"] == "onnxruntime, torch (fp32, eager)"


def test_names_of_others_stay_text(sample):
    sample["rows"][0]["name"] = "=1+<b>&`|\x1b[2J"
    sample["rows"][1]["name"] = "-ghost"
    sample["command"] = "python `x`"
    lines = csv_table(sample).splitlines()
    assert lines[1].startswith("'=1+")
    assert lines[2].startswith("'-ghost")
    assert any(",-0.0" in line for line in lines)  # a number stays one
    text = markdown(sample)
    assert "| =1+&lt;b>&amp;\\`\\| [2J |" in text
    assert "`` python `x` ``" in text
    assert console(sample).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("[x](javascript:alert(1))", r"[x]\(javascript:alert(1))"),
        ("![](//host/p.png)", r"![]\(//host/p.png)"),
        (r"[x\](y)", r"[x\\]\(y)"),  # a backslash of its own does not undo the other
        ("[x][y] [y]: //host", r"[x]\[y] [y]\: //host"),
        ("](][]:", r"]\(]\[]\:"),
        (r"\`code\`", r"\\\`code\\\`"),
        (r"a\|b", r"a\\\|b"),
        ("a]\x00(b", "a] (b"),
        ("yolov5n + ghostnet-0.5 [n]", "yolov5n + ghostnet-0.5 [n]"),
    ],
)
def test_names_are_no_links_images_or_code(sample, name, written):
    sample["rows"][0]["name"] = sample["protocol"]["data"]["name"] = sample["baseline"] = name
    text, plain = markdown(sample), written.replace(r"\|", "|")  # it has a meaning in tables alone
    assert f"\n| {written} | " in text
    assert f"\n{plain}, 87 validation images" in text
    assert f"ΔAP against {plain}, paired" in text


def test_columns_without_a_value_are_left_out(sample):
    for row in sample["rows"]:
        row.update(accuracy=None, training=None, status=PROFILED, cause=None)
    heads = {column.head for column in columns_of(sample)}
    assert heads & {"AP", "time to train", "GFLOPs"} == {"GFLOPs"}


def test_csv_has_every_number_with_all_digits(sample):
    lines = list(csv.DictReader(io.StringIO(csv_table(sample))))
    assert [line["model"] for line in lines] == [row["name"] for row in sample["rows"]]
    first, row = lines[0], sample["rows"][0]
    assert float(first["AP"]) == row["accuracy"]["AP"]["mean"]
    assert int(first["macs"]) == row["cost"]["macs"]
    assert int(first["neck params"]) == row["cost"]["neck"]["params"]
    assert float(first["batch 32 p90_ms"]) == row["latency"][1]["p90_ms"]
    assert float(lines[1]["delta AP"]) == sample["rows"][1]["difference"]["AP"]["delta"]
    assert lines[2]["AP"] == ""
    assert lines[2]["batch 32 cause"] == "RuntimeError: out of memory"
    assert [line["batch 32 layout"] for line in lines] == ["channels last"] * 2 + [""]


def test_the_console_table_is_aligned_and_at_most_120_columns_wide(sample):
    lines = console(sample).splitlines()
    heads = ["AP", "ΔAP [95 %]", "params M", "GFLOPs", "ms at 1", "ms at 32", "speed-up at 1"]
    assert lines[0].split("  ")[0] == "model"
    assert [text.strip() for text in lines[0].split("  ") if text.strip()][1:] == heads
    end = lines[0].index("params M") + len("params M")
    assert all(line[end - 1] in "0123456789M" for line in lines[:4])
    assert lines[2].split()[-3:] == ["14.37", "10.92", "0.87"]
    assert lines[4].startswith("yolov5n-broken: seed 0: GPU memory ran out")
    sample["rows"][0]["name"] = "yolov5n + " + "a" * 40 + " + free"
    sample["rows"][2]["cause"] = "why " * 80
    narrow = console(sample).splitlines()
    assert max(map(len, narrow)) <= 120
    assert narrow[1].startswith("yolov5n + aaaaaaaaa…" + "a" * 13 + " + free")  # 19 + 1 + 20
    assert narrow[0].endswith("GFLOPs  ms at 1  ms at 32")
    assert len(narrow) == 4 + 3


def test_numbers_as_they_are_shown(sample):
    assert [duration(value) for value in (42, 600, 7200)] == ["42 s", "10.0 min", "2.00 h"]
    sample["rows"][1]["difference"]["AP"].update(delta=-0.0001, low=-0.0004, high=0.0003)
    column = next(one for one in columns_of(sample) if one.path == "difference.AP")
    found = cell(column, sample["rows"][1], "yolov5n")
    assert (found.text, found.spread.rstrip("*")) == ("0.000", "[0.000, 0.000]")  # without a sign


@pytest.mark.parametrize(
    ("costs", "values", "front"),
    [
        ([1.0, 1.0, 2.0], [0.5, 0.5, 0.5], [0, 1]),  # equal rows are both on it
        # 2: beaten by 1; 3: at the same cost, too; 5: as good as 4, but dearer; 6, 7: not known
        (
            [1.0, 2.0, 3.0, 2.0, 9.0, 10.0, None, 0.5],
            [0.2, 0.5, 0.4, 0.3, 0.6, 0.6, 0.9, None],
            [0, 1, 4],
        ),
    ],
)
def test_the_front_by_hand(costs, values, front):
    assert pareto_front(costs, values) == front


def test_the_report_has_columns_cells_and_fronts_of_the_results(sample):
    table = table_of(sample)
    columns = {column["path"]: column for column in table["columns"]}
    assert len(columns) == len(table["columns"])
    first, _, broken = columns["latency.1.p90_ms"]["cells"]
    assert (first["value"], first["text"]) == (sample["rows"][0]["latency"][1]["p90_ms"], "11.40")
    assert (broken["value"], broken["text"]) == (None, "failed")
    assert broken["hint"] == "RuntimeError: out of memory"
    difference = columns["difference.AP"]["cells"]
    assert [one["text"] for one in difference] == ["baseline", "-0.045", "failed"]
    assert difference[1]["spread"] == "[-0.055, -0.035]*"
    assert columns["accuracy.APs"]["cells"][0]["text"] == "not defined"
    assert columns["accuracy.AP"]["cells"][0]["hint"] == "seeds 0, 1: 0.400, 0.420"
    assert [one["best"] for one in columns["accuracy.AP"]["cells"]] == [True, False, False]
    assert [one["best"] for one in columns["cost.flops"]["cells"]] == [False, True, False]
    assert not any(one["best"] for one in difference)
    assert [path for path in columns if "AP75" in path] == ["accuracy.AP75", "difference.AP75"]
    assert columns["latency.0.p50_ms"]["title"] == "Median latency at batch 1, ms/image"
    assert columns["cost.neck.macs"]["label"] == "neck MACs"
    fronts = table["fronts"]
    assert set(fronts["accuracy.AP"]["cost.flops"]) == {0, 1}
    assert set(fronts["accuracy.AP"]["cost.intensity"]) == {0, 1}  # higher is better
    assert fronts["cost.params"]["cost.flops"] == [2, 1]
    assert "classes.0.AP50" not in fronts["classes.0.AP"]


def test_the_report_has_a_lead_a_summary_and_notes(sample):
    made = complete(sample)
    assert made["lead"].startswith("2 models against yolov5n on bccd, 2 runs each")
    assert made["notes"][0].startswith("bccd, 87 validation images")
    assert {"name": "Models", "value": "3", "detail": "1 failed"} in made["summary"]
    json.dumps(made, allow_nan=False)
    gpu = {"flops_per_second": 247.2857e12, "bytes_per_second": 2.845e12}
    for peaks, value, detail in (
        ({}, "100 GFLOP/s", "20 GB/s, ridge 5 FLOP/B"),
        (gpu, "247,286 GFLOP/s", "2,845 GB/s, ridge 86.9 FLOP/B"),
    ):
        sample["measurement"]["device_peak"].update(peaks)
        item = {"name": "Device peak", "value": value, "detail": detail}
        assert item in complete(sample)["summary"]


def test_plots_of_every_cost_that_is_known(sample, tmp_path):
    sample["measurement"]["batches"] = [32]
    spent = {"joules_per_image": 0.1, "watts": 9.0, "batch": 1, "source": "x"}
    costs = ["flops", "latency_batch32", "params"]
    for drawn in (costs, ["energy", *costs]):
        write_plots(sample, tmp_path)
        for kind in ("png", "svg"):
            names = sorted(path.stem for path in tmp_path.glob(f"*.{kind}"))
            assert names == [f"pareto_{cost}" for cost in drawn]
        sample["rows"][0]["energy"] = spent
    assert cv2.imread(str(tmp_path / "pareto_flops.png")) is not None
    assert "<svg" in (tmp_path / "pareto_flops.svg").read_text()


def test_a_plot_by_hand(sample):
    column = next(one for one in columns_of(sample) if one.path == "latency.0.p50_ms")
    (axes,) = pareto_plot(sample["rows"][:2], column).axes
    points = np.concatenate([drawn[0].get_xydata() for drawn in axes.containers])
    assert points == pytest.approx(np.array([[12.5, 0.41], [14.375, 0.365]]))
    to_p90, sd = (bar.get_segments()[0] for bar in axes.containers[0][2])
    assert to_p90[:, 0] == pytest.approx([12.5, 15.0])
    assert sd[:, 1] == pytest.approx([0.41 - 0.0002**0.5, 0.41 + 0.0002**0.5])
    front = axes.lines[0].get_xydata()  # the second model is slower and worse
    assert front == pytest.approx(np.array([[12.5, 0.41], [1.2 * 17.25, 0.41]]))

"""What FLOPs promise and latency keeps, against the baseline."""

import csv
import io
import json
from dataclasses import asdict, replace

import pytest

from engine.compare.costs import with_speedup
from engine.compare.report.columns import cell, columns_of
from engine.compare.report.text import csv_table, markdown
from engine.compare.schema import Results, SpeedUp, SpeedUpAt
from engine.compare.typed import construct


@pytest.fixture
def results(root):
    sample = json.loads((root / "tests/engine/compare/data_compare_sample.json").read_text())
    sample = construct(Results, sample)
    first, second = sample.rows[:2]

    def made(row, name, flops, times):
        pairs = zip(row.latency, times, strict=False)
        return replace(
            row,
            name=name,
            cost=replace(row.cost, flops=flops),
            latency=[replace(at, p50_ms=time) for at, time in pairs],
        )

    first = made(first, sample.baseline, 600, (12.0, 8.0))
    second = made(second, "other", 200, (10.0, None))
    third = replace(second, name="costless", cost=None)
    empty = made(second, "empty", 0, ())
    return replace(sample, rows=with_speedup([first, second, third, empty], sample.baseline))


def test_factors_by_hand(results):
    first, second, third, empty = results.rows
    assert first.speedup is None
    assert second.speedup == SpeedUp(3.0, [SpeedUpAt(1, 1.2), SpeedUpAt(32, None)])
    assert third.speedup is None
    assert empty.speedup == SpeedUp(None, [])


def test_another_baseline_turns_it_round(results):
    turned = with_speedup(results.rows[:2], "other")
    assert turned[0].speedup.flops == pytest.approx(1 / 3)
    assert turned[0].speedup.latency[0].factor == pytest.approx(10 / 12)


def test_it_is_in_both_tables(results):
    results = asdict(results)
    columns = {column.head: column for column in columns_of(results)}

    def shown(head, row):
        return cell(columns[head], results["rows"][row], results["baseline"]).text

    by_flops = [shown("speed-up by FLOPs", row) for row in range(4)]
    assert by_flops == ["baseline", "3.00", "not measured", "not measured"]
    assert shown("measured at 1", 1) == "1.20"
    assert shown("measured at 32", 1) == "not measured"
    assert "Speed-up: " in markdown(results)
    line = list(csv.DictReader(io.StringIO(csv_table(results))))[1]
    assert float(line["speed-up by FLOPs"]) == 3
    assert float(line["speed-up at 1"]) == pytest.approx(1.2)
    assert line["speed-up at 32"] == ""
    alone = {**results, "rows": results["rows"][:1]}
    assert "speed-up by FLOPs" not in [column.head for column in columns_of(alone)]

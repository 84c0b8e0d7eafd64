"""Tables: metrics over seeds by hand, differences that are known, plans and costs."""

import copy
import csv
import io
import json
import statistics
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.checkpoint import model_payload, save_checkpoint
from engine.compare import costs
from engine.compare.bootstrap import difference, draw, weighted_ap
from engine.compare.config import CompareConfig
from engine.compare.costs import common_batch, computed_cost, measure, with_speedup
from engine.compare.plan import model_entries, run_flags, runs
from engine.compare.protocol import Splits
from engine.compare.record import save_record
from engine.compare.report.columns import cell, columns_of
from engine.compare.report.tables import ModelRuns, rows, spread, train_seconds
from engine.compare.report.text import csv_table, markdown
from engine.compare.schema import (
    DONE,
    FAILED,
    PARTLY,
    PROFILED,
    Results,
    Run,
    Spread,
    construct,
)
from engine.evaluate.coco import coco_metrics
from engine.evaluate.matching import BoxTable
from engine.measure.latency import Latency, LatencyConfig
from engine.measure.roofline import PEAK_SIZES, PeakSizes
from engine.train.config import TrainConfig
from models.builder import build_detector
from models.yaml.parser import load_spec
from tests.engine.compare.test_bootstrap import known
from tests.engine.compare.test_record import PROTOCOL as record_protocol
from tests.engine.compare.test_record import a_record
from utils.config import parse
from utils.errors import UserError

NOTHING = BoxTable.concatenate([])
CPU = torch.device("cpu")
ADDED = {"train_images": 100, "val_images": 30}
PROTOCOL = {"kind": "train", "data": {**record_protocol["data"], **ADDED}, "image_size": 64}


def test_the_sample_has_the_shape_of_the_schema(sample):
    assert asdict(construct(Results, sample)) == sample


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny_model):
    """Three models: a weak one with two seeds, a strong one of which a seed failed, a failed one."""
    rng, chances = np.random.default_rng(5), {"weak": (0.5, 0.5), "strong": (0.8, 0.8)}
    truth, founds = known(rng, sum(chances.values(), ()), images=30, alike=False)
    folder = tmp_path_factory.mktemp("records")
    config = CompareConfig(cfg=(str(tiny_model),), imgsz=64)
    base = model_entries(config, classes=2)[0]
    models = []
    for name in chances:
        entry, finished = named(base, name), []
        for seed in (0, 1):
            found = founds[2 * len(models) + seed]
            coco = coco_metrics(found, truth, images=30, classes=2).twelve
            aps = zip("ab", (coco["AP"], 0.3), strict=True)
            classes = [{"name": x, "instances": 9, "ap": ap, "ap50": None} for x, ap in aps]
            curves = {"epoch": [0.0, 1.0], "images_per_second": [50.0, 100.0]}
            curves |= {"val_seconds": [1.0, 1.0 + seed], "data_wait_share": [0.2, 0.1]}
            metrics = {"precision": 0.5, "recall": 0.25, "coco": coco, "per_class": classes}
            known_of_it = {"name": name, "model_id": name, "seed": seed, "protocol": PROTOCOL}
            record = a_record(**known_of_it, metrics=metrics, curves=curves)
            finished.append(save_record(folder, record, found, truth))
        models.append(ModelRuns(entry, finished))
    one_failed, both_failed = [Run(0, FAILED, "x", "a")], [Run(1, FAILED, "y", "b")]
    models[1] = replace(models[1], finished=models[1].finished[1:], failed=one_failed)
    models.append(ModelRuns(named(base, "broken"), (), one_failed + both_failed))
    return models, rows(models, truth=truth, baseline="weak"), truth


def named(entry, name):
    return replace(entry, name=name, model_id=name)


def results_of(made, baseline="weak", measurement=None):
    protocol = {**PROTOCOL, "seeds": [0, 1]}
    return Results("python compare.py", protocol, baseline, made, measurement)


def test_rows_are_the_means_of_their_records(table):
    models, made, _ = table
    for item, row in zip(models[:2], made[:2], strict=True):
        aps = [one.metrics["coco"]["AP"] for one in item.finished]
        assert row.accuracy["AP"].values == aps
        assert row.accuracy["AP"].mean == pytest.approx(sum(aps) / len(aps))
        assert [run.accuracy["AP"] for run in row.runs if run.status == DONE] == aps
        for number, metrics in enumerate(row.classes):
            values = [one.metrics["per_class"][number]["ap"] for one in item.finished]
            assert metrics.AP.values == values
        if len(aps) > 1:
            assert row.accuracy["AP"].sd == pytest.approx(statistics.stdev(aps))
    assert construct(Results, asdict(results_of(made))) == results_of(made)


def test_what_became_of_the_runs_and_their_errors(table):
    models, made, truth = table
    assert [row.status for row in made] == [DONE, PARTLY, FAILED]
    assert [row.seeds for row in made] == [[0, 1], [1], []]
    assert [row.cause for row in made] == [None, "seed 0: a", "seed 0: a; seed 1: b"]
    assert made[2].accuracy is None
    assert made[2].cost.params > 0
    assert [run.status for run in made[1].runs] == [FAILED, DONE]
    assert made[0].errors.delta["missed"] > made[1].errors.delta["missed"] > 0
    assert made[1].errors.counts["missed"] == len(truth) - len(models[1].finished[0].detections())


def test_the_difference_is_that_of_the_seeds_both_have(table):
    models, made, truth = table
    assert made[0].difference is None
    assert made[2].difference is None
    found = made[1].difference["AP"]
    weak, strong = models[0].finished[1], models[1].finished[0]
    expected = strong.metrics["coco"]["AP"] - weak.metrics["coco"]["AP"]
    assert found.seeds == [1]
    assert found.delta == pytest.approx(expected)
    assert found.significant
    assert 0 < found.low < found.delta < found.high
    times = draw(30)
    samples = [weighted_ap(x.detections(), truth, times) for x in (strong, weak)]
    straight = difference(*samples)
    assert (found.low, found.high) == (straight.low, straight.high)


def test_two_seeds_together_are_what_the_bootstrap_makes_of_both(table):
    models, _, truth = table
    made = rows(models[:1] * 2, truth=truth, baseline="nobody")
    assert made[0].difference is None
    swapped = [models[0], ModelRuns(named(models[0].entry, "other"), models[0].finished)]
    twin = rows(swapped, truth=truth, baseline="weak")[1].difference["AP"]
    assert (twin.delta, twin.low, twin.high) == (0, 0, 0)
    assert twin.seeds == [0, 1]
    assert not twin.significant


def test_training_speed_by_hand(table):
    models, made, _ = table
    # 100 images at 50/s and 100 at 100/s take 3 s, and the evaluations 2 s (3 s with seed 1)
    training = made[0].training
    assert training.seconds.values == pytest.approx([5.0, 6.0])
    assert training.images_per_second.mean == pytest.approx(200 / 3)
    assert training.wait_share.mean == pytest.approx(0.15)
    assert training.epochs == 2
    record = copy.deepcopy(models[0].finished[0])
    record.curves["images_per_second"][0] = 0.0  # of an epoch that was resumed at its end
    assert train_seconds(record) == pytest.approx(2 * 100 / 100 + 2.0)


def test_spread_by_hand():
    assert spread([1.0, 3.0]) == Spread(2.0, pytest.approx(2**0.5), [1.0, 3.0])
    assert spread([1.0]) == Spread(1.0, None, [1.0])
    assert spread([None, 2.0]).mean == 2.0
    assert spread([]).mean is None


# plan and costs


@pytest.mark.parametrize(
    ("working", "batch"),  # the batch sizes of 1 and 32 that each model runs at
    [([{1, 32}, {1, 32}], 32), ([{1, 32}, {1}, set()], 1), ([set()], None), ([{1}, {32}], None)],
)
def test_energy_is_of_one_batch_that_all_run_at(working, batch):
    sizes = [[Latency(n, None if n in able else "x") for n in (1, 32)] for able in working]
    assert common_batch(sizes) == batch


SPLITS = Splits("d", evaluated=range(5), trained={"train": range(100)})


def test_every_combination_is_a_row():
    cfg, backbone = ("yolov5n", "yolov5n-osa"), ("csp-n", "ghostnet-0.5")
    config = CompareConfig(cfg=cfg, backbone=backbone, imgsz=64)
    found = model_entries(config, classes=3)
    assert [item.name for item in found] == [f"{a} + {b}" for a in cfg for b in backbone]
    assert len({item.model_id for item in found}) == 4
    flags = run_flags(config, found[1], 7, {"chosen": {"hyp": "small"}})
    assert flags[:4] == ["--cfg", "yolov5n", "--backbone", "ghostnet-0.5"]
    assert flags[flags.index("--seed") + 1] == "7"
    assert flags[flags.index("--patience") + 1] == "0"
    assert flags[flags.index("--hyp") + 1] == "small"


def test_a_model_that_does_not_fit_is_there_with_its_cause(tiny_model):
    config = CompareConfig(cfg=(str(tiny_model), "yolov5n6"), imgsz=96)
    fine, broken = model_entries(config, classes=3)
    assert fine.cause is None
    assert broken.spec is None
    assert "64" in broken.cause
    made = rows([ModelRuns(broken)], truth=NOTHING, baseline="x")[0]
    assert (made.status, made.cause, made.cost) == (FAILED, broken.cause, None)
    for names, message in (
        (["yolov5n6"], "stride"),
        (["yolov5n", "yolov5n-gost"], "yolov5n-ghost"),
    ):
        with pytest.raises(UserError, match=message):  # nothing to compare; a mistyped name
            model_entries(CompareConfig(cfg=tuple(names), imgsz=96), classes=3)


def test_runs_have_their_command_and_the_work_of_three_forwards_of_every_image(tiny_model):
    config = CompareConfig(cfg=(str(tiny_model),), imgsz=64, epochs=10, seeds=(0, 1), workers=3)
    found = model_entries(config, classes=3)
    planned = runs(config, found, {**PROTOCOL, "seeds": [0, 1]}, SPLITS)
    assert [run.seed for run in planned] == [0, 1]
    assert planned[0].work == 3 * 1000 * found[0].profile.flops
    assert planned[0].id != planned[1].id
    assert planned[0].command.endswith("--workers 3")
    parse(TrainConfig, planned[0].command.split()[2:], prog="train.py", description="")


def test_equal_budgets_are_noted(tiny_model):
    config = CompareConfig(cfg=(str(tiny_model),), fit="gflops=0.012", imgsz=64)
    (found,) = model_entries(config, classes=3)
    assert found.profile.flops == pytest.approx(1.2e7, rel=0.02)
    assert "gflops=0.012" in found.model.notes[0]


def test_pretrained_weights_are_counted_by_hand(tiny_model, tmp_path, capsys):
    """The file is of five classes, the model of three: all but the detection convolutions match."""
    spec = load_spec(str(tiny_model))
    weights, other = tmp_path / "five.pt", tmp_path / "other.pt"
    save_checkpoint(weights, model_payload(build_detector(spec, classes=5)))
    wide = tmp_path / "wide.yaml"
    wide.write_text("width_multiple: 2\n" + tiny_model.read_text())
    save_checkpoint(other, model_payload(build_detector(load_spec(str(wide)), classes=5)))
    config = CompareConfig(cfg=(str(tiny_model),), imgsz=64, init_weights=str(weights))
    (found,) = model_entries(config, classes=3)
    own = dict(found.detector().named_parameters())
    last = f"model.{len(found.spec.layers) - 1}.m."
    body = sum(value.numel() for name, value in own.items() if not name.startswith(last))
    assert found.model.pretrained == body
    note = f"--init-weights five.pt: {body:,} of {found.profile.params:,} parameters loaded"
    assert found.model.notes[0].startswith(note)
    flags = run_flags(config, found, 0, {})
    assert flags[flags.index("--weights") + 1] == str(weights)
    assert capsys.readouterr().err == ""
    (none,) = model_entries(replace(config, init_weights=str(other)), classes=3)
    assert none.model.pretrained == 0
    assert "nothing in other.pt matches" in capsys.readouterr().err


def test_the_computed_cost_adds_up(tiny_model):
    (found,) = model_entries(CompareConfig(cfg=(str(tiny_model),), imgsz=64), classes=3)
    cost = computed_cost(found)
    sections = (cost.backbone, cost.neck, cost.head)
    assert cost.flops == 2 * cost.macs == 2 * found.profile.macs
    for key in ("params", "macs", "flops"):
        for parts in (sections, map(asdict, cost.layers)):
            assert sum(part[key] for part in parts) == getattr(cost, key)
    assert sum(layer.bytes for layer in cost.layers) == cost.bytes
    # the first convolution: 6x6, 3 to 16 channels, 64 px to 32 px
    assert cost.layers[0].macs == 36 * 3 * 16 * 32 * 32
    assert cost.layers[0].access_bytes == 4 * (3 * 64**2 + 16 * 32**2 + 36 * 3 * 16)
    assert cost.layers[0].measured is None
    assert len(cost.guidelines) == 4


@pytest.fixture
def measured(monkeypatch):
    """Model files -> the conditions, and a row of each model with its costs, at batch 1 and 2."""
    small = PeakSizes(side=32, pixels=4, copy_bytes=1 << 16, repeats=2)
    monkeypatch.setitem(PEAK_SIZES, "cpu", small)
    monkeypatch.setattr(costs, "ENERGY_SECONDS", 0.01)

    def measured(*files, dtype="fp32"):
        found = model_entries(CompareConfig(cfg=tuple(map(str, files)), imgsz=64), classes=3)
        made = rows([ModelRuns(item) for item in found], truth=NOTHING, baseline="")
        config = LatencyConfig(batches=(1, 2), warm_up=1, rounds=5, dtype=dtype)
        return measure(made, found, device=CPU, config=config)

    return measured


@pytest.mark.parametrize("part", ["roofline", "measure_energy", "measure_peak"])
def test_what_cannot_be_measured_of_one_model_is_noted(
    tiny_model, measured, monkeypatch, part, capsys
):
    def broken(*args, **more):
        raise torch.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr(costs, part, broken)
    measurement, (row,) = measured(tiny_model)
    assert row.latency[0].p50_ms > 0
    assert (row.blocks is None) == (part != "measure_energy")
    cause = "not measured: OutOfMemoryError: out of memory"
    if part == "measure_peak":
        assert measurement.device_peak is None
        assert cause in capsys.readouterr().err
    else:
        assert row.model.notes[-1] == cause


def test_energy_and_rows_are_taken_as_latency_is(tiny_model, measured, monkeypatch):
    """In its type, and in the layout that was faster at the same batch size."""
    layouts = {1: "channels last", 2: "NCHW"}
    timed, seen = costs.measure_latency, []

    def chosen(*args, **more):
        results, settings = timed(*args, **more)
        return {k: replace(one, layout=layouts[k[1]]) for k, one in results.items()}, settings

    def roofline(model, images, peak):
        seen.append(images)
        return rows_of(model, images, peak)

    def energy(step, **more):
        with ShapesOf() as shapes:
            step()
        seen.append(shapes.first)

    class ShapesOf(TorchDispatchMode):
        first = None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if self.first is None and args and isinstance(args[0], torch.Tensor):
                self.first = args[0]
            return func(*args, **(kwargs or {}))

    rows_of = costs.roofline
    for name, fake in (("measure_latency", chosen), ("roofline", roofline)):
        monkeypatch.setattr(costs, name, fake)
    monkeypatch.setattr(costs, "measure_energy", energy)
    measurement, (row,) = measured(tiny_model, dtype="bf16")
    assert [(len(x), x.dtype) for x in seen] == [(1, torch.bfloat16), (2, torch.bfloat16)]
    last = [x.is_contiguous(memory_format=torch.channels_last) for x in seen]
    assert last == [True, False]
    assert measurement.settings["dtype"] == "bf16"
    assert 2 * sum(block["bytes"] for block in row.blocks) == row.cost.bytes  # in float32


def test_models_are_measured_side_by_side(tiny_model, measured, tmp_path):
    wide = tmp_path / "wide.yaml"
    wide.write_text("width_multiple: 6\n" + tiny_model.read_text())
    measurement, made = measured(tiny_model, wide)
    assert (measurement.batches, measurement.runtimes) == ([1, 2], ["torch"])
    assert measurement.device.startswith("cpu")
    assert measurement.device_peak["flops_per_second"] > 0
    for one in made:
        assert [at.batch for at in one.latency] == [1, 2]
        assert all(0 < at.least_ms <= at.p50_ms <= at.p90_ms for at in one.latency)
        assert one.status == PROFILED
    small, large = made
    assert small.latency[0].memory_bytes < large.latency[0].memory_bytes  # not of the clock
    total = sum(layer.measured for layer in small.cost.layers)
    assert sum(block["measured"] for block in small.blocks) == pytest.approx(total)
    plain = json.loads(json.dumps(asdict(results_of(made, small.name, measurement))))
    assert asdict(construct(Results, plain)) == plain
    if small.energy is None:
        assert "not measured" in markdown(plain)


@pytest.fixture
def promised(sample):
    """The sample with rows of known FLOPs and latency."""
    sample = construct(Results, sample)
    first, second = sample.rows[:2]

    def made(row, name, flops, times):
        pairs = zip(row.latency, times, strict=False)
        latency = [replace(at, p50_ms=time) for at, time in pairs]
        return replace(row, name=name, cost=replace(row.cost, flops=flops), latency=latency)

    first = made(first, sample.baseline, 600, (12.0, 8.0))
    second = made(second, "other", 200, (10.0, None))
    third = replace(second, name="costless", cost=None)
    empty = made(second, "empty", 0, ())
    return replace(sample, rows=with_speedup([first, second, third, empty], sample.baseline))


def test_speedups_by_hand(promised):
    torch_at = {"runtime": "torch"}
    at = [{"batch": 1, "factor": 1.2, **torch_at}, {"batch": 32, "factor": None, **torch_at}]
    found, empty = {"flops": 3.0, "latency": at}, {"flops": None, "latency": []}
    assert [row.speedup for row in promised.rows] == [None, found, None, empty]
    turned = with_speedup(promised.rows[:2], "other")
    assert turned[0].speedup["flops"] == pytest.approx(1 / 3)
    assert turned[0].speedup["latency"][0]["factor"] == pytest.approx(10 / 12)


def test_the_speedup_is_in_both_tables(promised):
    results = asdict(promised)
    columns = {column.head: column for column in columns_of(results)}

    def shown(head):
        return [cell(columns[head], row, promised.baseline).text for row in results["rows"]]

    assert shown("speed-up by FLOPs") == ["baseline", "3.00", "not measured", "not measured"]
    assert shown("measured at 1")[1] == "1.20"
    assert shown("measured at 32")[1] == "not measured"
    assert "Speed-up: " in markdown(results)
    line = list(csv.DictReader(io.StringIO(csv_table(results))))[1]
    assert float(line["speed-up by FLOPs"]) == 3
    assert float(line["speed-up at 1"]) == pytest.approx(1.2)
    assert line["speed-up at 32"] == ""
    alone = {**results, "rows": results["rows"][:1]}
    assert "speed-up by FLOPs" not in [column.head for column in columns_of(alone)]

import csv
import signal

import pytest
import torch
import yaml
from torch import nn

from data.loading.sample import Batch
from engine.checkpoint import load_checkpoint, load_detector
from engine.train import loop
from engine.train.config import TrainConfig
from engine.train.ema import ModelEma
from engine.train.interrupts import StopRequest
from engine.train.loop import fit
from engine.train.optimizer import build_optimizer
from engine.train.schedule import Schedule
from engine.train.state import TrainState
from engine.train.step import (
    FiniteGuard,
    NonFiniteError,
    StepClock,
    StepPlan,
    drawn_size,
    rescale,
    to_network,
    train_epoch,
)
from models.builder import build_detector
from models.losses.anchor import AnchorLoss
from models.yaml.parser import load_spec
from utils.config import parse
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.structures import Targets

CPU = torch.device("cpu")
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def batch_of(count, seed, boxes=3, size=64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    index = torch.randint(0, count, (boxes,), generator=generator)
    corners = torch.rand(boxes, 2, generator=generator) * size / 2
    targets = Targets(
        index,
        torch.randint(0, 3, (boxes,), generator=generator),
        torch.cat((corners, corners + 8 + torch.rand(boxes, 2, generator=generator) * 16), 1),
    )
    return Batch(images, targets, (), tuple(f"image-{seed}-{i}" for i in range(count)))


def new_run(tiny_model, hyp, *, epochs=1, steps=4, batch_size=2, **plan):
    torch.manual_seed(0)
    model = build_detector(load_spec(str(tiny_model)), classes=3).train()
    schedule = Schedule(hyp, epochs=epochs, steps_per_epoch=steps, batch_size=batch_size)
    optimizer = build_optimizer(model, "SGD", hyp, weight_decay=schedule.weight_decay)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, ModelEma(model), optimizer, scaler, CPU)
    state.start_epoch(0)
    loss = AnchorLoss(model, hyp, image_size=64)
    return state, StepPlan(model, loss, schedule, CPU, **plan)


def run_epoch(state, plan, batches):
    return train_epoch(
        state, plan, batches, request=StopRequest(), clock=StepClock(CPU), progress=False
    )


def flat_hyp(**changes):
    return Hyperparameters(warmup_epochs=0, **changes)


def test_accumulated_batches_make_the_same_update_as_one_large_batch(tiny_model):
    """With statistics fixed and equal box counts, 2 x 2 images accumulate to the step of 4."""
    hyp = flat_hyp(nbs=4, box=0.0, cls=0.0)  # objectness is a plain mean over images
    batches = [batch_of(2, seed) for seed in (1, 2)]
    both = Batch(
        torch.cat([b.images for b in batches]),
        Targets(
            torch.cat([b.targets.image_index + 2 * i for i, b in enumerate(batches)]),
            torch.cat([b.targets.labels for b in batches]),
            torch.cat([b.targets.boxes for b in batches]),
        ),
        (),
        (),
    )
    results = []
    for size, chunks in ((2, batches), (4, [both])):
        state, plan = new_run(tiny_model, hyp, steps=len(chunks), batch_size=size)
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert run_epoch(state, plan, chunks)
        assert state.ema.updates == 1
        assert state.pending == 0
        results.append([p.detach().clone() for p in state.model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_gradients_left_at_the_very_end_are_not_lost(tiny_model):
    state, plan = new_run(tiny_model, flat_hyp(nbs=64), steps=3)  # 32 batches per update
    run_epoch(state, plan, [batch_of(2, seed) for seed in range(3)])
    assert state.ema.updates == 1


def test_few_images_are_learnt_by_heart(tiny_model):
    hyp = flat_hyp(nbs=4, lr0=0.02)
    state, plan = new_run(tiny_model, hyp, steps=60, batch_size=4)
    fixed = batch_of(4, 7, boxes=6)
    losses = []
    for _ in range(60):
        before = state.losses.sum().item()
        assert train_epoch(
            state, plan, [fixed], request=StopRequest(), clock=StepClock(CPU), progress=False
        ) == (state.batches == 60)
        losses.append(state.losses.sum().item() - before)
    assert losses[-1] < 0.6 * losses[0]


def test_mean_losses_are_over_the_batches_so_far(tiny_model):
    state, plan = new_run(tiny_model, flat_hyp(), steps=2)
    batches = [batch_of(2, seed) for seed in (1, 2)]
    model = plan.forward
    first = plan.loss(model(to_network(batches[0].images)), batches[0].targets)
    run_epoch(state, plan, batches[:1])
    torch.testing.assert_close(state.mean_losses()[0], first.box, rtol=1e-4, atol=1e-6)
    assert state.batches == 1


@pytest.mark.parametrize("last", [1, 3])  # 3: all ranks stop before the validation, together
def test_a_stop_is_obeyed_between_two_steps(tiny_model, last):
    state, plan = new_run(tiny_model, flat_hyp(nbs=2), steps=4)
    request = StopRequest()

    def stop_in_second(index, batch):
        if index == last:
            request.signal = signal.SIGTERM

    whole = train_epoch(
        state,
        plan,
        [batch_of(2, seed) for seed in range(4)],
        request=request,
        clock=StepClock(CPU),
        on_batch=stop_in_second,
        progress=False,
    )
    assert not whole
    assert state.batches == last + 1


def test_a_loss_that_is_no_number_names_the_batch(tiny_model):
    state, plan = new_run(tiny_model, flat_hyp(nbs=2), steps=4)
    batches = [batch_of(2, seed) for seed in range(4)]

    def poison(index, batch):
        if index == 2:
            with torch.no_grad():
                state.model.head.m[0].bias[0] = torch.nan

    with pytest.raises(
        NonFiniteError, match=r"epoch 0, batch 2, images image-2-0, image-2-1"
    ) as caught:
        train_epoch(
            state,
            plan,
            batches,
            request=StopRequest(),
            clock=StepClock(CPU),
            on_batch=poison,
            progress=False,
        )
    assert caught.value.exit_code != 0
    assert not state.all_finite()


def test_a_gradient_that_is_no_number_is_seen_at_the_same_step(tiny_model):
    state, plan = new_run(tiny_model, flat_hyp(nbs=2), steps=2)
    state.model.head.m[0].bias.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match="batch 0"):
        run_epoch(state, plan, [batch_of(2, 0), batch_of(2, 1)])


def test_the_guard_finds_the_first_bad_batch_of_a_window():
    guard = FiniteGuard(CPU, NO_SCALER)
    for index, value in enumerate([1.0, float("inf"), float("nan")]):
        guard.note(torch.tensor([value, 0.0]), epoch=3, batch=batch_of(1, index), index=index)
    with pytest.raises(NonFiniteError, match="epoch 3, batch 1, images image-1-0"):
        guard.check()


def test_pixels_become_floats_in_the_wanted_order():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    ready = to_network(images)
    assert ready.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ready[0, :, 0, 0], torch.tensor([0.0, 0.2, 1.0]))


def test_multi_scale_draws_multiples_of_the_stride_within_half():
    sizes = {drawn_size((640, 640), stride=32, seed=0, step=step) for step in range(400)}
    assert {height for height, _ in sizes} == set(range(320, 961, 32))
    assert all(height == width for height, width in sizes)
    again = [drawn_size((640, 640), stride=32, seed=0, step=step) for step in range(5)]
    assert again == [drawn_size((640, 640), stride=32, seed=0, step=step) for step in range(5)]
    height, width = drawn_size((320, 640), stride=32, seed=0, step=3)
    assert height % 32 == width % 32 == 0
    assert abs(height - width / 2) < 32


def test_rescaling_takes_the_boxes_along():
    images = torch.rand(1, 3, 64, 32)
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[8.0, 16.0, 24.0, 48.0]]))
    bigger, moved = rescale(images, targets, (128, 96))
    assert bigger.shape == (1, 3, 128, 96)
    torch.testing.assert_close(moved.boxes, torch.tensor([[24.0, 32.0, 72.0, 96.0]]))
    same, unmoved = rescale(images, targets, (64, 32))
    assert same is images
    assert unmoved is targets


def test_profile_names_the_parts():
    clock = StepClock(CPU, enabled=True)
    clock.start()
    for part in ("data", "forward", "data"):
        clock.end(part)
    assert list(clock.seconds) == ["data", "forward"]
    assert "forward" in clock.text()
    silent = StepClock(CPU)
    silent.end("data")
    assert silent.seconds == {}


# whole runs


def config(flags, *more):
    argv = [*flags, *map(str, more)]
    return parse(TrainConfig, argv, prog="train.py", description="")


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_all_its_files(train_flags, tmp_path, capsys):
    flags = [flag for flag in train_flags if flag != "--noplots"]
    metrics = fit(config(flags, "--epochs", 2, "--save-period", 1, "--profile", "--cos-lr"))
    folder = tmp_path / "runs" / "exp"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        *("weights/last.pt", "weights/best.pt", "weights/epoch0.pt", "weights/epoch1.pt"),
        *("opt.yaml", "hyp.yaml", "spec.yaml", "results.csv", "results.png", "labels.jpg"),
        *("train_batch0.jpg", "train_batch1.jpg", "train_batch2.jpg"),
        *("PR_curve.png", "F1_curve.png", "P_curve.png", "R_curve.png", "confusion_matrix.png"),
        *("val_batch0_labels.jpg", "val_batch0_pred.jpg"),
    }
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    best = max(
        float(r["metrics/mAP_0.5"]) * 0.1 + float(r["metrics/mAP_0.5:0.95"]) * 0.9 for r in rows
    )
    assert metrics.fitness == pytest.approx(best, abs=1e-6)
    assert yaml.safe_load((folder / "opt.yaml").read_text())["imgsz"] == 64
    assert yaml.safe_load((folder / "hyp.yaml").read_text())["lr0"] == 0.01
    assert load_spec(str(folder / "spec.yaml")).layers[0].block == "Conv"
    last = load_checkpoint(folder / "weights" / "last.pt")
    assert last["train_state"] is None
    assert last["names"] == ["red", "green", "blue"]
    assert load_detector(str(folder / "weights" / "best.pt"), device="cpu").names == (
        "red",
        "green",
        "blue",
    )
    told = capsys.readouterr().out
    for word in ("settings:", "Class", "time: data", "AutoAnchor", str(folder)):
        assert word in told


def test_without_validation_only_the_last_epoch_is_measured(train_flags, tmp_path):
    fit(config(train_flags, "--epochs", 2, "--noval", "--nosave"))
    rows = rows_of(tmp_path / "runs" / "exp")
    assert rows[0]["metrics/mAP_0.5"] == ""
    assert rows[1]["metrics/mAP_0.5"] != ""
    assert (tmp_path / "runs" / "exp" / "weights" / "best.pt").is_file()


def test_patience_ends_a_run_that_gets_no_better(train_flags, tmp_path, monkeypatch):
    real = loop._row
    monkeypatch.setattr(
        loop,
        "_row",
        lambda run, metrics: {**real(run, metrics), "fitness": -run.state.epoch / 100},
    )
    fit(config(train_flags, "--epochs", 9, "--patience", 2))
    assert len(rows_of(tmp_path / "runs" / "exp")) == 3


def test_nan_weights_end_the_run_and_are_never_saved(train_flags, tmp_path, monkeypatch):
    def poison(run, index, batch):
        if (run.state.epoch, index) == (1, 2):
            with torch.no_grad():
                next(run.state.model.parameters()).fill_(torch.nan)

    monkeypatch.setattr(loop, "draw_batch", poison)
    with pytest.raises(NonFiniteError, match="epoch 1, batch 2"):
        fit(config(train_flags, "--epochs", 3))
    for name in ("last.pt", "best.pt"):
        saved = load_checkpoint(tmp_path / "runs" / "exp" / "weights" / name)
        assert all(bool(value.isfinite().all()) for value in saved["model"].values())


def test_weights_start_a_run_and_frozen_rows_stay(train_flags, tmp_path):
    fit(config(train_flags, "--epochs", 1, "--name", "first"))
    best = tmp_path / "runs" / "first" / "weights" / "best.pt"
    index = train_flags.index("--cfg")
    flags = train_flags[:index] + train_flags[index + 2 :]  # the model comes from the checkpoint
    fit(config(flags, "--epochs", 1, "--name", "second", "--weights", best, "--freeze", "backbone"))
    old, new = (
        load_checkpoint(tmp_path / "runs" / name / "weights" / "best.pt")["model"]
        for name in ("first", "second")
    )
    backbone = [key for key in old if key.startswith(tuple(f"model.{row}." for row in range(6)))]
    assert backbone
    assert all(torch.equal(old[key], new[key]) for key in backbone)
    assert any(not torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    "more",
    [
        ("--multi-scale",),
        ("--rect",),
        ("--optimizer", "AdamW", "--single-cls"),
        ("--close-mosaic", "1", "--label-smoothing", "0.1", "--grad-clip", "0"),
    ],
)
def test_options_train_and_change_the_result(train_flags, tmp_path, more):
    fit(config(train_flags, "--epochs", 1, "--name", "plain"))
    fit(config(train_flags, "--epochs", 1, "--name", "other", *more))
    plain, other = (rows_of(tmp_path / "runs" / name)[0] for name in ("plain", "other"))
    names = ("train/box_loss", "train/obj_loss", "train/cls_loss")
    assert [plain[name] for name in names] != [other[name] for name in names]
    saved = load_checkpoint(tmp_path / "runs" / "other" / "weights" / "best.pt")
    assert len(saved["names"]) == (1 if "--single-cls" in more else 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--sync-bn",), "CUDA only"),
        (("--amp", "fp16"), "--amp off"),
        (("--rect", "--multi-scale"), "exclude"),
        (("--freeze", "nowhere"), "neither a row"),
        (("--epochs", "0"), "at least 1"),
        (("--batch", "0"), "positive or -1"),
        (("--optimiser", "SGD"), "--optimizer"),
        (("--hyp", "nosuch"), "no such file"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_no_folder(train_flags, tmp_path, more, message):
    if "--amp" in more and torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(UserError, match=message):
        fit(config(train_flags, *more))
    assert not (tmp_path / "runs").exists()


def test_a_model_without_anchors_gets_those_of_the_data(train_flags, tiny_model, tmp_path, capsys):
    bare = tmp_path / "bare.yaml"
    text = tiny_model.read_text().splitlines()
    bare.write_text("\n".join("anchors: 2" if line[:7] == "anchors" else line for line in text))
    fit(config(train_flags, "--cfg", bare, "--epochs", 1, "--noautoanchor"))
    assert "1.0000 with new anchors" in capsys.readouterr().out
    model = load_detector(str(tmp_path / "runs" / "exp" / "weights" / "best.pt"), device="cpu")
    pixels = model.head.anchors * torch.tensor(model.stride).view(-1, 1, 1)
    assert pixels.shape == (3, 2, 2)
    areas = pixels.prod(-1).flatten()
    assert torch.equal(areas, areas.sort().values)
    assert float(pixels.min()) > 8  # boxes are 12 to 40 px
    assert float(pixels.max()) < 50


def test_odd_sizes_are_rounded_up_and_said(train_flags, tmp_path, capsys):
    fit(config(train_flags, "--imgsz", 70, "--epochs", 1))
    assert "96 is used" in capsys.readouterr().err
    opt = yaml.safe_load((tmp_path / "runs" / "exp" / "opt.yaml").read_text())
    assert opt["imgsz"] == 96


def test_batch_minus_one_on_a_cpu_is_said(train_flags, tmp_path, capsys):
    fit(config(train_flags, "--batch-size", -1, "--epochs", 1))
    assert "on a CPU the batch is 16" in capsys.readouterr().out

"""One batch and one epoch: updates, accumulation, values that are not finite, stops."""

import contextlib
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data.loading.sample import Batch
from engine import distributed
from engine.distributed import Distributed
from engine.train import step
from engine.train.config import TrainConfig
from engine.train.ema import ModelEma
from engine.train.interrupts import StopRequest
from engine.train.loading import ahead
from engine.train.model import ForwardAndLoss, to_network
from engine.train.optimizer import Schedule, build_optimizer, trainable
from engine.train.state import NonFiniteError, StepClock, TrainState
from engine.train.step import (
    check_finite,
    console_header,
    console_row,
    draw_batch,
    rescale,
    train_epoch,
)
from models.builder import build_detector
from models.losses.anchor import AnchorLoss
from models.yaml.parser import load_spec
from utils.boxes import Targets
from utils.hyp import Hyperparameters


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


def batches_of(count):
    return [batch_of(2, seed) for seed in range(count)]


@pytest.fixture
def new_run(tiny_model, device):
    """Settings and hyper-parameters as keywords -> what a step needs of a fresh run."""

    def build(*, steps=4, batch_size=2, scale=None, ranks=1, **hyp):
        torch.manual_seed(0)
        recipe = Hyperparameters(warmup_epochs=0, **hyp)
        model = build_detector(load_spec(str(tiny_model)), classes=3).to(device).train()
        schedule = Schedule(recipe, epochs=1, steps_per_epoch=steps, batch_size=batch_size)
        optimizer = build_optimizer(model, "SGD", recipe, weight_decay=schedule.weight_decay)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, enabled=bool(scale))
        world = Distributed(device, world_size=ranks)
        loss = AnchorLoss(model, recipe, image_size=64)
        return SimpleNamespace(
            state=TrainState(model, ModelEma(model), optimizer, scaler, device),
            config=TrainConfig(noplots=True),
            world=world,
            schedule=schedule,
            forward_and_loss=ForwardAndLoss(model, loss, world),
            no_sync=contextlib.nullcontext,
            clock=StepClock(device),
            emit=lambda event: None,
        )

    return build


@pytest.fixture
def at_batch(monkeypatch):
    """(index, action): call the action just before that batch."""

    def arrange(index, act):
        def draw(run, batch):
            if run.state.batches == index:
                act()

        monkeypatch.setattr(step, "draw_batch", draw)

    return arrange


def run_epoch(run, batches):
    return train_epoch(run, ahead(batches, run.state.device), StopRequest())


def poison_gradients(state, wanted=lambda: True):
    """Gradients of the head become NaN while `wanted` holds."""
    state.model.head.m[0].bias.register_hook(
        lambda gradient: gradient * torch.nan if wanted() else gradient
    )


def test_accumulated_batches_make_the_same_update_as_one_large_batch(new_run):
    """With statistics fixed and equal box counts, 2 x 2 images accumulate to the step of 4."""
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
        # objectness alone is a plain mean over images
        run = new_run(steps=len(chunks), batch_size=size, nbs=4, box=0.0, cls=0.0)
        for module in run.state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert run_epoch(run, chunks)
        assert run.state.ema.updates == 1
        assert run.state.pending == 0
        results.append([p.detach().clone() for p in run.state.model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_left_at_the_very_end_are_not_lost(new_run):
    run = new_run(steps=3, nbs=64)  # 32 batches per update
    run_epoch(run, batches_of(3))
    assert run.state.ema.updates == 1


def test_only_an_update_exchanges_gradients_between_ranks(new_run):
    """The other backward passes run within DistributedDataParallel.no_sync."""
    log = []

    @contextlib.contextmanager
    def no_sync():
        log.append("kept")
        yield

    run = new_run(steps=5, nbs=4)
    run.no_sync, inner = no_sync, run.forward_and_loss
    run.forward_and_loss = lambda *batch: log.append("forward") or inner(*batch)
    run_epoch(run, batches_of(5))
    assert log == ["kept", "forward", "forward"] * 2 + ["forward"]  # the last step updates


def test_waiting_gradients_are_averaged_over_ranks_before_they_are_saved(new_run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        distributed, "all_reduce_sum", lambda value: calls.append(value.ndim) or value.detach() * 4
    )
    alone, several = new_run(nbs=8), new_run(nbs=8, ranks=2)
    several.forward_and_loss.world = alone.world  # whose loss adds up nothing
    for run in (alone, several):
        run_epoch(run, batches_of(3))
    pairs = zip(*(trainable(run.state.optimizer) for run in (alone, several)), strict=True)
    for mine, averaged in pairs:
        torch.testing.assert_close(averaged.grad, mine.grad * 2)
    calls.clear()
    run_epoch(several, batches_of(1))  # which updates: nothing waits
    assert calls == [0]  # only whether to stop


def test_few_images_are_learned_by_heart(new_run):
    run = new_run(steps=60, batch_size=4, nbs=4, lr0=0.02)
    fixed = batch_of(4, 7, boxes=6)
    losses = []
    for _ in range(60):
        before = run.state.losses.sum().item()
        assert run_epoch(run, [fixed]) == (run.state.batches == 60)
        losses.append(run.state.losses.sum().item() - before)
    assert losses[-1] < 0.6 * losses[0]


def test_mean_losses_are_over_the_batches_so_far_and_printed(new_run, device):
    run, batch = new_run(steps=2), batch_of(2, 1)
    on_device = batch.to(device)
    _, first = run.forward_and_loss(on_device.images, on_device.targets)
    run_epoch(run, [batch])
    means = run.state.mean_losses()
    torch.testing.assert_close(means[0], first[0], rtol=1e-4, atol=1e-6)
    line = console_row(run, batch)
    assert len(line) == len(console_header(run))
    assert line.split()[2:] == [*(f"{value:.4g}" for value in means.tolist()), "3", "64"]


@pytest.mark.parametrize("last", [1, 3])  # 3: all ranks stop before the validation, together
def test_a_stop_is_obeyed_between_two_steps(new_run, at_batch, last):
    run, request = new_run(steps=4, nbs=2), StopRequest()
    at_batch(last, lambda: setattr(request, "signal", signal.SIGTERM))
    assert not train_epoch(run, ahead(batches_of(4), run.state.device), request)
    # on a GPU results, and with them requests, are read every ten steps and at the end
    assert run.state.batches == (last + 1 if run.state.device.type == "cpu" else 4)


def test_a_loss_that_is_no_number_names_the_batch(new_run, at_batch):
    run = new_run(steps=4, nbs=2)
    at_batch(2, lambda: run.state.model.head.m[0].bias.data.fill_(torch.nan))
    with pytest.raises(
        NonFiniteError, match=r"loss is not finite in epoch 1, batch 3, images image-2-0, image-2-1"
    ) as caught:
        run_epoch(run, batches_of(4))
    assert caught.value.exit_code == 1
    assert not run.state.all_finite()


def test_a_gradient_that_is_no_number_is_seen_at_the_same_step(new_run):
    run = new_run(steps=2, nbs=2)
    poison_gradients(run.state)
    with pytest.raises(NonFiniteError, match="gradient is not finite in epoch 1, batch 1"):
        run_epoch(run, batches_of(2))


def test_fp16_that_skips_every_update_ends_the_run(new_run):
    """The scaler halves its scale at each of them; without an end it falls to 0 in silence."""
    run = new_run(steps=12, nbs=2, scale=8.0)
    state = run.state
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    poison_gradients(state)
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite in epoch 1, batch \d"):
        run_epoch(run, batches_of(12))
    assert 4 <= state.batches < 12 or state.device.type == "cuda"
    assert state.ema.updates == 0
    for parameter, start in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(parameter, start)


def test_fp16_may_skip_some_updates_which_are_not_averaged(new_run):
    run = new_run(steps=6, nbs=2, scale=8.0)
    poison_gradients(run.state, lambda: run.state.batches in {0, 3})
    assert run_epoch(run, batches_of(6))
    assert run.state.scaler.get_scale() == 2.0
    assert run.state.ema.updates == 4


def test_the_first_bad_batch_of_a_window_is_named(device):
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = SimpleNamespace(scaler=scaler, epoch=3)
    noted = [
        (7 + index, (f"image-{index}",), torch.tensor([value, 0.0], device=device))
        for index, value in enumerate([1.0, float("inf"), float("nan")])
    ]
    check_finite(state, noted[:1])
    with pytest.raises(NonFiniteError, match=r"the loss .* epoch 4, batch 9, images image-1;"):
        check_finite(state, noted)


def test_pixels_become_floats_in_the_wanted_order(device):
    images = torch.tensor([0, 51, 255], dtype=torch.uint8, device=device)
    ready = to_network(images.view(1, 3, 1, 1).expand(2, 3, 4, 5))
    assert ready.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ready[0, :, 0, 0].cpu(), torch.tensor([0.0, 0.2, 1.0]))


def test_batches_are_on_the_device_in_order_and_none_is_lost(device):
    taken = []

    def loaded():
        for number, batch in enumerate(batches_of(5)):
            taken.append(number)
            yield batch

    for count, batch in enumerate(ahead(loaded(), device), 1):
        expected = batch_of(2, count - 1)
        assert batch.images.device.type == device.type
        assert torch.equal(batch.images.cpu(), expected.images)
        assert torch.equal(batch.targets.boxes.cpu(), expected.targets.boxes)
        assert batch.image_ids == expected.image_ids
        # on CUDA the next one is under way
        assert len(taken) == (count if device.type == "cpu" else min(count + 1, 5))
    assert len(taken) == 5
    assert not list(ahead([], device))


def test_multi_scale_draws_multiples_of_the_stride_within_half():
    images = torch.rand(1, 3, 32, 64)
    targets = Targets(torch.tensor([0]), torch.tensor([1]), torch.tensor([[8.0, 16.0, 24.0, 32.0]]))
    seen, batch = set(), Batch(images, targets, (), ("a",))
    for number in range(100):
        scaled = rescale(batch, stride=4, seed=0, step=number)
        height, width = scaled.images.shape[2:]
        seen.add(width)
        assert height % 4 == 0
        assert 0 <= height - width / 2 < 4
        expected = targets.boxes * torch.tensor([width / 64, height / 32] * 2)
        torch.testing.assert_close(scaled.targets.boxes, expected)
        assert width != 64 or torch.equal(scaled.images, images)
        again = rescale(batch, stride=4, seed=0, step=number)
        assert torch.equal(again.images, scaled.images)
    assert seen == set(range(32, 97, 4))


@pytest.mark.parametrize(("by_flag", "by_recipe"), [(2, 0), (0, 2), (2, 4)])
def test_the_first_batches_and_the_first_one_without_mosaic_are_drawn(
    by_flag, by_recipe, monkeypatch, tmp_path
):
    drawn = []
    monkeypatch.setattr(step, "plot_batch", lambda batch, index, path: drawn.append(path.name))
    run = SimpleNamespace(
        state=SimpleNamespace(epoch=0, batches=0),
        config=TrainConfig(epochs=5, close_mosaic=by_flag),
        hyp=Hyperparameters(close_mosaic=by_recipe),
        world=SimpleNamespace(is_main=True),
        train=None,
        folder=tmp_path,
    )
    for epoch, batches in [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (3, 0), (3, 1), (4, 0)]:
        run.state.epoch, run.state.batches = epoch, batches
        draw_batch(run, batch_of(1, 0))
    assert drawn == [f"train_batch{name}.jpg" for name in (0, 1, 2, "_no_mosaic")]


def test_profile_names_the_parts(device):
    clock = StepClock(device, enabled=True)
    for part in ("data", "forward", "data"):
        clock.end(part)
    assert list(clock.seconds) == ["data", "forward"]
    assert "forward" in clock.text()
    silent = StepClock(device)
    silent.end("data")
    assert not silent.seconds

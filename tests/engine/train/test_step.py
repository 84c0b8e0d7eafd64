"""One batch and one epoch: updates, accumulation, values that are not finite, stops."""

import contextlib
import signal

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
from engine.train.optimizer import build_optimizer, trainable
from engine.train.schedule import Schedule
from engine.train.state import TrainState
from engine.train.step import (
    FiniteGuard,
    NonFiniteError,
    StepClock,
    StepPlan,
    average_gradients,
    drawn_size,
    rescale,
    to_network,
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
    """Settings and hyper-parameters as keywords -> a fresh state and its plan."""

    def build(*, steps=4, batch_size=2, scale=None, ranks=1, no_sync=contextlib.nullcontext, **hyp):
        torch.manual_seed(0)
        recipe = Hyperparameters(warmup_epochs=0, **hyp)
        model = build_detector(load_spec(str(tiny_model)), classes=3).to(device).train()
        schedule = Schedule(recipe, epochs=1, steps_per_epoch=steps, batch_size=batch_size)
        optimizer = build_optimizer(model, "SGD", recipe, weight_decay=schedule.weight_decay)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, enabled=bool(scale))
        state = TrainState(model, ModelEma(model), optimizer, scaler, device)
        state.start_epoch(0)
        loss = AnchorLoss(model, recipe, image_size=64)
        world = Distributed(device, world_size=ranks)
        return state, StepPlan(model, loss, schedule, TrainConfig(), world, no_sync=no_sync)

    return build


def run_epoch(state, plan, batches, *, request=None, on_batch=None):
    return train_epoch(
        state,
        plan,
        batches,
        request=request or StopRequest(),
        clock=StepClock(state.device),
        on_batch=on_batch,
        progress=False,
    )


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
        state, plan = new_run(steps=len(chunks), batch_size=size, nbs=4, box=0.0, cls=0.0)
        for module in state.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        assert run_epoch(state, plan, chunks)
        assert state.ema.updates == 1
        assert state.pending == 0
        results.append([p.detach().clone() for p in state.model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_left_at_the_very_end_are_not_lost(new_run):
    state, plan = new_run(steps=3, nbs=64)  # 32 batches per update
    run_epoch(state, plan, batches_of(3))
    assert state.ema.updates == 1


def test_only_an_update_exchanges_gradients_between_ranks(new_run):
    """The other backward passes run within DistributedDataParallel.no_sync."""
    log = []

    @contextlib.contextmanager
    def no_sync():
        log.append("kept")
        yield

    state, plan = new_run(steps=5, nbs=4, no_sync=no_sync)
    forward = plan.forward.forward
    state.model.forward = lambda images: log.append("forward") or forward(images)
    run_epoch(state, plan, batches_of(5))
    assert log == ["kept", "forward", "forward"] * 2 + ["forward"]  # the last step updates


def test_waiting_gradients_are_averaged_over_ranks_before_they_are_saved(new_run, monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda value: value.detach() * 4)
    state, plan = new_run(steps=4, nbs=8)
    run_epoch(state, plan, batches_of(3))
    alone = [parameter.grad for parameter in trainable(state.optimizer)]
    average_gradients(trainable(state.optimizer), 2)
    for parameter, gradient in zip(trainable(state.optimizer), alone, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 2)
    calls = []
    monkeypatch.setattr(step, "average_gradients", lambda *arguments: calls.append(arguments[1]))
    for batches in (3, 4):  # after the fourth nothing waits
        run_epoch(*new_run(steps=4, nbs=8, ranks=2), batches_of(batches))
    assert calls == [2]


def test_few_images_are_learned_by_heart(new_run):
    state, plan = new_run(steps=60, batch_size=4, nbs=4, lr0=0.02)
    fixed = batch_of(4, 7, boxes=6)
    losses = []
    for _ in range(60):
        before = state.losses.sum().item()
        assert run_epoch(state, plan, [fixed]) == (state.batches == 60)
        losses.append(state.losses.sum().item() - before)
    assert losses[-1] < 0.6 * losses[0]


def test_mean_losses_are_over_the_batches_so_far(new_run, device):
    state, plan = new_run(steps=2)
    batch = batch_of(2, 1)
    on_device = batch.to(device)
    first = plan.loss(plan.forward(to_network(on_device.images)), on_device.targets)
    run_epoch(state, plan, [batch])
    torch.testing.assert_close(state.mean_losses()[0], first.box.detach(), rtol=1e-4, atol=1e-6)
    assert state.batches == 1


@pytest.mark.parametrize("last", [1, 3])  # 3: all ranks stop before the validation, together
def test_a_stop_is_obeyed_between_two_steps(new_run, last):
    state, plan = new_run(steps=4, nbs=2)
    request = StopRequest()

    def stop(index, batch):
        if index == last:
            request.signal = signal.SIGTERM

    assert not run_epoch(state, plan, batches_of(4), request=request, on_batch=stop)
    # on a GPU results, and with them requests, are read every ten steps and at the end
    assert state.batches == (last + 1 if state.device.type == "cpu" else 4)


def test_a_loss_that_is_no_number_names_the_batch(new_run):
    state, plan = new_run(steps=4, nbs=2)

    def poison(index, batch):
        if index == 2:
            with torch.no_grad():
                state.model.head.m[0].bias[0] = torch.nan

    with pytest.raises(
        NonFiniteError, match=r"loss is not finite at epoch 0, batch 2, images image-2-0, image-2-1"
    ) as caught:
        run_epoch(state, plan, batches_of(4), on_batch=poison)
    assert caught.value.exit_code != 0
    assert not state.all_finite()


def test_a_gradient_that_is_no_number_is_seen_at_the_same_step(new_run):
    state, plan = new_run(steps=2, nbs=2)
    poison_gradients(state)
    with pytest.raises(NonFiniteError, match="gradient is not finite at epoch 0, batch 0"):
        run_epoch(state, plan, batches_of(2))


def test_fp16_that_skips_every_update_ends_the_run(new_run):
    """The scaler halves its scale at each of them; without an end it falls to 0 in silence."""
    state, plan = new_run(steps=12, nbs=2, scale=8.0)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    poison_gradients(state)
    with pytest.raises(NonFiniteError, match=r"the gradient is not finite at epoch 0, batch \d"):
        run_epoch(state, plan, batches_of(12))
    assert 4 <= state.batches < 12 or state.device.type == "cuda"
    assert state.ema.updates == 0
    for parameter, start in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(parameter, start)


def test_fp16_may_skip_some_updates_which_are_not_averaged(new_run):
    state, plan = new_run(steps=6, nbs=2, scale=8.0)
    poison_gradients(state, lambda: state.batches in {0, 3})
    assert run_epoch(state, plan, batches_of(6))
    assert state.scaler.get_scale() == 2.0
    assert state.ema.updates == 4


def test_the_guard_finds_the_first_bad_batch_of_a_window(device):
    guard = FiniteGuard(device, torch.amp.GradScaler(device.type, enabled=False))
    for index, value in enumerate([1.0, float("inf"), float("nan")]):
        values = torch.tensor([value, 0.0], device=device)
        guard.note(values, epoch=3, batch=batch_of(1, index), index=index)
    with pytest.raises(NonFiniteError, match="epoch 3, batch 1, images image-1-0"):
        guard.check()


def test_pixels_become_floats_in_the_wanted_order(device):
    images = torch.tensor([0, 51, 255], dtype=torch.uint8, device=device)
    ready = to_network(images.view(1, 3, 1, 1).expand(2, 3, 4, 5))
    assert ready.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ready[0, :, 0, 0].cpu(), torch.tensor([0.0, 0.2, 1.0]))


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


def test_profile_names_the_parts(device):
    clock = StepClock(device, enabled=True)
    clock.start()
    for part in ("data", "forward", "data"):
        clock.end(part)
    assert list(clock.seconds) == ["data", "forward"]
    assert "forward" in clock.text()
    silent = StepClock(device)
    silent.end("data")
    assert silent.seconds == {}

import math

import pytest

from engine.train.optimizer import Schedule
from utils.hyp import Hyperparameters

HYP = Hyperparameters()


def schedule(**changes):
    values = {"epochs": 100, "steps_per_epoch": 50, "batch_size": 16, **changes}
    return Schedule(values.pop("hyp", HYP), **values)


def test_warm_up_starts_and_ends_as_published():
    plan = schedule()
    assert plan.warmup_steps == 150
    first = plan.at(0)
    assert first.lr == (0.1, 0.0, 0.0)
    assert first.momentum == 0.8
    assert first.accumulate == 1
    last = plan.at(150)
    peak = 0.01 * (0.01 + 0.99 * (1 - 3 / 100))
    assert last.lr == (peak, peak, peak)
    assert last.momentum == 0.937
    assert last.accumulate == 4


def test_half_way_through_the_warm_up_everything_is_half_way():
    rates = schedule().at(75)
    peak = 0.01 * (0.01 + 0.99 * (1 - 1 / 100))  # epoch 1
    assert rates.lr[0] == pytest.approx((0.1 + peak) / 2)
    assert rates.lr[1] == rates.lr[2] == pytest.approx(peak / 2)
    assert rates.momentum == pytest.approx((0.8 + 0.937) / 2)
    assert rates.accumulate == 2  # round(2.5) to even


def test_warm_up_lasts_at_least_a_hundred_batches_and_can_be_switched_off():
    assert schedule(steps_per_epoch=5).warmup_steps == 100
    none = schedule(hyp=Hyperparameters(warmup_epochs=0))
    assert none.at(0).lr == (0.01, 0.01, 0.01)
    assert none.at(0).accumulate == 4


@pytest.mark.parametrize(
    ("cosine", "fifth"),
    [(False, 0.01 + 0.99 * 0.8), (True, 0.01 + 0.99 * (1 + math.cos(math.pi / 5)) / 2)],
)
def test_the_fall_reaches_lrf_after_the_last_epoch(cosine, fifth):
    plan = schedule(epochs=10, cosine=cosine)
    found = [plan.factor(epoch) for epoch in (0, 2, 5, 10)]
    assert found == pytest.approx([1, fifth, 0.505, 0.01])


def test_a_flat_rate_may_come_before_the_cosine():
    plan = schedule(epochs=10, hyp=Hyperparameters(cosine=0.5), cosine=True)
    found = [plan.factor(epoch) for epoch in (0, 4, 5, 6, 10)]
    sixth = 0.01 + 0.99 * (1 + math.cos(math.pi / 5)) / 2
    assert found == pytest.approx([1, 1, 1, sixth, 0.01])
    whole = schedule(hyp=Hyperparameters(cosine=1))
    assert whole.factor(30) == schedule(cosine=True).factor(30)


def test_the_rate_changes_per_epoch_not_per_step():
    plan = schedule()
    assert plan.at(200).lr == plan.at(249).lr
    assert plan.at(249).lr > plan.at(250).lr


@pytest.mark.parametrize(
    ("batch", "accumulate", "decay"),
    [(16, 4, 5e-4), (64, 1, 5e-4), (128, 1, 1e-3), (24, 3, 5.625e-4)],
)
def test_decay_follows_the_images_of_an_update(batch, accumulate, decay):
    plan = schedule(batch_size=batch)
    assert plan.accumulate == accumulate
    assert plan.weight_decay == pytest.approx(decay)


def test_adaptive_optimizers_do_not_start_biases_above_lr0():
    assert schedule(adaptive=True).at(0).lr[0] == HYP.lr0


@pytest.mark.parametrize(
    ("epochs", "steps", "batch", "nominal", "accumulate"),
    [
        (60, 13, 16, 16, 1),  # 780 batches: not even all of them are 1000 updates
        (200, 13, 16, 32, 2),
        (300, 13, 16, 48, 3),  # 64 images would make 975
        (300, 7393, 16, 64, 4),  # COCO
        (10, 2, 128, 64, 1),
    ],
)
def test_a_short_run_makes_more_and_smaller_updates(epochs, steps, batch, nominal, accumulate):
    hyp = Hyperparameters(min_updates=1000)
    plan = schedule(hyp=hyp, epochs=epochs, steps_per_epoch=steps, batch_size=batch)
    batches = epochs * steps
    assert plan.shortened().startswith(
        f"an update for every {batch * accumulate} images instead of 64 (nbs), so that {batches}"
        f" batches make {batches // accumulate} updates"
    )
    assert plan.nominal_batch == nominal
    assert plan.accumulate == plan.at(plan.warmup_steps).accumulate == accumulate
    assert plan.weight_decay == pytest.approx(5e-4 * batch * accumulate / nominal)
    assert schedule(epochs=epochs, steps_per_epoch=steps, batch_size=batch).nominal_batch == 64

import copy
import math

import pytest
import torch
from torch import nn

from engine.train.ema import ModelEma


def model(device="cpu"):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(2, 2).half())
    return nn.Sequential(*layers).to(device)


def changed(net, step):
    with torch.no_grad():
        for value in net.state_dict().values():
            value.add_(step)


def states(ema):
    return {key: value.clone() for key, value in ema.model.state_dict().items()}


def decay(updates):
    """Published: 0.9999 with a ramp of 2000 updates."""
    return 0.9999 * (1 - math.exp(-updates / 2000))


@pytest.mark.parametrize("before", [0, 100_000])
def test_all_floating_state_is_averaged_and_counters_are_copied(device, before):
    net = model(device)
    ema = ModelEma(net)
    ema.load_state_dict({"model": net.state_dict(), "updates": before})
    expected = states(ema)
    for step in (1, 2):
        changed(net, step)
        ema.update()
        for key, value in net.state_dict().items():
            weight = 1 - decay(before + step) if value.is_floating_point() else 1
            expected[key] = expected[key] + (value - expected[key]) * weight
    for key, value in states(ema).items():
        rtol = 1e-3 if value.dtype == torch.half else 1e-6
        torch.testing.assert_close(value, expected[key].to(value.dtype), rtol=rtol, atol=0)
    assert ema.model[1].running_mean.abs().max() > 0
    assert int(ema.model[1].num_batches_tracked) == 3
    assert ema.updates == before + 2


def test_an_update_that_was_skipped_does_not_count(device):
    net = model(device)
    ema, twin = ModelEma(net), ModelEma(net)
    changed(net, 1)
    before = states(ema)
    ema.update(torch.tensor(False, device=device))
    floating = [key for key, value in before.items() if value.is_floating_point()]
    assert all(torch.equal(states(ema)[key], before[key]) for key in floating)
    assert ema.updates == 0
    ema.update(torch.tensor(True, device=device))
    twin.update()
    for key, value in states(twin).items():
        torch.testing.assert_close(states(ema)[key], value, rtol=1e-3, atol=1e-6)
    assert ema.updates == 1


def test_the_average_does_not_learn_and_stays_in_eval():
    ema = ModelEma(model().train())
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_a_restored_average_continues_exactly(device):
    net = model(device)
    other = copy.deepcopy(net)
    ema, restored = ModelEma(net), ModelEma(other)
    changed(net, 1)
    ema.update()
    other.load_state_dict(net.state_dict())
    restored.load_state_dict(ema.state_dict())
    ema.update()
    restored.update()
    assert restored.updates == 2
    for ours, theirs in zip(restored.tensors(), ema.tensors(), strict=True):
        assert torch.equal(ours, theirs)

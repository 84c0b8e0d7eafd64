import math

import torch
from torch import nn

from engine.train.ema import ModelEma


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(2, 2).half())


def test_decay_is_the_published_ramp():
    assert ModelEma.decay(1) == 0.9999 * (1 - math.exp(-1 / 2000))
    assert ModelEma.decay(100_000) == 0.9999


def test_all_floating_state_is_averaged_and_counters_copied():
    net = model()
    ema = ModelEma(net)
    before = {key: value.clone() for key, value in ema.model.state_dict().items()}
    for step in (1, 2):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.add_(step)
        ema.update()
        decay = ModelEma.decay(step)
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                before[key] = before[key] * decay + value * (1 - decay)
            else:
                before[key] = value.clone()
    for key, value in ema.model.state_dict().items():
        torch.testing.assert_close(
            value, before[key], rtol=1e-3 if value.dtype == torch.half else 1e-6, atol=0
        )
    assert ema.model[1].running_mean.abs().max() > 0
    assert int(ema.model[1].num_batches_tracked) == 3


def test_the_average_does_not_learn_and_stays_in_eval():
    ema = ModelEma(model().train())
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_restored_average_goes_on_exactly():
    net, other = model(), model()
    ema, restored = ModelEma(net), ModelEma(other)
    with torch.no_grad():
        net[0].weight.mul_(2)
    ema.update()
    other.load_state_dict(net.state_dict())
    restored.load_state_dict(ema.state_dict())
    ema.update()
    restored.update()
    assert restored.updates == 2
    for ours, theirs in zip(restored.tensors(), ema.tensors(), strict=True):
        assert torch.equal(ours, theirs)

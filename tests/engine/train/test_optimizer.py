import pytest
import torch
from torch import nn

from engine.train.optimizer import (
    GROUPS,
    apply_rates,
    build_optimizer,
    parameter_groups,
    update_weights,
)
from engine.train.schedule import Rates
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.hyp import Hyperparameters

HYP = Hyperparameters()
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def net():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    return layers.to(memory_format=torch.channels_last)


def test_a_detector_is_split_into_biases_weights_and_norms():
    model = build_detector(load_spec("yolov5n"), classes=80)
    groups = parameter_groups(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert tuple(groups) == GROUPS
    assert len(groups["norms"]) == len(norms)
    assert len(groups["weights"]) == len(convolutions)
    assert len(groups["biases"]) == len(norms) + 3  # Detect's three convolutions have biases
    count = sum(p.numel() for group in groups.values() for p in group)
    assert count == 1_872_157


def test_frozen_parameters_are_left_out_and_only_weights_decay():
    model = net()
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, "SGD", HYP, weight_decay=0.25)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1, 1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.25, 0.0]


def test_sgd_moves_by_nesterov_momentum_and_decays_by_hand():
    model = net()
    optimizer = build_optimizer(model, "SGD", HYP, weight_decay=0.1)
    weight, bias = model[0].weight, model[0].bias
    start_w, start_b = weight.detach().clone(), bias.detach().clone()
    buffer_w, buffer_b = torch.zeros_like(start_w), torch.zeros_like(start_b)
    torch.manual_seed(1)
    for _ in range(3):
        apply_rates(optimizer, Rates((0.5, 0.2, 0.1), 0.9, 1))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 0.01
        grad_w, grad_b = weight.grad + 0.1 * start_w, bias.grad.clone()
        update_weights(optimizer, NO_SCALER, max_norm=0)
        buffer_w, buffer_b = 0.9 * buffer_w + grad_w, 0.9 * buffer_b + grad_b
        start_w = start_w - 0.2 * (grad_w + 0.9 * buffer_w)
        start_b = start_b - 0.5 * (grad_b + 0.9 * buffer_b)
        torch.testing.assert_close(weight.detach(), start_w)
        torch.testing.assert_close(bias.detach(), start_b)
        assert weight.grad is None


def test_gradients_are_clipped_to_the_norm():
    model = net()
    optimizer = build_optimizer(model, "SGD", HYP, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    apply_rates(optimizer, Rates((1.0, 1.0, 1.0), 0.0001, 1))
    norm = update_weights(optimizer, NO_SCALER, max_norm=10.0)
    assert norm.item() == pytest.approx(100 * count**0.5, rel=1e-5)
    moved = sum(
        ((new.detach() - old) ** 2).sum()
        for new, old in zip(model.parameters(), before, strict=True)
    )
    assert float(moved) ** 0.5 == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_takes_momentum_as_beta1_and_its_first_step_is_the_rate(name):
    model = net()
    optimizer = build_optimizer(model, name, HYP, weight_decay=0.0)
    apply_rates(optimizer, Rates((0.3, 0.2, 0.1), 0.85, 1))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.85, 0.999)] * 3
    before = model[0].bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update_weights(optimizer, NO_SCALER, max_norm=0)
    torch.testing.assert_close(model[0].bias.detach(), before - 0.3)


def test_fused_sgd_equals_the_plain_one_from_the_first_update():
    torch.manual_seed(0)
    ours, plain = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    plain.load_state_dict(ours.state_dict())
    fused = build_optimizer(ours, "SGD", Hyperparameters(), weight_decay=0.0)
    reference = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.937, nesterov=True)
    for buffers in fused.state.values():
        assert not buffers["momentum_buffer"].any()  # nothing left to an unwritten kernel
    for _ in range(3):
        images = torch.randn(2, 3, 8, 8)
        for model, optimizer in ((ours, fused), (plain, reference)):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)

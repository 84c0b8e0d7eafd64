"""Rows chosen by name, parameter groups, rates, and one update by hand."""

import copy

import pytest
import torch
from torch import nn

from engine.train.musgd import orthogonalised
from engine.train.optimizer import (
    Rates,
    Schedule,
    apply_rates,
    build_optimizer,
    freeze,
    load_optimizer,
    rate_scales,
    trainable,
    update_weights,
)
from models.builder import build_detector
from models.yaml.parser import load_spec
from utils.errors import UserError
from utils.hyp import Hyperparameters

HYP = Hyperparameters()
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def detector(tiny_model):
    """Rows 0 to 5 are its backbone, row 6 its head."""
    torch.manual_seed(0)
    model = build_detector(load_spec(str(tiny_model)), classes=2)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def yolov5n():
    """Its row 9 is named P5; the neck begins with row 10."""
    return build_detector(load_spec("yolov5n"), classes=80)


def net(device="cpu"):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    return layers.to(device, memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("items", "rows"),
    [
        (("3",), {0, 1, 2}),
        (("0",), set()),
        (("4", "2"), {2, 4}),
        (("backbone", "1"), set(range(6))),
        (("head",), {6}),
        ((), set()),
    ],
)
def test_frozen_rows_keep_weights_and_statistics(detector, items, rows):
    freeze(detector.train(), items)
    frozen = {
        index
        for index, layer in enumerate(detector.layers)
        if not any(parameter.requires_grad for parameter in layer.parameters())
    }
    assert frozen == rows
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    sum(item.sum() for item in detector(torch.rand(1, 3, 64, 64))).backward()
    statistics = [key for key in before if key.endswith("running_mean")]
    after = detector.state_dict()
    moved = {int(key.split(".")[1]) for key in statistics if not before[key].equal(after[key])}
    assert moved == set(range(6)) - rows
    for index, layer in enumerate(detector.layers):
        assert all((item.grad is None) == (index in rows) for item in layer.parameters())


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("8",), "only 7 rows"),
        (("bakbone",), "--freeze bakbone: neither a row .*did you mean 'backbone'"),
        (("7",), "nothing is left"),
        (("head", "backbone"), "nothing is left"),
    ],
)
def test_rows_that_cannot_be_frozen(detector, items, message):
    with pytest.raises(UserError, match=message):
        freeze(detector, items)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ((), {}),
        (("backbone=0.1", "head=2"), {**dict.fromkeys(range(6), 0.1), 6: 2.0}),
        (("backbone=0.1", "5=0.5"), {**dict.fromkeys(range(5), 0.1), 5: 0.5}),
        (("5=0.5", "backbone=0.1"), dict.fromkeys(range(6), 0.1)),
        (("3=1e-2",), {3: 0.01}),  # one number is that row, not the first three
    ],
)
def test_scales_by_row(detector, items, expected):
    scales = rate_scales(detector, items)
    for row, layer in enumerate(detector.layers):
        found = {scales.get(parameter, 1.0) for parameter in layer.parameters()}
        assert found == {expected.get(row, 1.0)}


def test_scales_of_named_rows_and_the_neck(yolov5n):
    scales = rate_scales(yolov5n, ["neck=0.5", "P5=0.25"])
    for row, scale in ((9, 0.25), (10, 0.5), (0, 1.0), (24, 1.0)):
        assert scales.get(next(yolov5n.layers[row].parameters()), 1.0) == scale


NO_FACTOR = "expected NAME=FACTOR with a positive factor"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        *((item, NO_FACTOR) for item in ("backbone", "=0.1", "backbone=x", "backbone=-1")),
        *((item, NO_FACTOR) for item in ("backbone=nan", "backbone=inf")),
        ("backbone=0", "use --freeze backbone"),
        ("bakbone=0.1", r"--lr-scale bakbone: neither a row .*did you mean 'backbone'"),
    ],
)
def test_scales_that_are_none(detector, item, message):
    with pytest.raises(UserError, match=message):
        rate_scales(detector, [item])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_scale_multiplies_the_rate_of_every_kind_of_parameter(detector, name):
    """Warm-up included; what is not named keeps the schedule's rates."""
    scales = rate_scales(detector, ["backbone=0.1"])
    optimizer = build_optimizer(detector, name, HYP, weight_decay=0.25, scales=scales)
    assert len(optimizer.param_groups) == 6
    assert set(map(id, trainable(optimizer))) == set(map(id, detector.parameters()))
    names = {id(value): key for key, value in detector.named_parameters()}
    schedule = Schedule(HYP, epochs=10, steps_per_epoch=50, batch_size=16)
    for step in (0, 40, 149, 150, 499):
        rates = schedule.at(step)
        apply_rates(optimizer, rates)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                bias = names[id(parameter)].endswith("bias")
                kind = 0 if bias else 1 if parameter.ndim > 1 else 2
                assert group["lr"] == rates.lr[kind] * scales.get(parameter, 1.0)
                assert group["weight_decay"] == (0.25 if kind == 1 else 0.0)


def test_without_scales_the_groups_are_the_three_of_old_checkpoints(detector):
    optimizer = build_optimizer(detector, "SGD", HYP, weight_decay=0.1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["lr_scale"]  # as checkpoints from before had it
        group["weight_decay"] = 9.0
    load_optimizer(optimizer, saved)
    apply_rates(optimizer, Rates((0.4, 0.2, 0.1), 0.9, 1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2, 0.1]
    # a run with more epochs may accumulate more batches, so the decay is this run's
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1, 0.0]


def test_frozen_rows_are_left_out_and_may_be_scaled(detector):
    freeze(detector, ["backbone"])
    scales = rate_scales(detector, ["backbone=0.1", "head=0.5"])
    optimizer = build_optimizer(detector, "SGD", HYP, weight_decay=0.0, scales=scales)
    assert set(trainable(optimizer)) == set(detector.layers[6].parameters())
    apply_rates(optimizer, Rates((0.4, 0.2, 0.1), 0.9, 1))
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {0.2, 0.1}


def test_a_detector_is_split_into_biases_weights_and_norms(yolov5n):
    groups = build_optimizer(yolov5n, "SGD", HYP, weight_decay=0.0).param_groups
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in yolov5n.modules())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in yolov5n.modules())
    # Detect's three convolutions have biases
    assert [len(group["params"]) for group in groups] == [norms + 3, convolutions, norms]
    assert sum(p.numel() for group in groups for p in group["params"]) == 1_872_157


def test_sgd_moves_by_nesterov_momentum_and_decays_by_hand(device):
    model = net(device)
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


def test_gradients_are_clipped_to_the_norm(device):
    model = net(device)
    optimizer = build_optimizer(model, "SGD", HYP, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    apply_rates(optimizer, Rates((1.0, 1.0, 1.0), 0.0001, 1))
    norm = update_weights(optimizer, NO_SCALER, max_norm=10.0)
    assert norm.item() == pytest.approx(100 * count**0.5, rel=1e-5)
    pairs = zip(model.parameters(), before, strict=True)
    moved = sum(((new.detach() - old) ** 2).sum() for new, old in pairs)
    assert float(moved) ** 0.5 == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_takes_momentum_as_beta1_and_its_first_step_is_the_rate(device, name):
    model = net(device)
    optimizer = build_optimizer(model, name, HYP, weight_decay=0.0)
    apply_rates(optimizer, Rates((0.3, 0.2, 0.1), 0.85, 1))
    assert [group["betas"] for group in optimizer.param_groups] == [(0.85, 0.999)] * 3
    before = model[0].bias.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    update_weights(optimizer, NO_SCALER, max_norm=0)
    torch.testing.assert_close(model[0].bias.detach(), before - 0.3)


def test_fused_sgd_equals_the_plain_one_from_the_first_update(device):
    torch.manual_seed(0)
    ours, plain = nn.Conv2d(3, 4, 3).to(device), nn.Conv2d(3, 4, 3).to(device)
    plain.load_state_dict(ours.state_dict())
    fused = build_optimizer(ours, "SGD", HYP, weight_decay=0.0)
    reference = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.937, nesterov=True)
    for buffers in fused.state.values():
        assert not buffers["momentum_buffer"].any()  # nothing left to an unwritten kernel
    for _ in range(3):
        images = torch.randn(2, 3, 8, 8, device=device)
        for model, optimizer in ((ours, fused), (plain, reference)):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def five_rounds(gradient):
    """Newton-Schulz of Muon on one matrix, as published."""
    x = gradient.flatten(1)
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.T if tall else x).view(gradient.shape)


def test_musgd_mixes_orthogonal_steps_with_those_of_sgd(device):
    """Against the formulas, one tensor at a time; matrices of one shorter side run together."""
    torch.manual_seed(0)
    shapes = {"wide": (4, 3, 3, 3), "square": (4, 4), "tall": (9, 4, 1, 1), "norm": (5,)}
    model = nn.ParameterDict({key: torch.randn(shape) for key, shape in shapes.items()}).to(device)
    expected = {key: value.detach().clone() for key, value in model.items()}
    moments = {key: torch.zeros_like(value) for key, value in expected.items()}
    hyp = Hyperparameters(lr0=0.1, momentum=0.9)
    optimizer = build_optimizer(model, "MuSGD", hyp, weight_decay=0.01)
    apply_rates(optimizer, Rates((0.3, 0.1, 0.2), 0.9, 1))
    for _ in range(3):
        for key, value in expected.items():
            model[key].grad = gradient = torch.randn_like(value)
            moments[key] = 0.9 * moments[key] + gradient
            step = gradient + 0.9 * moments[key]
            if key == "norm":
                value -= 0.2 * step
            else:
                side = max(value.flatten(1).shape)
                step = 0.5 * 0.2 * side**0.5 * five_rounds(step) + 0.5 * step
                value -= 0.1 * 0.01 * value + 0.1 * step
        optimizer.step()
        for key, value in expected.items():
            torch.testing.assert_close(model[key].detach(), value, rtol=1e-4, atol=1e-5)
    mixed = [torch.randn(30, 6, 3, 3), torch.randn(30, 40), torch.randn(60, 30), torch.randn(8, 30)]
    plain, filled = (orthogonalised(mixed, fill=fill) for fill in (False, True))
    for matrix, other in zip(plain, filled, strict=True):
        torch.testing.assert_close(matrix, other, rtol=1e-3, atol=1e-5)
        assert 0.5 < torch.linalg.svdvals(matrix.flatten(1)).min() < 1.3
    assert orthogonalised([torch.zeros(3, 5)], fill=True)[0].eq(0).all()


def test_musgd_is_restored_exactly():
    def trained(optimizer, model, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            model(torch.rand(2, 3, 8, 8)).sum().backward()
            update_weights(optimizer, NO_SCALER, max_norm=10.0)

    one, two = net(), net()
    first = build_optimizer(one, "MuSGD", HYP, weight_decay=0.1)
    trained(first, one, range(3))
    second = build_optimizer(two, "MuSGD", HYP, weight_decay=0.1)
    two.load_state_dict(one.state_dict())
    load_optimizer(second, copy.deepcopy(first.state_dict()))
    trained(first, one, range(3, 5))
    trained(second, two, range(3, 5))
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))

"""`prove`: a backbone equals its reference implementation; the table of what was proved."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builder import build_classifier
from models.profile.cost import count, parameters
from models.yaml.parser import load_classifier

Taps = Sequence[str] | Callable[[nn.Module, Tensor], Sequence[Tensor]]

TOLERANCE = 1e-4  # times max(1, largest value of the reference)
MACS_TOLERANCE = 1e-3
SIZES = (224, 200)  # pixels; 200 gives odd maps
LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
PROPERTY = "equality"
COLUMNS = (
    "backbone", "params", "MACs", "published", "logits", "taps", "negative control", "reference",
)  # fmt: skip


@pytest.fixture(scope="session")
def onnx_outputs() -> Callable[[nn.Module, Any], list[Tensor]]:
    """Export a module (in eval mode) and let onnxruntime run it on the same tensor or list."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")

    def run(module: nn.Module, inputs: Any) -> list[Tensor]:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (inputs,), file, dynamo=False, opset_version=17)
        onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
        session = onnxruntime.InferenceSession(file.getvalue())
        tensors = [inputs] if isinstance(inputs, Tensor) else inputs
        names = [item.name for item in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


@pytest.fixture
def prove(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Build a backbone by its name as a classifier and compare it with a reference.

    Parameters and MACs are compared with the given numbers; logits and every tap with those of
    `reference`, whose weights are made random, whose BN is calibrated, and whose state is then
    copied into ours.  `taps`: the reference's modules whose outputs are C2..C5, or a function.
    `mutate` damages a copy of our net, which must then differ.  A row for the table is recorded.
    """

    def run(
        name: str,
        reference: nn.Module,
        *,
        params: int,
        macs: int,
        taps: Taps,
        mutate: Callable[[nn.Module], None],
        reference_name: str,
        published: str = "-",
    ) -> None:
        net = build_classifier(load_classifier(name))
        counted = count(net, (1, 3, 224, 224)).macs
        assert parameters(reference) == params, "the reference is not what was measured"
        assert parameters(net) == params
        assert abs(counted - macs) <= MACS_TOLERANCE * macs, f"{counted} MACs, expected {macs}"
        randomise(reference)
        calibrate(reference, [make_images(8, (96, 96), seed) for seed in (1, 2)])
        copy_state(reference, net)
        logits, levels = compare(net, reference, taps)
        damaged = copy.deepcopy(net)
        mutate(damaged)
        control = max(*differences(damaged.eval(), reference, taps, min(SIZES)))
        assert control > TOLERANCE, f"the negative control differs by {control:.1e} only"
        record_property(
            PROPERTY,
            [name, f"{params:,}", f"{counted / 1e6:,.2f}M", published,
             f"{logits:.1e}", f"{levels:.1e}", f"differs, {control:.1e}", reference_name],
        )  # fmt: skip

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the rows of all proofs that passed, as a Markdown table."""
    rows = [
        value
        for report in terminalreporter.stats.get("passed", [])
        for key, value in report.user_properties
        if key == PROPERTY
    ]
    if not rows:
        return
    widths = [max(len(row[column]) for row in [COLUMNS, *rows]) for column in range(len(COLUMNS))]
    rule = ["-" * width for width in widths]
    terminalreporter.section("backbones equal to their references")
    for row in [COLUMNS, rule, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(f"| {' | '.join(cells)} |")
    terminalreporter.write_line(
        "logits, taps: largest difference over max(1, largest value); "
        f"{TOLERANCE:g} is allowed. MACs at 224 px."
    )


def make_images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Smooth shapes and noise: on noise alone the images of a batch look alike to a deep net."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(count, 3, 6, 6, generator=generator)
    noise = torch.randn(count, 3, *size, generator=generator)
    return F.interpolate(shapes, size=size, mode="bilinear") + 0.3 * noise


def randomise(net: nn.Module) -> None:
    """Weights of unit gain, biases and BN affine parameters that matter, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in leaves(net):
            weight, bias = leaf.weight, leaf.bias
            assert isinstance(weight, Tensor)
            if isinstance(leaf, nn.BatchNorm2d):
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            if isinstance(bias, Tensor):
                bias.normal_(0, 0.3, generator=generator)


def calibrate(net: nn.Module, batches: Iterable[Any]) -> None:
    """Give BN the statistics of the batches; nothing else is in training mode.

    With the initial statistics the outputs of some nets hardly depend on the image, and damage to
    the net would go unseen.
    """
    net.eval()
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()


def leaves(net: nn.Module) -> list[nn.Module]:
    """Convolutions, BN and linear layers in registration order."""
    return [part for part in net.modules() if isinstance(part, LEAVES)]


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Weights leaf by leaf, per type of layer; a 1x1 convolution may stand for a linear layer."""
    kinds: tuple[Any, ...] = LEAVES
    pair = []
    for net in (source, target):
        found = leaves(net)
        total = sum(parameters(leaf) for leaf in found)
        assert total == parameters(net), f"{parameters(net) - total} parameters are in no such leaf"
        pair.append(found)
    counts = [[sum(isinstance(leaf, kind) for leaf in found) for kind in LEAVES] for found in pair]
    if counts[0] != counts[1]:  # a linear layer there is a 1x1 convolution here
        kinds = ((nn.Conv2d, nn.Linear), nn.BatchNorm2d)
    names = [{part: name for name, part in net.named_modules()} for net in (source, target)]
    for kind in kinds:
        ones, others = ([leaf for leaf in found if isinstance(leaf, kind)] for found in pair)
        assert len(ones) == len(others), f"{kind}: {len(ones)} there, {len(others)} here"
        for one, other in zip(ones, others, strict=True):
            _copy_leaf(one, other, f"{names[0][one]} -> {names[1][other]}")


def _copy_leaf(one: Any, other: Any, where: str) -> None:
    assert isinstance(other, nn.BatchNorm2d) == isinstance(one, nn.BatchNorm2d), where
    if isinstance(one, nn.BatchNorm2d):
        assert (other.eps, other.momentum) == (one.eps, one.momentum), f"{where}: eps, momentum"
    else:
        assert (one.bias is None) == (other.bias is None), f"{where}: bias"
    state, shapes = one.state_dict(), other.state_dict()
    if type(one) is not type(other) and not isinstance(one, nn.BatchNorm2d):
        assert one.weight.numel() == other.weight.numel(), where
        state["weight"] = state["weight"].view(shapes["weight"].shape)
    found = {key: tuple(value.shape) for key, value in state.items()}
    expected = {key: tuple(value.shape) for key, value in shapes.items()}
    assert found == expected, f"{where}: shapes there and here"
    other.load_state_dict(state)


def compare(net: nn.Module, reference: nn.Module, taps: Taps) -> tuple[float, float]:
    """The largest relative differences of logits and of taps; every one within TOLERANCE."""
    net.eval()
    results = [differences(net, reference, taps, size) for size in SIZES]
    for size, (logits, levels) in zip(SIZES, results, strict=True):
        assert logits <= TOLERANCE, f"logits at {size} px differ by {logits:.1e}"
        assert levels <= TOLERANCE, f"taps at {size} px differ by {levels:.1e}"
    return max(logits for logits, _ in results), max(levels for _, levels in results)


def differences(net: Any, reference: nn.Module, taps: Taps, size: int) -> tuple[float, float]:
    """Relative difference of logits, and the largest one of the taps, on two images."""
    images = make_images(2, (size, size), seed=9)
    with torch.no_grad():
        expected, expected_taps = outputs(reference, taps, images)
        logits, found = net(images), net.taps(images)
    spread = (expected[0] - expected[1]).abs().max().item()
    assert spread > 100 * TOLERANCE, f"the reference sees no difference of images ({spread:.1e})"
    levels = [found[name] for name in sorted(found)]
    assert len(levels) == len(expected_taps), f"taps {sorted(found)}"
    each = [relative(*two) for two in zip(levels, expected_taps, strict=True)]
    return relative(logits, expected), max(each)


def outputs(reference: nn.Module, taps: Taps, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and taps of the reference."""
    if callable(taps):
        return reference(images), list(taps(reference, images))
    with kept_outputs([reference.get_submodule(name) for name in taps]) as kept:
        return reference(images), kept


@contextmanager
def kept_outputs(parts: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that fills with the outputs of these modules, in the given order, on each call."""
    kept: list[Tensor] = [torch.empty(0)] * len(parts)

    def keep(index: int) -> Callable[..., None]:
        # a copy, since an activation in place may follow
        return lambda _module, _inputs, output: kept.__setitem__(index, output.clone())

    handles = [part.register_forward_hook(keep(index)) for index, part in enumerate(parts)]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def relative(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max(1, max|expected|); shapes must agree, values be finite."""
    assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
    assert expected.isfinite().all()
    assert found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()

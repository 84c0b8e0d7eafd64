"""--compile: the same numbers from one graph, the same files, one line where it cannot work."""

import signal

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from data.loading.loader import TrainLoader
from engine.checkpoint import load_checkpoint
from engine.distributed import Distributed
from engine.train import loop
from engine.train.config import TrainConfig
from engine.train.loop import fit
from engine.train.model import ForwardAndLoss, wrapped
from models.builder import build_detector
from models.losses.build import build_loss
from models.yaml.parser import load_spec
from utils.boxes import Targets
from utils.errors import TerminatedError, UserError
from utils.hyp import Hyperparameters


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles for itself."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_step(cfg="yolov5n", head=None):
    torch.manual_seed(0)
    model = build_detector(load_spec(str(cfg), head=head), classes=3).train()
    loss = build_loss(model, Hyperparameters(), image_size=64)
    return ForwardAndLoss(model, loss, Distributed(torch.device("cpu")))


def batch_of(boxes, seed=1, size=64, images=2):
    generator = torch.Generator().manual_seed(seed)
    pixels = (images, 3, size, size)
    corners = torch.rand(boxes, 2, generator=generator) * size / 2
    return torch.randint(0, 256, pixels, generator=generator, dtype=torch.uint8), Targets(
        torch.randint(0, images, (boxes,), generator=generator),
        torch.randint(0, 3, (boxes,), generator=generator),
        torch.cat((corners, corners + 6 + torch.rand(boxes, 2, generator=generator) * 24), 1),
    )


@pytest.mark.parametrize("head", ["anchor", "free", "free-e2e"])
def test_forward_and_loss_are_one_graph_of_the_same_numbers(head):
    """No break, so nothing in them waits for the device."""
    plain, compiled, batch = make_step(head=head), make_step(head=head), batch_of(5)
    counter = CompileCounter()
    compiled.compile_step(varying=False, backend=counter, fullgraph=True)
    for _ in range(2):
        expected, found = plain(*batch), compiled(*batch)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert counter.frame_count == 1
    expected[0].backward()
    found[0].backward()
    for mine, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("varying", [False, True])
def test_few_graphs_serve_all_batches(tiny_model, varying):
    """Numbers of boxes share one until there is no room; with `varying` any size shares it."""
    plain, compiled = make_step(tiny_model), make_step(tiny_model)
    counter = CompileCounter()
    compiled.compile_step(varying=varying, backend=counter, fullgraph=True)
    for boxes, graphs in ((5, 1), (0, 1), (100, 2), (256, 2)):
        # a size that equals a constant of the loss, as two images would, gets a graph of its own
        size, images = (64 + boxes // 5 * 32, 7 + boxes % 3) if varying else (64, 2)
        batch = batch_of(boxes, size=size, images=images)
        torch.testing.assert_close(compiled(*batch), plain(*batch), rtol=1e-5, atol=1e-6)
        assert counter.frame_count == (1 if varying else graphs)


@pytest.fixture
def no_compiler(monkeypatch):
    """All of --compile but what torch.compile does."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def test_a_compiled_run_stops_resumes_and_saves_as_another(
    settings, signal_at, keep_state, no_compiler, monkeypatch, tmp_path, capsys
):
    sizes = []
    made = TrainLoader.batches

    def batches(*args):
        for batch in made(*args):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(TrainLoader, "batches", batches)
    flags = ("--compile", "--epochs", "2")
    fit(settings(*flags, "--name", "whole"))
    assert sizes == [4] * 6  # ten images
    assert "--compile: forward and loss are compiled in the first step" in capsys.readouterr().out
    fit(settings("--epochs", "1", "--name", "plain"))
    signal_at(1, 1, signal.SIGTERM)
    with pytest.raises(TerminatedError):
        fit(settings(*flags, "--name", "stopped"))
    monkeypatch.setattr(TrainLoader, "batches", made)
    fit(settings("--resume", tmp_path / "runs" / "stopped"))
    whole, stopped, plain = (
        load_checkpoint(tmp_path / "runs" / name / "weights" / "last.pt")
        for name in ("whole", "stopped", "plain")
    )
    assert list(whole["model"]) == list(plain["model"])
    for key, value in whole["train_state"]["model"].items():
        assert torch.equal(value, stopped["train_state"]["model"][key]), key
    for key, value in whole["model"].items():
        assert torch.equal(value, stopped["model"][key]), key


def test_where_torch_cannot_compile_one_line_says_so(settings, monkeypatch):
    def broken(*_):
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler")

    monkeypatch.setattr(ForwardAndLoss, "forward", broken)
    with pytest.raises(UserError, match=r"--compile: torch\.compile failed: .*no compiler"):
        fit(settings("--compile", "--epochs", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["anchor", "free"])
def test_compiled_losses_follow_eager_ones_over_20_steps(tiny_model, head):
    """With inductor's generated code, on the CPU."""
    steps = make_step(tiny_model, head), make_step(tiny_model, head)
    try:
        wrapped(steps[1], TrainConfig(compile=True))
        optimizers = [torch.optim.SGD(step.parameters(), lr=0.001, momentum=0.9) for step in steps]
        for number in range(20):
            batch, losses = batch_of(5 + number, seed=number), []
            for step, optimizer in zip(steps, optimizers, strict=True):
                total, parts = step(*batch)
                total.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(parts)
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-6)
    except RuntimeError as error:
        if "compiler" in str(error).lower() and type(error).__module__.startswith(loop.COMPILER):
            pytest.skip(f"no C++ compiler for torch.compile: {str(error).splitlines()[0]}")
        raise

import pytest
import torch

from engine import distributed
from utils.errors import UserError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_devices_with_two_gpus(two_gpus):
    assert distributed.select_device("") == torch.device("cuda", 0)
    assert distributed.select_device("", local_rank=1) == torch.device("cuda", 1)
    assert distributed.select_device("1") == torch.device("cuda", 1)
    assert distributed.select_device("cuda:1") == torch.device("cuda", 1)
    assert distributed.select_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="there are 2"):
        distributed.select_device("2")


def test_several_gpus_are_a_matter_for_torchrun(two_gpus):
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        distributed.select_device("0,1")


def test_devices_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.select_device("") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cpu"):
        distributed.select_device("0")
    with pytest.raises(UserError, match="expected"):
        distributed.select_device("gpu")


def test_a_world_of_one_needs_no_group(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.start("cpu")
    assert (world.rank, world.world_size, world.is_main) == (0, 1, True)
    assert distributed.is_main()
    assert not distributed.is_active()
    value = torch.tensor([1.0, 2.0])
    total = distributed.all_reduce_sum(value)
    assert torch.equal(total, value)
    assert total is not value
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    distributed.barrier()
    distributed.broadcast_tensors([value])
    distributed.cleanup()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', expected 1 to"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"RANK": "5"}, "RANK is '5', expected 0 to 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2', expected 0 to 1"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_the_environment_is_checked(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.start("cpu")


@pytest.mark.parametrize("device", ["0", "cuda:0", "CUDA:1"])
def test_an_explicit_gpu_is_refused_under_torchrun(two_gpus, monkeypatch, device):
    """Every rank would use that one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="every rank of torchrun would use this one GPU"):
        distributed.start(device)


@pytest.mark.parametrize(("name", "backend"), [("cpu", "gloo"), ("", "nccl"), ("cuda", "nccl")])
def test_the_process_group_knows_the_gpu(two_gpus, monkeypatch, name, backend):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        distributed.dist, "init_process_group", lambda *args, **keys: asked.update(keys, args=args)
    )
    world = distributed.start(name, timeout=5)
    assert asked["args"] == (backend,)
    assert asked["timeout"].total_seconds() == 5
    assert asked["device_id"] == (None if backend == "gloo" else torch.device("cuda", 1))
    assert world.device == (asked["device_id"] or torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.distributed.DistBackendError("remote process exited"), True),
        (RuntimeError("NCCL communicator was aborted on rank 0"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:598] Connection closed by peer"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_a_lost_rank_is_recognised_under_both_backends(monkeypatch, error, lost):
    assert not distributed.is_lost_rank(error)  # a single process has none to lose
    monkeypatch.setattr(distributed, "is_active", lambda: True)
    assert distributed.is_lost_rank(error) == lost

import pytest
import torch

from engine import distributed
from utils.errors import UserError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("text", "local_rank", "device"),
    [
        ("", 0, "cuda:0"),
        ("", 1, "cuda:1"),
        ("1", 0, "cuda:1"),
        ("cuda:1", 0, "cuda:1"),
        ("cpu", 0, "cpu"),
    ],
)
def test_devices_with_two_gpus(two_gpus, text, local_rank, device):
    assert distributed.select_device(text, local_rank=local_rank) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "text", "message"),
    [
        (True, "2", "there are 2"),
        (True, "0,1", "torchrun --nproc_per_node 2"),
        (False, "0", "--device cpu"),
        (False, "gpu", "expected"),
    ],
)
def test_devices_that_are_not_there(two_gpus, monkeypatch, gpus, text, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    with pytest.raises(UserError, match=message):
        distributed.select_device(text)
    assert gpus or distributed.select_device("") == torch.device("cpu")


def test_a_list_of_gpus_gives_each_rank_of_torchrun_its_own(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for text, gpus in (("0,1", [0, 1]), ("1,0", [1, 0]), ("cuda:1, 0", [1, 0])):
        for rank, gpu in enumerate(gpus):
            chosen = distributed.select_device(text, local_rank=rank, world_size=2)
            assert chosen == torch.device("cuda", gpu)
    for text, message in {
        "0,0": "torchrun started 2 processes",
        "0,1,2": "torchrun started 2 processes",
        "1,2": "GPU 2 does not exist",
        "0,x": "expected",
    }.items():
        with pytest.raises(UserError, match=message):
            distributed.select_device(text, local_rank=1, world_size=2)


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

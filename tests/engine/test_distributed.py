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
    assert distributed.any_rank(True, world.device)
    assert not distributed.any_rank(False, world.device)
    distributed.barrier()
    distributed.broadcast_tensors([value])
    distributed.cleanup()


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        distributed.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="ranks choose"):
        distributed.start("0")

"""Hostile and damaged pickles: nothing runs, and the refusal names what was found."""

from __future__ import annotations

import contextlib
import copyreg
import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from models.weights.restricted import (
    ALLOWED,
    STORAGES,
    RestrictedUnpickler,
    Storage,
    Stub,
    TensorRef,
    open_pickled,
)
from models.weights.yolov5 import read_yolov5
from utils.errors import UserError

MAGIC = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def short(value: str) -> bytes:
    """SHORT_BINUNICODE."""
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def system(command: str) -> bytes:
    """os.system(command), by GLOBAL and REDUCE."""
    return name("os", "system") + text(command) + b"\x85R"


P2, P4 = b"\x80\x02", b"\x80\x04"
OS_NAMES = short("os") + short("system")
# fmt: off
# bytes of a pickle that runs a command when Python's own unpickler reads it
RUNNING: dict[str, Callable[[str], bytes]] = {
    "reduce": lambda c: P2 + system(c) + b".",
    "posix": lambda c: P2 + name("posix", "system") + text(c) + b"\x85R.",
    "stack_global": lambda c: P4 + OS_NAMES + b"\x93" + text(c) + b"\x85R.",
    "stack_global_by_memo": lambda c: (
        P4 + short("os") + b"\x94" + short("system") + b"\x9400h\x00h\x01\x93" + text(c) + b"\x85R."),
    "eval": lambda c: (
        P2 + name("builtins", "eval") + text(f"__import__('os').system({c!r})") + b"\x85R."),
    "exec": lambda c: (
        P2 + name("__builtin__", "exec") + text(f"import os; os.system({c!r})") + b"\x85R."),
    "getattr_chain": lambda c: (
        P2 + name("builtins", "getattr") + name("builtins", "__import__") + text("os") + b"\x85R"
        + text("system") + b"\x86R" + text(c) + b"\x85R."),
    "in_state": lambda c: (  # of an OrderedDict
        P2 + name("collections", "OrderedDict") + b")R}" + text("weight") + system(c) + b"sb."),
    "in_list": lambda c: P2 + b"](K\x01" + system(c) + b"K\x02e.",
    "as_key": lambda c: P2 + b"}" + system(c) + b"K\x01s.",
    "reconstructor": lambda c: (
        P2 + name("copyreg", "_reconstructor") + b"(" + name("builtins", "object") * 2
        + b"NtR0" + system(c) + b"."),
    "inst": lambda c: P2 + b"(" + text(c) + b"ios\nsystem\n.",
    "obj": lambda c: P2 + b"(" + name("os", "system") + text(c) + b"o.",
    "subprocess": lambda c: (
        P2 + name("subprocess", "check_call") + b"](" + b"".join(map(text, c.split())) + b"e\x85R."),
    "partial": lambda c: (
        P2 + name("functools", "partial") + name("os", "system") + text(c) + b"\x86R)R."),
    "map": lambda c: (
        P2 + name("builtins", "list") + name("builtins", "map") + name("os", "system")
        + b"]" + text(c) + b"a\x86R\x85R."),
}
REFUSED: dict[str, Callable[[str], bytes]] = {
    "arguments_of_a_stub": lambda c: P2 + name("models.common", "Conv") + system(c) + b"\x85R.",
    "state_of_a_stub": lambda c: (
        P2 + name("models.yolo", "Model") + b")\x81}" + text("x") + system(c) + b"sb."),
    "new_object": lambda c: P2 + name("subprocess", "Popen") + text(c) + b"\x85\x81.",
    "new_object_ex": lambda c: (
        P4 + name("subprocess", "Popen") + text(c) + b"\x85}" + text("shell") + b"\x88s\x92."),
    "storage_type": lambda c: (
        P2 + b"(" + text("storage") + system(c) + text("0") + text("cpu") + b"K\x01tQ."),
    "persistent_module": lambda c: (  # the raw format's ('module', class, file, source)
        P2 + b"(" + text("module") + name("os", "system") + text("/x.py") + text(c) + b"tQ"
        + text(c) + b"\x85R."),
    "dotted_name": lambda c: (  # an attribute of what a network's module imports
        P4 + short("models.yolo") + short("os.system") + b"\x93" + text(c) + b"\x85R."),
    "tensor_hook": lambda c: (
        P2 + name("torch._tensor", "_rebuild_from_type_v2") + system(c) + b"\x85R."),
}
# fmt: on


def as_zip(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(4))
        archive.writestr("archive/version", "3\n")


def as_legacy(path: Path, content: bytes) -> None:
    """torch.save's raw format, with the payload in place of the object."""
    path.write_bytes(b"".join(pickle.dumps(item, 2) for item in MAGIC) + content)


def as_legacy_keys(path: Path, content: bytes) -> None:
    """The payload in the list of storages, after a harmless object."""
    harmless = b"".join(pickle.dumps(item, 2) for item in [*MAGIC, {"model": None}])
    path.write_bytes(harmless + content)


CONTAINERS = [as_zip, Path.write_bytes, as_legacy, as_legacy_keys]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "payload", [*RUNNING.values(), *REFUSED.values()], ids=[*RUNNING, *REFUSED]
)
def test_payload_never_runs_and_is_named(tmp_path, payload, container) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    container(path, payload(f"touch {marker}"))
    with pytest.raises(UserError, match="refused: the file names '") as caught:
        read_yolov5(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("payload", RUNNING.values(), ids=RUNNING)
def test_the_same_payload_runs_in_pythons_own_unpickler(tmp_path: Path, payload) -> None:
    """So that the test above tests something."""
    marker = tmp_path / "marker"
    with contextlib.suppress(Exception):  # some fail after the payload ran
        pickle.loads(payload(f"touch {marker}"))
    assert marker.exists()


def test_payload_inside_the_genuine_file(shared: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    original = zipfile.ZipFile(shared / "weights/yolov5n.pt")
    with original as genuine, zipfile.ZipFile(path, "w") as changed:
        for member in genuine.namelist():
            content = genuine.read(member)
            if member.endswith("data.pkl"):  # at the very end, when all tensors are there
                content = content[:-1] + b"0" + system(f"touch {marker}") + b"."
            changed.writestr(member, content)
    with pytest.raises(UserError, match=r"names 'os\.system'"):
        read_yolov5(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "qualified",
    [
        "builtins.open", "builtins.print", "runpy.run_path", "importlib.import_module",
        "numpy.load", "shutil.rmtree", "torch.load", "torch.hub.load",
        "torch._utils._import_dotted_name", "torch.serialization.load",
        "torch._utils._rebuild_qtensor", "torch.storage._load_from_bytes", "pip.main",
        "numpy.core.numeric.x", "torch.nn.modulesevil.Conv", "modelsevil.Conv",
        "yolov5.modelsevil.Conv", "yolov5.torch.load", "yolov5.yolov5.models.common.Conv",
        "utils.general.exec", "copyreg.__newobj__", "collections.Counter", "torch.UntypedStorage",
        "pathlib.Path.unlink",
    ],
)  # fmt: skip
def test_names_off_the_list(qualified: str) -> None:
    module, _, attribute = qualified.rpartition(".")
    with pytest.raises(UserError, match="refused: the file names"):
        read(b"\x80\x02" + name(module, attribute) + b".")


def read(content: bytes) -> object:
    return RestrictedUnpickler(io.BytesIO(content)).load()


BUILD = b"N}" + text("__defaults__") + b"Ns\x86b."


@pytest.mark.parametrize(
    ("content", "error", "cause"),
    [
        # EXT1: a name of this process' copyreg registry, which find_class would not see
        (b"\x82\x7f.", pickle.UnpicklingError, "extension code"),
        # BUILD sets attributes in Python's own unpickler: here on no function and no class
        (
            name("torch._utils", "_rebuild_tensor_v2") + BUILD,
            pickle.UnpicklingError,
            "state for a ",
        ),
        (name("models.yolo", "Model") + BUILD, pickle.UnpicklingError, "state for a "),
        # BYTEARRAY8 fills its length before it reads
        (b"\x96" + struct.pack("<Q", 4) + b"four.", KeyError, "150"),
    ],
)
def test_opcodes_that_reach_past_names_are_refused(monkeypatch, content, error, cause) -> None:
    monkeypatch.setitem(copyreg._inverted_registry, 0x7F, ("os", "system"))
    for _ in range(2):  # the second time an extension would lie in a cache
        with pytest.raises(error, match=cause):
            read(P2 + content)


def test_a_damaged_index_costs_no_memory() -> None:
    """LONG_BINPUT at 2^32 - 1: the unpickler in C allocates 64 GiB."""
    assert read(b"\x80\x02Nr\xff\xff\xff\xff.") is None


def test_stub_keeps_state_and_arguments() -> None:
    content = name("models.yolo", "Model") + b"K\x07\x85\x81}" + text("__class__") + b"K\x08sb"
    stub = read(b"\x80\x02" + content + b".")
    assert isinstance(stub, Stub)
    assert (stub.kind, stub.args, stub.state) == ("models.yolo.Model", (7,), {"__class__": 8})


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_equal_pythons_own(protocol: int) -> None:
    value = {
        "none": None, "flags": [True, False], "small": 3, "negative": -70000, "large": 1 << 100,
        "float": -0.1, "text": "Grüße", "long": "x" * 300, "tuple": (1, (2, ()), 3, 4, 5),
        "set": {1, 2}, "frozen": frozenset({"a"}), 7: "seven", None: 0,
    }  # fmt: skip
    if protocol < 4:
        del value["frozen"]  # by the name builtins.frozenset, which is not on the list
    if protocol >= 3:
        value["bytes"] = b"\x00\xff" * 200
    assert read(pickle.dumps(value, protocol)) == value


def test_dtypes_numpy_and_paths_are_inert() -> None:
    value = {
        "dtype": torch.float16, "path": Path("a/b"), "size": torch.Size((2, 3)),
        "device": torch.device("cpu"), "array": np.zeros(2), "scalar": np.float64(1),
    }  # fmt: skip
    found = read(pickle.dumps(value, 2))
    assert isinstance(found, dict)
    assert (found["size"], found["dtype"]) == ((2, 3), torch.float16)
    assert all(isinstance(found[key], Stub) for key in ("path", "device", "array", "scalar"))


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5,), (1,)),  # one too many
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),  # the last is at 4
        (0, (1 << 30, 1 << 30), (0, 0)),  # all the same element: a bomb
        (0, (2, 3), (0, 1)),  # overlapping
        (0, (2,), (1, 1)),
        (-1, (1,), (1,)),
        (0, (-1,), (1,)),
        (0, (1.5,), (1,)),
        (0, (1 << 70,), (0,)),
    ],
)
def test_tensor_out_of_bounds_is_refused(tmp_path: Path, offset, shape, stride) -> None:
    torch.save({"t": torch.arange(4.0)}, tmp_path / "x.pt")
    storage = Storage("0", torch.float32, 4)
    rebuild = ALLOWED["torch._utils._rebuild_tensor_v2"]
    with open_pickled(tmp_path / "x.pt") as opened:
        whole = opened.tensor(rebuild(storage, 0, (2, 2), (2, 1), False, {}))
        assert whole.tolist() == [[0, 1], [2, 3]]
        assert opened.tensor(rebuild(storage, 3, (), (), False, {})).item() == 3
        with pytest.raises(UserError, match="storage '0' cannot be read"):
            opened.tensor(rebuild(storage, offset, shape, stride, False, {}))


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request: pytest.FixtureRequest) -> Callable[[object, Path], None]:
    """torch.save in one of its containers."""
    return partial(torch.save, _use_new_zipfile_serialization=request.param)


@pytest.mark.parametrize("dtype", STORAGES.values(), ids=str)
def test_tensors_equal_torch_saves(tmp_path: Path, dtype: torch.dtype, save) -> None:
    base = torch.randn(3, 4, 5).mul(3).to(dtype)
    tensors = [base, base.permute(2, 0, 1), base[1:, ::2, 1], base.sum().to(dtype), base[:0]]
    save({"t": tensors}, tmp_path / "x.pt")
    with open_pickled(tmp_path / "x.pt") as opened:
        for ref, tensor in zip(opened.root["t"], tensors, strict=True):
            found = opened.tensor(ref)
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert torch.equal(found, tensor)


def test_truncated_anywhere_is_one_line(tmp_path: Path, save) -> None:
    path = tmp_path / "x.pt"
    save({"t": torch.arange(10.0), "name": "a"}, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 9), len(whole) - 1]:
        path.write_bytes(whole[:length])
        cause = "not a checkpoint: "
        with pytest.raises(UserError, match=cause) as caught, open_pickled(path) as opened:
            opened.tensor(opened.root["t"])
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    """By the checksum in the zip."""
    path = tmp_path / "x.pt"
    torch.save({"t": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(990.0, 1000).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    cause = r"storage '0' cannot be read .*CRC"
    with pytest.raises(UserError, match=cause), open_pickled(path) as opened:
        opened.tensor(opened.root["t"])


def test_random_damage_is_found_or_harmless(tmp_path: Path, save) -> None:
    path = tmp_path / "x.pt"
    save({"t": torch.arange(4.0), "s": torch.nn.Linear(1, 1).state_dict()}, path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(600):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        path.write_bytes(changed)
        with contextlib.suppress(UserError), open_pickled(path) as opened:
            for value in opened.root.values() if isinstance(opened.root, dict) else ():
                if isinstance(value, TensorRef):
                    opened.tensor(value)


EMPTY = pickle.dumps({}, 2)


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not a checkpoint: the file is empty"),
        (b"this is text\n", "not a checkpoint: it is text"),
        (b"<!DOCTYPE html><html>", "not a checkpoint: it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a checkpoint: it is a Git LFS"),
        (b"\x00\x01\x02\x03" * 50, "not a checkpoint: neither a zip nor a pickle"),
        (b"PK\x03\x04" + bytes(100), r"not a checkpoint: truncated or damaged \(BadZipFile"),
        (pickle.dumps([1, 2], 2), "not a checkpoint: .*torch.save did not write"),
        (
            b"".join(pickle.dumps(x, 2) for x in (MAGIC[0], 1000, {})),
            "not a checkpoint: an unknown version",
        ),
        (zipped({"a/data.pkl": EMPTY, "b/data.pkl": EMPTY}), "not a checkpoint: .*exactly one"),
        (zipped({"data.pkl": EMPTY}), "not a checkpoint: .*exactly one"),
        (zipped({"a/data.pkl": EMPTY, "a/0": bytes(10**7)}, zipfile.ZIP_DEFLATED), "compressed"),
        (zipped({"a/data.pkl": EMPTY, "a/code/x.py": b""}), "not a checkpoint: a TorchScript"),
        (zipped({"a/data.pkl": EMPTY, "a/byteorder": b"big"}), "written on a big-endian"),
    ],
)
def test_other_files_are_distinguished(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.pt: {cause}"), open_pickled(path):
        pass


def test_zip_whose_members_overlap_is_refused(tmp_path: Path) -> None:
    """Many directory entries for the same bytes: a bomb without compression."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", EMPTY)
        archive.writestr("a/data/0", bytes(2000))
        entry = archive.getinfo("a/data/0")
        for number in range(1, 50):
            again = zipfile.ZipInfo(f"a/data/{number}")
            again.header_offset, again.CRC = entry.header_offset, entry.CRC
            again.file_size = again.compress_size = entry.file_size
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    with pytest.raises(UserError, match="larger than the file"), open_pickled(path):
        pass

"""Pickled PyTorch objects as inert values: an interpreter of pickle's opcodes that runs nothing.

Python's own unpickler imports and calls what a file names. This one never looks a name up: a class
of the network becomes a `Stub` that only keeps its state, a tensor a `TensorRef`, a short list of
constructors is done by functions of `pickled.py`, and any other name refuses the file. The
opcodes are decoded by `pickletools` and mean what Python's documentation of that module says.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import IO, Any

from models.weights.pickled import (
    CALLS,
    VALUES,
    DamagedError,
    Global,
    Stub,
    is_known,
    plain_key,
    plain_set,
)
from utils.errors import UserError

PACKAGED = "yolov5."  # what the PyPI package puts before YOLOv5's own module names
MAX_OPCODES = 2_000_000  # the genuine YOLOv5-n has 34,279
MAX_PICKLE = 64 << 20  # bytes of opcodes, tensors' data excluded
# what decoding raises on bytes that are no well-formed pickle
MALFORMED = (DamagedError, ValueError, LookupError, TypeError, ArithmeticError, MemoryError)


def read(stream: IO[bytes], where: str, persistent: Callable[[Any], Any]) -> Any:
    """Read one pickle from `stream` and leave it after the end.

    `persistent` gives the value of a persistent id.  Result: dict, list, tuple, set, plain scalars,
    Global, Stub, TensorRef.  Raises UserError, which starts with `where`, for a global that is not
    on the list, for damage, and past the limits.
    """
    machine = _Machine(where, persistent)
    start = stream.tell()
    position = start
    try:
        for opcode, argument, place in pickletools.genops(stream):
            position = start if place is None else place
            machine.spend(1)
            if position - start > MAX_PICKLE:
                raise UserError(f"{where}: a pickle of over {MAX_PICKLE >> 20} MiB; refused")
            machine.step(opcode.name, argument)
        return machine.result()
    except MALFORMED as error:
        cause = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(
            f"{where}: not a checkpoint: damaged at byte {position} ({cause})"
        ) from error


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, where: str, persistent: Callable[[Any], Any]) -> None:
        self.where = where
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = MAX_OPCODES

    def spend(self, work: int) -> None:
        """Count work, so that no small file keeps the reader busy for long."""
        self.budget -= work
        if self.budget < 0:
            raise UserError(f"{self.where}: over {MAX_OPCODES} pickle operations; refused")

    def step(self, name: str, argument: Any) -> None:
        """Do one opcode."""
        if name in CONSTANTS:
            self.stack.append(argument)
        elif name in LITERALS:
            self.stack.append(LITERALS[name]())
        elif name in OPERATIONS:
            OPERATIONS[name](self, argument)
        else:
            raise UserError(f"{self.where}: pickle opcode {name} is not allowed; refused")

    def result(self) -> Any:
        """What STOP leaves."""
        if len(self.stack) != 1 or self.marks:
            raise DamagedError("values left over at the end")
        return self.stack.pop()

    def pop(self) -> Any:
        """The topmost value, never one below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise DamagedError("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        """The topmost value, left in place."""
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        """All values above the last mark."""
        if not self.marks:
            raise DamagedError("a mark is missing")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def find(self, module: Any, name: Any) -> Global:
        """The name as a value, if it is on the list; refuses the file otherwise."""
        if not (type(module) is str and type(name) is str):
            raise DamagedError("a global without a name")
        if module.startswith(f"{PACKAGED}models."):
            module = module.removeprefix(PACKAGED)
        found = Global(module, name)
        if not is_known(found):
            shown = ascii(found.qualified)[1:-1][:100]
            raise UserError(
                f"{self.where}: refused: the file names {shown!r}, which no detector needs and "
                "which could run code; nothing was run"
            )
        return found

    def call(self, function: Any, args: Any, keywords: Any = None) -> None:
        """Push what a constructor on the list makes of `args`, or a stub."""
        if not isinstance(function, Global) or type(args) is not tuple or keywords:
            raise DamagedError("a call of something that is no class")
        self.spend(sum(len(item) for item in args if hasattr(item, "__len__")))
        handler = CALLS.get(function.qualified)
        if handler is not None:
            self.stack.append(handler(*args))
        elif function.qualified in VALUES:
            raise DamagedError(f"a call of {function.qualified}")
        else:
            self.stack.append(Stub(function.qualified, args))


def _set_items(target: Any, items: list[Any]) -> None:
    if type(target) is not dict or len(items) % 2:
        raise DamagedError("items set on something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[plain_key(key)] = value


def _append(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        raise DamagedError("items appended to something that is no list")
    target.extend(items)


def _add(target: Any, items: list[Any]) -> None:
    if type(target) is not set:
        raise DamagedError("items added to something that is no set")
    target.update(plain_key(item) for item in items)


def _build(target: Any, state: Any) -> None:
    if isinstance(target, Stub):
        target.state = state if type(state) is dict else {"state": state}
    elif not (type(target) is dict and type(state) is dict):
        # an OrderedDict may carry attributes (a state dict's _metadata); nothing else may
        raise DamagedError("state for something that has none")


def _op_recall(m: _Machine, index: Any) -> None:
    m.stack.append(m.memo[int(index)])


def _op_pop(m: _Machine, _: Any) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.pop()


def _op_tuple(count: int) -> Callable[[_Machine, Any], None]:
    def operation(m: _Machine, _: Any) -> None:
        items = [m.pop() for _ in range(count)]
        m.stack.append(tuple(reversed(items)))

    return operation


def _op_dict(m: _Machine, _: Any) -> None:
    result: dict[Any, Any] = {}
    _set_items(result, m.pop_mark())
    m.stack.append(result)


def _op_set_item(m: _Machine, _: Any) -> None:
    value, key = m.pop(), m.pop()
    _set_items(m.top(), [key, value])


def _op_append(m: _Machine, _: Any) -> None:
    value = m.pop()
    _append(m.top(), [value])


def _op_many(apply: Callable[[Any, list[Any]], None]) -> Callable[[_Machine, Any], None]:
    def operation(m: _Machine, _: Any) -> None:
        items = m.pop_mark()
        apply(m.top(), items)

    return operation


def _op_global(m: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    m.stack.append(m.find(module, name))


def _op_stack_global(m: _Machine, _: Any) -> None:
    name, module = m.pop(), m.pop()
    m.stack.append(m.find(module, name))


def _op_instance(m: _Machine, argument: str) -> None:
    module, _, name = argument.partition(" ")
    function = m.find(module, name)
    m.call(function, tuple(m.pop_mark()))


def _op_object(m: _Machine, _: Any) -> None:
    function, *args = m.pop_mark()
    m.call(function, tuple(args))


def _op_call(m: _Machine, _: Any) -> None:
    args, function = m.pop(), m.pop()
    m.call(function, args)


def _op_call_keywords(m: _Machine, _: Any) -> None:
    keywords, args, function = m.pop(), m.pop(), m.pop()
    m.call(function, args, keywords)


def _op_build(m: _Machine, _: Any) -> None:
    state = m.pop()
    _build(m.top(), state)


def _op_memoize(m: _Machine, index: Any) -> None:
    m.memo[len(m.memo) if index is None else int(index)] = m.top()


# fmt: off
CONSTANTS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
))
# fmt: on
LITERALS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda m, a: None,
    "FRAME": lambda m, a: None,
    "STOP": lambda m, a: None,
    "MARK": lambda m, a: m.marks.append(len(m.stack)),
    "POP": _op_pop,
    "POP_MARK": lambda m, a: m.pop_mark().clear(),
    "DUP": lambda m, a: m.stack.append(m.top()),
    "TUPLE": lambda m, a: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": _op_tuple(1),
    "TUPLE2": _op_tuple(2),
    "TUPLE3": _op_tuple(3),
    "LIST": lambda m, a: m.stack.append(m.pop_mark()),
    "DICT": _op_dict,
    "FROZENSET": lambda m, a: m.stack.append(plain_set(m.pop_mark())),
    "SETITEM": _op_set_item,
    "SETITEMS": _op_many(_set_items),
    "APPEND": _op_append,
    "APPENDS": _op_many(_append),
    "ADDITEMS": _op_many(_add),
    "PUT": _op_memoize,
    "BINPUT": _op_memoize,
    "LONG_BINPUT": _op_memoize,
    "MEMOIZE": _op_memoize,
    "GET": _op_recall,
    "BINGET": _op_recall,
    "LONG_BINGET": _op_recall,
    "GLOBAL": _op_global,
    "STACK_GLOBAL": _op_stack_global,
    "INST": _op_instance,
    "OBJ": _op_object,
    "REDUCE": _op_call,
    "NEWOBJ": _op_call,
    "NEWOBJ_EX": _op_call_keywords,
    "BUILD": _op_build,
    "BINPERSID": lambda m, a: m.stack.append(m.persistent(m.pop())),
}

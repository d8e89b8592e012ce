"""The pickle inside a file of torch.save, read without being run.

A pickle is a program, and whoever unpickles a stranger's runs it. Here the few instructions that torch.save writes for a
dictionary of tensors are interpreted, and what they can make is numbers, strings, lists, dictionaries and descriptions of
tensors. Nothing is imported or called: another name than those of `_TENSOR_MAKERS` and their like is refused, as is another
instruction.
"""

import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any

from llama4_jax.checkpoints.file_tensor import shown
from llama4_jax.errors import UserError

MAX_OPCODES = 2**18  # a published shard has some fifty thousand


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor as the pickle describes it; nothing of it is checked yet.

    Attributes:
        storage_type: such as `BFloat16Storage`.
        storage: name of the entry with the numbers.
        numel: how many numbers the storage is said to hold.
        offset, shape, strides: of the tensor in it, in numbers.
    """

    storage_type: str
    storage: str
    numel: int
    offset: Any
    shape: Any
    strides: Any


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle names; it stays a name."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    type: str
    key: str
    numel: int


class _Inert:
    """Something beside the weights (Transformer Engine's extra state) that is not looked into."""


_INERT = {"_io BytesIO", "_codecs encode", "__builtin__ bytes", "builtins bytes"}
_TENSOR, _PARAMETER, _DICT = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict"
_MARK = object()


def read_pickle(data: bytes, place: str) -> Any:
    """What the pickle describes. Raises UserError for a damaged one, and for one that would do anything else."""
    machine = _Machine(place)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise UserError(f"{place}: has more than {MAX_OPCODES:,} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.run(opcode.name, argument)
    except UserError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
    ) as error:  # of genops, and of a stack without the operands
        lines = str(error).splitlines() or [""]
        raise UserError(f"{place}: is damaged: {type(error).__name__} {shown(lines[0])}") from None
    raise UserError(f"{place}: is truncated")


class _Machine:
    def __init__(self, place: str):
        self.place = place
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name](argument))
        elif name in _OPERATIONS:
            _OPERATIONS[name](self, argument)
        else:
            raise UserError(f"{self.place}: uses the pickle instruction {name}, which no dictionary of tensors needs")

    def pop_mark(self) -> list[Any]:
        """What lies above the last mark."""
        start = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items, self.stack[start:] = self.stack[start + 1 :], []
        return items

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def name(self, name: str) -> None:
        module, _, attribute = name.partition(" ")
        storage = module == "torch" and attribute.endswith("Storage") and attribute.isidentifier()
        if not storage and name not in {*_INERT, _TENSOR, _PARAMETER, _DICT}:
            raise UserError(
                f"{self.place}: names {name.replace(' ', '.')[:200]!r}, which no dictionary of tensors needs; nothing of it was run"
            )
        self.stack.append(_Name(name))

    def stack_name(self) -> None:
        attribute, module = self.stack.pop(), self.stack.pop()
        self.name(f"{module} {attribute}")

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise UserError(f"{self.place}: calls something that is no function")
        if function.name == _DICT and not arguments:
            made = {}
        elif function.name == _TENSOR and isinstance(arguments[0], _Storage):
            storage, offset, shape, strides = arguments[:4]
            made = TorchTensor(storage.type, storage.key, storage.numel, offset, shape, strides)
        elif function.name == _PARAMETER and isinstance(arguments[0], TorchTensor):
            made = arguments[0]
        elif function.name in _INERT:
            made = _Inert()
        else:
            raise UserError(f"{self.place}: calls {function.name.replace(' ', '.')} in a way that torch.save does not")
        self.stack.append(made)

    def build(self) -> None:
        """Gives an object its attributes: those of a state_dict (its versions) and of inert things are left out."""
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, _Inert):
            raise UserError(f"{self.place}: sets attributes of something that has none")

    def persistent(self) -> None:
        kind, storage, key, _, numel = self.stack.pop()
        if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str) or type(numel) is not int:
            raise UserError(f"{self.place}: refers to something other than a storage")
        self.stack.append(_Storage(storage.name.removeprefix("torch "), key, numel))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise UserError(f"{self.place}: sets items of something that is no dictionary")
        target.update(zip(items[::2], items[1::2], strict=True))

    def extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UserError(f"{self.place}: appends to something that is no list")
        self.stack[-1].extend(items)

    def make_tuple(self, size: int) -> None:
        items = tuple(self.stack.pop() for _ in range(size))[::-1]
        self.stack.append(items)


_CONSTANTS: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "MARK": lambda _: _MARK,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
        lambda value: value,
    ),
}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": lambda machine, _: machine.stack_name(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
}

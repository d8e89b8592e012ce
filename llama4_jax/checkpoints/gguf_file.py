"""GGUF as a file: metadata and tensors by name, read from one file or several parts, and written.

The format is ggml's docs/gguf.md, versions 2 and 3, little-endian: a header of metadata and of tensors' names, shapes and offsets,
then their data. Nothing that a header says is believed before it is known to lie inside the file, so a hostile one costs no more
memory than a small multiple of its own size. Quantised tensors are the business of the `gguf` package, llama.cpp's own.

Shapes here are NumPy's, outermost axis first; ggml's are the other way round.
"""

import contextlib
import dataclasses
import functools
import math
import mmap
import os
import re
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama4_jax.checkpoints.file_tensor import Index, bounds
from llama4_jax.errors import UserError

MAX_HEADER_BYTES = 2**26  # the largest in circulation, of a vocabulary of 256,000 tokens, have 15 MB
CHUNK_BYTES = 2**24  # of a tensor that are converted at a time

_MAGIC = b"GGUF"
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_SMALLEST_PAIR, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes of a metadata pair and of a tensor's description
_MAX_AXES, _LONGEST_NAME = 4, 256
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class _Layout(NamedTuple):
    """How a type of tensor lies in a file: so many numbers in so many bytes, which are read as `dtype`."""

    name: str
    block_size: int
    block_bytes: int
    dtype: np.dtype


_FLOATS = {
    0: _Layout("F32", 1, 4, np.dtype(np.float32)),
    1: _Layout("F16", 1, 2, np.dtype(np.float16)),
    30: _Layout("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
WRITTEN = {"f32": 0, "f16": 1, "bf16": 30, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}  # ggml's numbers of types


@functools.cache
def _layout(type_id: int) -> _Layout:
    """Raises UserError, without naming the tensor, for a type that cannot be read."""
    if type_id in _FLOATS:
        return _FLOATS[type_id]
    try:
        import gguf
    except ImportError:
        raise UserError("is quantised, which needs the gguf package: pip install 'llama4-jax[gguf]'") from None
    try:
        kind = gguf.GGMLQuantizationType(type_id)
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except ValueError:
        raise UserError(f"has the unknown type {type_id}") from None
    except NotImplementedError:
        raise UserError(f"is {kind.name}, which cannot be read") from None
    return _Layout(kind.name, block_size, block_bytes, np.dtype(np.float32))


# ------------------------------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; all of it is known to be there."""

    path: Path
    name: str
    type_id: int
    shape: tuple[int, ...]
    offset: int  # from the beginning of the file

    @property
    def dtype(self) -> np.dtype:
        """Of what is read: quantised tensors become float32."""
        return _layout(self.type_id).dtype

    @property
    def place(self) -> str:
        return f"{self.path}: tensor {self.name}"

    @property
    def row_bytes(self) -> int:
        layout = _layout(self.type_id)
        return self.shape[-1] // layout.block_size * layout.block_bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def read(self, index: Index = ()) -> np.ndarray:
        """The part that slices (of step 1) of the leading axes select; only rows that it touches are read."""
        spans = [range(*limits) for limits in bounds(index, self.shape)]
        result = np.empty([len(span) for span in spans], self.dtype)
        sizes, ranges = [1, *self.shape[:-1]], [range(1), *spans[:-1]]  # of rows
        while len(sizes) > 2 and len(ranges[-1]) == sizes[-1]:  # all of an axis: the one before it runs on
            size, _, before = sizes.pop(), ranges.pop(), ranges.pop()
            sizes[-1] *= size
            ranges.append(range(before.start * size, before.stop * size))
        (*outer, height), (*places, rows) = sizes, ranges
        firsts = [0]  # of the blocks of rows that follow each other
        for size, span in zip(outer, places, strict=True):
            firsts = [first * size + place for first in firsts for place in span]
        for block, first in zip(result.reshape(len(firsts), len(rows), len(spans[-1])), firsts, strict=True):
            self._read_rows(block, first * height + rows.start, spans[-1])
        return result

    def _read_rows(self, result: np.ndarray, first: int, columns: range) -> None:
        step = max(1, CHUNK_BYTES // self.row_bytes)
        for start in range(0, len(result), step):
            count = min(step, len(result) - start)
            offset = self.offset + (first + start) * self.row_bytes
            try:
                stored = np.fromfile(self.path, np.uint8, count * self.row_bytes, offset=offset)
            except OSError as error:
                raise UserError(f"{self.place} cannot be read: {error.strerror or error}") from None
            if len(stored) < count * self.row_bytes:
                raise UserError(f"{self.place} cannot be read: the file has become shorter")
            numbers = self._numbers(stored.reshape(count, -1))
            result[start : start + count] = numbers[:, columns.start : columns.stop]

    def _numbers(self, stored: np.ndarray) -> np.ndarray:
        if self.type_id in _FLOATS:
            return stored.view(self.dtype)
        import gguf

        with np.errstate(all="ignore"):  # a scale may be infinite or no number; then so is what it scales
            return gguf.dequantize(stored, gguf.GGMLQuantizationType(self.type_id))


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF says before its data. Values of metadata are str, bool, int, float, a list of str, or an array of numbers."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def read_header(path: str | os.PathLike) -> Header:
    """The header of a GGUF file, or of all parts of one that is split; the metadata are the first part's.

    Raises:
        UserError: the file, or a part, is missing, truncated or not a GGUF, or its header contradicts itself or the format.
    """
    path = Path(path).expanduser()
    headers = [_read_file(part) for part in _parts(path)]
    count = headers[0].metadata.get("split.count", 1)
    if count not in (0, len(headers)):
        raise UserError(
            f"{path}: split.count is {count!r}, not {len(headers)}; name all parts NAME-00001-of-....gguf and so on"
        )
    tensors = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise UserError(f"{tensor.place} is in {tensors[name].path} too")
            tensors[name] = tensor
    return Header(headers[0].metadata, tensors)


def _parts(path: Path) -> list[Path]:
    if not (match := _PART.fullmatch(path.name)):
        return [path]
    stem, count = match[1], int(match[3])
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)] or [path]


def _read_file(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(_MAGIC) or file.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{path}: not a GGUF file: it does not begin with {_MAGIC.decode()}")
            with mmap.mmap(file.fileno(), min(size, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as content:
                return _Parser(path, content, size).header()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Parser:
    """Reads a header from front to back; every length is compared with what is left before it is used."""

    def __init__(self, path: Path, content: mmap.mmap, size: int):
        self.path, self.content, self.size, self.at = path, content, size, len(_MAGIC)

    def fail(self, problem: str):
        raise UserError(f"{self.path}: damaged or not a GGUF file: {problem}")

    def header(self) -> Header:
        version = self.number(4)
        if version not in (2, 3):
            kind = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise UserError(f"{self.path}: is {kind}; only little-endian GGUF of versions 2 and 3 can be read")
        num_tensors, num_pairs = self.number(10), self.number(10)
        self.require(num_pairs, _SMALLEST_PAIR, f"{num_pairs} metadata")
        metadata = {}
        for _ in range(num_pairs):
            key = self.name("a key of the metadata")
            if key in metadata:
                self.fail(f"metadata has {key} twice")
            metadata[key] = self.value(self.number(4), key)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}, not a power of two from 8 to 65536")
        self.require(num_tensors, _SMALLEST_TENSOR, f"{num_tensors} tensors")
        described = [self.tensor() for _ in range(num_tensors)]
        data = -(-self.at // alignment) * alignment
        return Header(metadata, self.placed(described, data, alignment))

    def require(self, count: int, size: int, what: str) -> None:
        if count * size > len(self.content) - self.at:
            limit = "a header may have" if len(self.content) < self.size else "are left"
            self.fail(f"{what} do not fit in the {len(self.content) - self.at} bytes that {limit}")

    def number(self, kind: int) -> Any:
        (number,) = self.numbers(kind, 1, "a number")
        return float(str(number)) if number.dtype == np.float32 else number.item()  # 1e-5, not 9.99999974e-06

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        self.require(count, dtype.itemsize, what)
        array = np.frombuffer(self.content[self.at : self.at + count * dtype.itemsize], dtype)
        self.at += array.nbytes
        return array

    def string(self, what: str) -> str:
        (length,) = struct.unpack("<Q", self.take(8, what))
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def name(self, what: str) -> str:
        name = self.string(what)
        if len(name) > _LONGEST_NAME or not name.isprintable():
            self.fail(f"{what} is longer than {_LONGEST_NAME} or not printable: {name[:_LONGEST_NAME]!r}")
        return name

    def take(self, length: int, what: str) -> bytes:
        if length > len(self.content) - self.at:
            self.require(length, 1, f"the {length} bytes of {what}")
        self.at += length
        return self.content[self.at - length : self.at]

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind in _NUMBERS:
            return self.number(kind)
        if kind != _ARRAY:
            self.fail(f"metadata {key} has the unknown type {kind}")
        element, count = self.number(4), self.number(10)
        if element == _STRING:
            self.require(count, 8, f"the {count} strings of {key}")
            return [self.string(key) for _ in range(count)]
        if element not in _NUMBERS:
            self.fail(f"metadata {key} is an array of the unknown type {element}")
        return self.numbers(element, count, f"the {count} numbers of {key}")

    def tensor(self) -> StoredTensor:
        name = self.name("a tensor's name")
        axes = self.number(4)
        if not 1 <= axes <= _MAX_AXES:
            self.fail(f"tensor {name} has {axes} axes")
        shape = tuple(self.numbers(10, axes, f"the shape of {name}")[::-1].tolist())
        return StoredTensor(self.path, name, self.number(4), shape, self.number(10))

    def placed(self, described: list[StoredTensor], data: int, alignment: int) -> dict[str, StoredTensor]:
        """The tensors with offsets from the beginning of the file, once all of them are known to have a place of their own."""
        tensors, end, last = {}, data, None
        for tensor in described:
            if tensor.name in tensors:
                self.fail(f"tensor {tensor.name} is there twice")
            try:
                layout = _layout(tensor.type_id)
            except UserError as error:
                raise UserError(f"{tensor.place} {error}") from None
            if not all(tensor.shape) or tensor.shape[-1] % layout.block_size:
                self.fail(f"tensor {tensor.name}, which is {layout.name}, has shape {tensor.shape}")
            if tensor.offset % alignment:
                self.fail(f"tensor {tensor.name} begins at {tensor.offset}, which is no multiple of {alignment}")
            tensors[tensor.name] = dataclasses.replace(tensor, offset=data + tensor.offset)
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                self.fail(f"tensor {tensor.name} overlaps tensor {last}")
            end, last = tensor.offset + tensor.nbytes, tensor.name
            if end > self.size:
                raise UserError(f"{tensor.place} ends at byte {end}, but the file has {self.size}: it is truncated or damaged")
        return tensors


# ------------------------------------------------------------------------------------------------------------------------
# Writing


class NewFile:
    """A GGUF file that is being written: the header first, then tensors in any order; it appears when it is finished.

    Args:
        path: of the file; nothing may be there.
        metadata: str, bool, int, float, and lists of str, int or float.
        tensors: by name, the type (a key of WRITTEN) and the shape of each.

    Raises:
        UserError: something is there, a shape does not suit its type, or the disk refuses.
    """

    def __init__(
        self, path: str | os.PathLike, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    ):
        self.path = Path(path).expanduser()
        if self.path.exists():
            raise UserError(f"{self.path}: already exists; choose another name or remove it")
        self._places, described, offset = {}, [], 0
        for name, (kind, shape) in tensors.items():
            layout = _layout(WRITTEN[kind])
            if shape[-1] % layout.block_size:
                raise UserError(
                    f"tensor {name} cannot be {kind}: its rows of {shape[-1]} are no multiple of {layout.block_size}; write f16"
                )
            described.append(_tensor_bytes(name, shape, WRITTEN[kind], offset))
            place = StoredTensor(self.path, name, WRITTEN[kind], shape, offset)
            self._places[name] = place
            offset = _aligned(offset + place.nbytes)
        pairs = [_string_bytes(key) + _value_bytes(value) for key, value in metadata.items()]
        header = _MAGIC + struct.pack("<IQQ", 3, len(described), len(pairs)) + b"".join([*pairs, *described])
        self._data = _aligned(len(header))
        self._left = set(self._places)
        self._partial = self.path.with_name(f".{self.path.name}.partial-{uuid.uuid4().hex[:8]}")
        with self._disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("wb")
            self._file.write(header)
            self._file.truncate(self._data + offset)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Quantises and writes one tensor, chunk by chunk."""
        place = self._places[name]
        if tensor.shape != place.shape:
            raise ValueError(f"{name} has shape {tensor.shape}, announced as {place.shape}")
        rows = tensor.reshape(-1, tensor.shape[-1])
        step = max(1, CHUNK_BYTES // (4 * tensor.shape[-1]))
        with self._disk():
            self._file.seek(self._data + place.offset)
            for start in range(0, len(rows), step):
                self._file.write(_encoded(rows[start : start + step], place.type_id))
        self._left.discard(name)

    def finish(self) -> None:
        """Puts the file in its place."""
        if self._left:
            raise ValueError(f"not all announced tensors were written: {min(self._left)} is missing")
        with self._disk():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.rename(self.path)

    def abandon(self) -> None:
        """Removes what was written, unless that is finished."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from None


def _encoded(rows: np.ndarray, type_id: int) -> bytes:
    if type_id in _FLOATS:
        return rows.astype(_FLOATS[type_id].dtype).tobytes()
    import gguf

    return gguf.quantize(np.ascontiguousarray(rows, np.float32), gguf.GGMLQuantizationType(type_id)).tobytes()


def _aligned(offset: int) -> int:
    return -(-offset // 32) * 32


def _string_bytes(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value_bytes(value: Any) -> bytes:
    """A metadata value with its type before it: uint32, float32, and int32 in lists, as llama.cpp reads them."""
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", _STRING) + _string_bytes(value)
    kind = {str: _STRING, int: 5, float: 6}[type(value[0])]
    elements = [_string_bytes(element) for element in value] if kind == _STRING else [np.array(value, _NUMBERS[kind]).tobytes()]
    return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(elements)


def _tensor_bytes(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return _string_bytes(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, offset)

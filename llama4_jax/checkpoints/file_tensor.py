"""Tensors where they lie in files, and parts of them read on demand.

Files are read, not mapped: a file that shrinks meanwhile, or a disk that fails, is then an error rather than a signal, and
what a process holds is what it asked for.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import BinaryIO, Protocol

import numpy as np

from llama4_jax.errors import UserError

BLOCK_BYTES = 2**24  # what is read at once where a part is scattered over the file

Index = tuple[slice, ...]


class Source(Protocol):
    """A tensor that can be read in parts.

    Attributes:
        place: file and name there, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    place: str

    def read(self, index: Index = ()) -> np.ndarray:
        """The part that `index` selects of the leading axes; all of it by default."""


def shown(name: str) -> str:
    """A stranger's name for something, as one line of a message can have it."""
    return name[:200] if name.isprintable() else ascii(name[:200])


def bounds(index: Index, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of each axis; axes that the index leaves out are whole."""
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """Numbers at regular distances in a file.

    Attributes:
        file: open for reading.
        offset: of the first number, in bytes.
        strides: bytes from one entry of each axis to the next.
    """

    file: BinaryIO
    place: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def contiguous(cls, file: BinaryIO, place: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> "FileTensor":
        return cls(file, place, offset, shape, contiguous_strides(shape, dtype.itemsize), dtype)

    def part(self, index: Index) -> "FileTensor":
        limits = bounds(index, self.shape)
        offset = self.offset + sum(start * stride for (start, _), stride in zip(limits, self.strides, strict=True))
        return dataclasses.replace(self, offset=offset, shape=tuple(max(stop - start, 0) for start, stop in limits))

    def split_rows(self, count: int) -> "FileTensor":
        """[count * n, ...] as [count, n, ...]."""
        if self.shape[0] % count:
            raise UserError(f"{self.place} has {self.shape[0]} rows, which are not {count} equal parts")
        n, stride = self.shape[0] // count, self.strides[0]
        return dataclasses.replace(self, shape=(count, n, *self.shape[1:]), strides=(n * stride, stride, *self.strides[1:]))

    def transposed(self) -> "FileTensor":
        return dataclasses.replace(self, shape=self.shape[::-1], strides=self.strides[::-1])

    def read(self, index: Index = ()) -> np.ndarray:
        part = self.part(index)
        order = np.argsort([-stride for stride in part.strides], kind="stable")  # as it lies in the file
        out = np.empty([part.shape[axis] for axis in order], part.dtype)
        part._fill(out, part.offset, [part.strides[axis] for axis in order])
        return out.transpose(np.argsort(order))

    def _fill(self, out: np.ndarray, offset: int, strides: list[int]) -> None:
        if out.size == 0:
            return
        span = sum((n - 1) * stride for n, stride in zip(out.shape, strides, strict=True)) + self.dtype.itemsize
        if all(n == 1 or a == b for n, a, b in zip(out.shape, strides, out.strides, strict=True)):
            self._read_bytes(out.reshape(-1).view(np.uint8), offset)
        elif span <= BLOCK_BYTES:
            buffer = np.empty(span, np.uint8)
            self._read_bytes(buffer, offset)
            out[...] = np.ndarray(out.shape, self.dtype, buffer, strides=strides)
        else:
            rows = BLOCK_BYTES // max(strides[0], 1)
            if 1 < rows < len(out):
                for start in range(0, len(out), rows):
                    self._fill(out[start : start + rows], offset + start * strides[0], strides)
            else:
                for row in range(len(out)):
                    self._fill(out[row], offset + row * strides[0], strides[1:])

    def _read_bytes(self, buffer: np.ndarray, offset: int) -> None:
        done = 0
        while done < buffer.size:
            try:
                count = os.preadv(self.file.fileno(), [buffer[done : done + 2**30]], offset + done)
            except OSError as error:
                raise UserError(f"{self.place} cannot be read: {error.strerror}") from None
            if count == 0:
                raise UserError(f"{self.place} cannot be read: the file is truncated")
            done += count


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class Joined:
    """Tensors laid side by side along one axis."""

    parts: tuple[Source, ...]
    axis: int

    def __post_init__(self):
        first = self.parts[0]
        for part in self.parts[1:]:
            same = part.dtype == first.dtype and len(part.shape) == len(first.shape)
            if not same or any(a != b for i, (a, b) in enumerate(zip(part.shape, first.shape, strict=True)) if i != self.axis):
                raise UserError(
                    f"{part.place} is {part.dtype}{list(part.shape)}, which does not continue {first.dtype}{list(first.shape)} "
                    f"of {first.place}"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def place(self) -> str:
        return self.parts[0].place

    def read(self, index: Index = ()) -> np.ndarray:
        limits = bounds(index, self.shape)
        out = np.empty([max(stop - start, 0) for start, stop in limits], self.dtype)
        start, stop = limits[self.axis]
        along, before = np.moveaxis(out, self.axis, 0), 0
        for part in self.parts:
            size = part.shape[self.axis]
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                limits[self.axis] = (first, last)
                piece = part.read(tuple(slice(*limit) for limit in limits))
                along[before + first - start : before + last - start] = np.moveaxis(piece, self.axis, 0)
            before += size
        return out


@dataclasses.dataclass(frozen=True)
class InterleavedRows:
    """Rows of rotary heads that are stored in halves: row j of the first half and row j of the second are pair j.

    A plain Llama of Hugging Face holds its query and key so; here the two rows of a pair follow each other.
    """

    stored: Source
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def place(self) -> str:
        return self.stored.place

    def read(self, index: Index = ()) -> np.ndarray:
        (start, stop), *_ = bounds(index, self.shape)
        size = self.shape[0] // self.heads
        first, last = start // size, -(-stop // size)  # heads that hold these rows
        rows = self.stored.read((slice(first * size, last * size), *index[1:]))
        rows = rows.reshape(last - first, 2, size // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        return rows[start - first * size : stop - first * size]

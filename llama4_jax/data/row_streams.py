"""Endless rows out of a pool of documents, an epoch after another, each epoch in an order of its own.

A pool is packed either once, as a whole, when it is small; or while training goes, a window of documents at a time. Of the
windows only the lengths of their documents are looked at here, so a corpus of any size is shuffled and packed in bounded
memory, and each process reads the tokens of its own rows alone. The place in a stream is three counters.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
from grain.experimental import index_shuffle
from jaxtyping import Int

from llama4_jax.data.packing import Documents, PackedRows, PackingPlan, plan_rows

_LISTED = 1 << 16
_WINDOW_TOKENS = 1 << 24
_WINDOW_ROWS = (64, 1024)  # fewest, most: a window's last row is the one that packing cannot fill


Order = Callable[[int], int]  # where the thing is that comes at this place


def _grain_order(size: int, seed: int) -> Order:
    """A permutation without a list of it."""
    return functools.partial(index_shuffle, max_index=size - 1, seed=seed, rounds=4)


def _order(size: int, seed: int) -> Order:
    # Grain's permutes 2**16 places at least and skips those beyond the size: milliseconds a place for the smallest.
    if size > _LISTED:
        return _grain_order(size, seed)
    return np.random.RandomState(seed).permutation(size).item  # this class, for NumPy never changes what it draws


class Windows(Protocol):
    """A pool of documents as windows of packed rows."""

    per_epoch: int

    def window(self, epoch: int, number: int) -> tuple[PackedRows, Order]:
        """The rows of a window, and the order in which they come."""


class WholePool:
    """All rows as one window: every epoch has the same rows in another order."""

    per_epoch = 1

    def __init__(self, rows: PackedRows, seed: int):
        self._rows, self._seed = rows, seed

    def window(self, epoch: int, number: int) -> tuple[PackedRows, Order]:
        return self._rows, _grain_order(len(self._rows), (self._seed + epoch) % 2**32)


class StreamedPool:
    """Windows of documents that a seeded permutation of the pool brings together, packed anew in every epoch."""

    def __init__(self, rows: "StreamedRows", members: Int[np.ndarray, "n"] | range, seed: int):
        """`members` are the documents of the pool; streams of different seeds have nothing to do with one another."""
        self._rows, self._members, self._seed = rows, members, seed
        whole = isinstance(members, range) and len(members) == len(rows.documents.lengths)
        tokens = int((rows.documents.lengths if whole else rows.documents.lengths[members]).sum(dtype=np.int64))
        window_rows = int(np.clip(_WINDOW_TOKENS // rows.sequence_length, *_WINDOW_ROWS))
        self.per_epoch = min(max(1, round(tokens / (window_rows * rows.sequence_length))), len(members))

    def window(self, epoch: int, number: int) -> tuple[PackedRows, Order]:
        size = len(self._members)
        order = _order(size, zlib.crc32(f"{self._seed} {epoch}".encode()))
        places = range(size * number // self.per_epoch, size * (number + 1) // self.per_epoch)
        documents = np.array([self._members[order(place)] for place in places], np.int64)
        rows = self._rows.pack(np.sort(documents))
        return rows, _order(len(rows), zlib.crc32(f"{self._seed} {epoch} {number}".encode()))


class StreamedRows:
    """Documents that are packed when their turn comes."""

    def __init__(self, documents: Documents, sequence_length: int, document_window: int | None = None):
        self.documents = documents
        self.sequence_length = sequence_length
        self.document_window = document_window

    def pack(self, documents: Int[np.ndarray, "n"]) -> PackedRows:
        """Rows of these documents."""
        plan = plan_rows(self.documents, documents, self.sequence_length, self.document_window)
        return PackedRows(self.documents, plan, self.sequence_length, self.document_window)

    @property
    def padding_share(self) -> float:
        """Share of the places of the first window that hold no token, in [0, 1]."""
        pool = StreamedPool(self, range(len(self.documents.lengths)), seed=0)
        return pool.window(0, 0)[0].padding_share


class RowStream:
    """The rows of a pool, one after another, and the place in them."""

    def __init__(self, pool: Windows):
        self._pool = pool
        self.set_state({"epoch": 0, "window": 0, "row": 0})

    def next(self) -> PackingPlan:
        """The pieces of the next row."""
        while self._row == len(self._rows):
            epoch, window = divmod(self._epoch * self._pool.per_epoch + self._window + 1, self._pool.per_epoch)
            self.set_state({"epoch": epoch, "window": window, "row": 0})
        self._row += 1
        return self._rows.row(self._order(self._row - 1))

    @property
    def epochs(self) -> float:
        """How often the pool has been handed out."""
        return self._epoch + (self._window + self._row / max(len(self._rows), 1)) / self._pool.per_epoch

    def get_state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "window": self._window, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        self._epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        self._rows, self._order = self._pool.window(self._epoch, self._window)

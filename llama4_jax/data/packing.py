"""Documents of any length into rows of exactly T tokens, with little padding and every token predicted exactly once.

A document is its ids between a begin and an end token. It is cut into pieces of at most T predictions: the piece at i reads
ids[i : i + T] and predicts ids[i + 1 : i + T + 1]. So every token but the first is predicted once, whatever its document.

Pieces keep the promise of Batch.document_window W: one of at most W tokens lies inside one W-aligned window of its row, a
longer one starts on a window. Each window is a bin; best fit, longest piece first, fills them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8

from llama4_jax.data.batch import Batch


class Documents(Protocol):
    """Token ids of many documents, their begin and end tokens among them, wherever they lie."""

    lengths: Integer[np.ndarray, "documents"]
    sources: Int[np.ndarray, "documents"]  # index of the data source of each
    extras: "Extras | None"  # None: text alone, of which every token counts

    def read(self, documents: Int[np.ndarray, "n"]) -> list[Integer[np.ndarray, "tokens"]]:
        """The ids of these documents."""


class Extras(Protocol):
    """What documents have beside their ids. Such documents are at most T + 1 tokens long, so they are never cut."""

    image_slots: int  # I, tiles that a row has room for
    tile_shape: tuple[int, int, int]  # h, w, 3
    tiles: Int[np.ndarray, "documents"]  # of each document; at most image_slots

    def counted(self, documents: Int[np.ndarray, "n"]) -> list[Bool[np.ndarray, "tokens"]]:
        """Of each id of these documents, whether its prediction counts."""

    def images(self, documents: Int[np.ndarray, "n"]) -> list[UInt8[np.ndarray, "i h w 3"] | None]:
        """The tiles of these documents; None for one that is to be left out after all."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents in memory, end to end: document i is ids[starts[i] : starts[i + 1]]."""

    ids: Integer[np.ndarray, "tokens"]
    starts: Int[np.ndarray, "documents+1"]
    sources: Int[np.ndarray, "documents"]
    extras: Extras | None = None

    @property
    def lengths(self) -> Int[np.ndarray, "documents"]:
        return np.diff(self.starts)

    def read(self, documents: Int[np.ndarray, "n"]) -> list[Integer[np.ndarray, "tokens"]]:
        return [self.ids[self.starts[i] : self.starts[i + 1]] for i in documents]


@dataclasses.dataclass(frozen=True, eq=False)
class PackingPlan:
    """Where each piece of some documents goes, in the order of rows and of places in a row."""

    document: Int[np.ndarray, "pieces"]
    start: Int[np.ndarray, "pieces"]  # of the piece in its document
    length: Int[np.ndarray, "pieces"]
    row: Int[np.ndarray, "pieces"]
    offset: Int[np.ndarray, "pieces"]  # of the piece in its row

    def pieces(self, first: int, end: int) -> "PackingPlan":
        """The plan of these pieces alone."""
        return PackingPlan(*(getattr(self, field.name)[first:end] for field in dataclasses.fields(self)))


def plan_rows(
    documents: Documents, chosen: Int[np.ndarray, "n"], sequence_length: int, document_window: int | None = None
) -> PackingPlan:
    """Plans rows for the chosen documents. No row has more tiles than there are slots for."""
    if documents.extras is None:
        plan = plan_packing(documents.lengths[chosen], sequence_length, document_window)
        return dataclasses.replace(plan, document=chosen[plan.document])
    plans, num_rows = [], 0
    while not plans or len(chosen):
        plan = plan_packing(documents.lengths[chosen], sequence_length, document_window)
        plan = dataclasses.replace(plan, document=chosen[plan.document], row=plan.row + num_rows)
        stays = _within_slots(plan.row, documents.extras.tiles[plan.document], documents.extras.image_slots)
        plans.append(PackingPlan(*(getattr(plan, field.name)[stays] for field in dataclasses.fields(plan))))
        num_rows = int(plan.row.max(initial=num_rows - 1)) + 1
        chosen = np.sort(plan.document[~stays])  # what a row has no slots for goes to rows of its own
    return PackingPlan(*(np.concatenate([getattr(p, f.name) for p in plans]) for f in dataclasses.fields(PackingPlan)))


def _within_slots(row: Int[np.ndarray, "n"], tiles: Int[np.ndarray, "n"], slots: int) -> Bool[np.ndarray, "n"]:
    """Which pieces of each row stay, the first ones first, so that their tiles are at most `slots`. One of each row does."""
    stays, used, last = np.ones(len(row), bool), 0, -1
    for i in np.flatnonzero(tiles):
        used = used if row[i] == last else 0
        last = row[i]
        stays[i] = used + tiles[i] <= slots
        used += int(tiles[i]) if stays[i] else 0
    return stays


def plan_packing(
    document_lengths: Int[np.ndarray, "documents"], sequence_length: int, document_window: int | None = None
) -> PackingPlan:
    """Plans rows of `sequence_length` for documents of these lengths, their begin and end tokens counted.

    A `document_window` that the row holds more than once must divide it. Deterministic.
    """
    window = min(document_window or sequence_length, sequence_length)
    if sequence_length % window:
        raise ValueError(f"{document_window=} must divide {sequence_length=}")
    document, start, length = _cut(document_lengths, sequence_length)
    bin_, used = _place(length, sequence_length // window, window)
    row, offset = bin_ * window // sequence_length, bin_ * window % sequence_length + used
    order = np.lexsort((offset, row))
    return PackingPlan(*(array[order] for array in (document, start, length, row, offset)))


def _cut(document_lengths, sequence_length):
    """Document, start and length of each piece."""
    predictions = np.maximum(np.asarray(document_lengths, np.int64) - 1, 0)
    pieces = -(-predictions // sequence_length)  # of each document
    document = np.repeat(np.arange(len(pieces)), pieces)
    first_piece = np.cumsum(pieces) - pieces
    start = (np.arange(len(document)) - first_piece[document]) * sequence_length
    return document, start, np.minimum(predictions[document] - start, sequence_length)


def _place(lengths, windows_per_row, window):
    """Window, counted through all rows, in which each piece starts, and its offset in that window."""
    bins, offsets = np.zeros_like(lengths), np.zeros_like(lengths)
    long = np.flatnonzero(lengths > window)
    windows = -(-lengths[long] // window)
    rows: list[int] = []  # free windows of each row
    row, first = _best_fit_decreasing(windows, windows_per_row, rows)
    bins[long] = row * windows_per_row + first

    # What a long piece leaves of its last window is as good a bin as an empty window.
    free = np.full(len(rows) * windows_per_row, window)
    for begin, end, length in zip(bins[long], bins[long] + windows, lengths[long], strict=True):
        free[begin:end] = 0
        free[end - 1] = (end - begin) * window - length
    short = np.flatnonzero(lengths <= window)
    bins[short], offsets[short] = _best_fit_decreasing(lengths[short], window, free.tolist())
    return bins, offsets


def _best_fit_decreasing(sizes: np.ndarray, capacity: int, free: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Bin and offset of each item: the largest first, each into the fullest bin that has room, else into a new one.

    `free` is the room of the bins at first, filled from their start, and grows.
    """
    bins_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit r: some bin has room r
    for bin_, room in enumerate(free):
        bins_by_room[room].append(bin_)
        occupied |= 1 << room
    chosen, offsets = np.zeros_like(sizes), np.zeros_like(sizes)
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        roomy = occupied >> size
        if roomy:
            room = size + (roomy & -roomy).bit_length() - 1
            bin_ = bins_by_room[room].pop()
            if not bins_by_room[room]:
                occupied ^= 1 << room
        else:
            room, bin_ = capacity, len(free)
            free.append(capacity)
        chosen[item], offsets[item] = bin_, capacity - room
        free[bin_] = room - size
        bins_by_room[room - size].append(bin_)
        occupied |= 1 << (room - size)
    return chosen, offsets


class PackedRows:
    """Rows of T tokens, made when they are asked for."""

    def __init__(self, documents: Documents, plan: PackingPlan, sequence_length: int, document_window: int | None = None):
        self.documents = documents
        self.plan = plan
        self.sequence_length = sequence_length
        self.document_window = document_window
        num_rows = int(plan.row.max(initial=-1)) + 1
        self._first_piece = np.searchsorted(plan.row, np.arange(num_rows + 1))  # of each row

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    @property
    def padding_share(self) -> float:
        """Share of all places that hold no token, in [0, 1]."""
        return 1 - int(self.plan.length.sum()) / max(len(self) * self.sequence_length, 1)

    def row(self, index: int) -> PackingPlan:
        """The pieces of one row."""
        return self.plan.pieces(self._first_piece[index], self._first_piece[index + 1])

    def batch(self, rows: Sequence[int] | Int[np.ndarray, "rows"], batch_size: int | None = None) -> Batch:
        """The rows of these indices; empty rows after them up to `batch_size`. Places without a token hold zeros."""
        plans = [self.row(index) for index in rows]
        return read_rows(self.documents, plans, self.sequence_length, self.document_window, batch_size)


def read_rows(
    documents: Documents,
    rows: Sequence[PackingPlan],
    sequence_length: int,
    document_window: int | None = None,
    batch_size: int | None = None,
) -> Batch:
    """The batch of these rows, each given by its pieces; empty rows after them up to `batch_size`."""
    shape = (len(rows) if batch_size is None else batch_size, sequence_length)
    tokens, targets, positions, segments, sources = (np.zeros(shape, np.int32) for _ in range(5))
    weights = np.zeros(shape, np.float32)
    pieces = [
        (place, segment, row, piece) for place, row in enumerate(rows) for segment, piece in enumerate(range(len(row.row)), 1)
    ]
    texts = documents.read(np.concatenate([row.document for row in rows])) if rows else []
    for (place, segment, row, piece), ids in zip(pieces, texts, strict=True):
        start, length, offset = row.start[piece], row.length[piece], row.offset[piece]
        here = (place, slice(offset, offset + length))
        tokens[here] = ids[start : start + length]
        targets[here] = ids[start + 1 : start + 1 + length]
        positions[here] = np.arange(length)
        segments[here] = segment
        weights[here] = 1
        sources[here] = documents.sources[row.document[piece]]
    images = None if documents.extras is None else _add_extras(documents.extras, rows, weights)
    return Batch(
        tokens=tokens,
        targets=targets,
        loss_weights=weights,
        positions=positions,
        segment_ids=segments,
        images=images,
        source_ids=sources,
        document_window=document_window,
    )


def _add_extras(
    extras: Extras, rows: Sequence[PackingPlan], weights: Float[np.ndarray, "B T"]
) -> UInt8[np.ndarray, "B I h w 3"] | None:
    """The tiles of the rows, and in `weights` what counts."""
    documents = np.concatenate([row.document for row in rows]) if rows else np.zeros(0, np.int64)
    counted, images = extras.counted(documents), extras.images(documents)
    batch, piece = None, 0
    if extras.image_slots:
        batch = np.zeros((len(weights), extras.image_slots, *extras.tile_shape), np.uint8)
    for place, row in enumerate(rows):
        slot = 0
        for offset, length in zip(row.offset, row.length, strict=True):
            here, tiles = weights[place, offset : offset + length], images[piece]
            here[:] = 0 if tiles is None else counted[piece][1 : 1 + length]
            num_tiles = int(extras.tiles[documents[piece]])
            if num_tiles and tiles is not None:
                batch[place, slot : slot + num_tiles] = tiles
            slot, piece = slot + num_tiles, piece + 1
    return batch


def check_windows(segment_ids: Int[np.ndarray, "B T"], document_window: int | None) -> None:
    """Raises ValueError, naming the row and the segment, unless the rows keep the promise of Batch.document_window."""
    if document_window is None:
        return
    batch_size, sequence_length = segment_ids.shape
    change = np.ones((batch_size, sequence_length), bool)  # where a run of one segment begins
    change[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    begin = np.flatnonzero(change)
    length = np.diff(begin, append=segment_ids.size)
    row, place = np.divmod(begin, sequence_length)
    segment = segment_ids.reshape(-1)[begin]
    crosses = place % document_window + length > document_window
    broken = np.flatnonzero((segment > 0) & crosses & ((length <= document_window) | (place % document_window > 0)))
    if len(broken):
        i = broken[0]
        raise ValueError(
            f"row {row[i]}: segment {segment[i]} of {length[i]} tokens starts at {place[i]}, across a window of {document_window}"
        )

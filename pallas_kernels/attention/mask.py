"""Who may read whom, said by positions and documents: no [T, S] array exists before a block of one is needed."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A query reads the keys of its own document and its own chunk, up to its own position if `causal`.

    Without key positions the keys are the queries' own tokens, in the same order (self-attention): a document's tokens are
    adjacent, and its positions grow by one. Positions of None are 0, 1, 2, ... and segment ids of None are one document. With
    key positions, a negative one marks an empty place that nobody reads.

    Attributes:
        query_positions, query_segment_ids: of each query in its document, and the document it belongs to.
        key_positions, key_segment_ids: the same of the keys; None in self-attention.
        chunk: tokens p and q of a document see each other only where p // chunk == q // chunk; None: no such limit.
        document_window: the promise of whoever packed the rows, for self-attention only: a document of at most this many
            tokens lies inside one window of its row that starts at a multiple of it; a longer one starts on a window.
        causal: else a query also reads what comes after it in its document; not together with a chunk or with key positions.
    """

    query_positions: Int[Array, "B T"] | None = None
    query_segment_ids: Int[Array, "B T"] | None = None
    key_positions: Int[Array, "B S"] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    chunk: int | None = dataclasses.field(default=None, metadata={"static": True})
    document_window: int | None = dataclasses.field(default=None, metadata={"static": True})
    causal: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def is_self_attention(self) -> bool:
        return self.key_positions is None

    @property
    def chunks_are_windows(self) -> bool:
        """Whether chunk boundaries are known to fall on multiples of the chunk in every row."""
        plain = self.query_positions is None and self.query_segment_ids is None
        return self.is_self_attention and self.chunk is not None and (plain or self.document_window == self.chunk)

    def __post_init__(self):
        if not self.causal and (self.chunk is not None or not self.is_self_attention):
            raise ValueError("Mask: causal=False goes neither with a chunk nor with key positions")

    def allowed(self, queries: slice, keys: slice) -> Bool[Array, "#B t s"]:
        """The block of the mask for these places. Slices have explicit starts and stops."""
        q_index = jnp.arange(queries.start, queries.stop)[None]
        k_index = jnp.arange(keys.start, keys.stop)[None]
        if self.is_self_attention:
            q_positions = q_index if self.query_positions is None else self.query_positions[:, queries]
            k_positions = k_index if self.query_positions is None else self.query_positions[:, keys]
            q_segments = k_segments = self.query_segment_ids
            mask = (q_index[:, :, None] >= k_index[:, None, :]) | (not self.causal)
        else:
            q_positions, k_positions = self.query_positions[:, queries], self.key_positions[:, keys]
            q_segments, k_segments = self.query_segment_ids, self.key_segment_ids
            mask = (q_positions[:, :, None] >= k_positions[:, None, :]) & (k_positions >= 0)[:, None, :]
        if q_segments is not None and k_segments is not None:
            mask &= q_segments[:, queries][:, :, None] == k_segments[:, keys][:, None, :]
        if self.chunk is not None:
            mask &= q_positions[:, :, None] // self.chunk == k_positions[:, None, :] // self.chunk
        return mask


def by_windows(attend: Callable[..., Array], query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """`attend(query, key, value, mask)`; where every chunk is a window of its row, with the windows as rows, causal within a
    document."""
    T = query.shape[1]
    if not mask.chunks_are_windows or T % mask.chunk:
        return attend(query, key, value, mask)
    windows = [x.reshape(-1, mask.chunk, *x.shape[2:]) for x in (query, key, value)]
    segment_ids = mask.query_segment_ids
    segment_ids = None if segment_ids is None else segment_ids.reshape(-1, mask.chunk)
    return attend(*windows, Mask(query_segment_ids=segment_ids)).reshape(query.shape)

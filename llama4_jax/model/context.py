"""What every layer needs to know about the tokens, their places first: computed once, shared by all layers."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.config import AttentionTemperature, ModelConfig
from llama4_jax.model.cache import EMPTY, Cache, Slots, last_window
from llama4_jax.model.rotary import Rotation, inverse_frequencies, rotation
from llama4_jax.parallel.cache_parallel import holds_windows, reads_whole_rows
from llama4_jax.parallel.context_parallel import Zigzag, spans_of
from pallas_kernels.attention import Mask
from pallas_kernels.attention.intervals import Intervals


@struct.dataclass
class KindContext:
    """What layers of one kind (with RoPE, or without) share.

    Attributes:
        fresh: the mask among the tokens at hand.
        spans: the same as places of the row, for rows that lie on several devices.
        slots: of the cache once these tokens are in it; None without a cache.
        places: the cache slot of each token; None without a cache.
        joined: the mask over the cached slots as they were, followed by the tokens at hand.
        written: the mask over the cached slots once these tokens are in them.
        last_chunk: where the last chunk of each row begins, of rows that begin here and lie on several devices, chunks whole.
    """

    fresh: Mask
    spans: Intervals | None = None
    slots: Slots | None = None
    places: Int[Array, "B T"] | None = None
    joined: Mask | None = None
    written: Mask | None = None
    last_chunk: Int[Array, " B"] | None = None


@struct.dataclass
class Context:
    """Attributes:
    valid: tokens that are not padding; None when all are.
    rotation: of the layers with RoPE.
    temperature: the factor on the queries of NoPE layers; None without temperature tuning.
    local, full: of the layers with RoPE, and without.
    cache_is_empty: whether nothing was read before; False without a cache.
    zigzag: the order in which the tokens lie, where it is not that of the row.
    capacity_factor, router_jitter: of this pass's routing, see ObjectiveConfig.
    """

    valid: Bool[Array, "B T"] | None
    rotation: Rotation
    temperature: Float[Array, "#B T 1 1"] | None
    local: KindContext
    full: KindContext
    cache_is_empty: bool = struct.field(pytree_node=False, default=False)
    zigzag: Zigzag | None = struct.field(pytree_node=False, default=None)
    capacity_factor: float | None = struct.field(pytree_node=False, default=None)
    router_jitter: float = struct.field(pytree_node=False, default=0.0)


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Places counted from the start of each run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.concatenate([jnp.ones_like(segment_ids[:, :1], bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def explicit_positions(
    shape: tuple[int, int], positions: Int[Array, "B T"] | None, segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """The positions that make_context would assume without a cache."""
    if positions is not None:
        return positions
    if segment_ids is not None:
        return document_positions(segment_ids)
    return jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)


def temperature_factor(positions: Int[Array, "#B T"], tuning: AttentionTemperature) -> Float[Array, "#B T 1 1"]:
    """1 + scale * log(1 + floor((p + 1) / floor)), in float32 from integer positions. arXiv 2501.19399."""
    steps = jnp.floor((positions + 1).astype(jnp.float32) / tuning.floor)
    return (1 + tuning.scale * jnp.log1p(steps))[..., None, None]


def make_context(
    config: ModelConfig,
    shape: tuple[int, int],
    positions: Int[Array, "B T"] | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: Cache | None,
    document_window: int | None,
    zigzag: Zigzag | None = None,
) -> Context:
    """Positions that are not given count from the start of each document, and go on from what the cache holds.

    Positions and segment ids are in the order of the row, and the result is in that of the zigzag. A prompt that lies over
    `context` begins at its row's start, and its padding follows it.
    """
    index = jnp.arange(shape[1], dtype=jnp.int32)[None]
    whole_rows = cache is not None and cache.is_empty and reads_whole_rows(*shape)
    document_window = config.attention_chunk_size if whole_rows else document_window
    if positions is None and segment_ids is not None:
        positions = document_positions(segment_ids)
        if cache is not None:
            positions += cache.lengths[:, None]
    in_rows = positions, segment_ids
    if zigzag is not None:
        positions, segment_ids = map(zigzag.arrange, (explicit_positions(shape, positions, segment_ids), segment_ids))
    valid = None if segment_ids is None else segment_ids != 0
    if cache is not None:
        valid = jnp.ones(shape, bool) if valid is None else valid
        positions = cache.lengths[:, None] + index if positions is None else positions
    indices = index if positions is None else positions  # [#B, T]
    chunk = config.attention_chunk_size

    def kind(chunk: int | None, slots: Slots | None) -> KindContext:
        fresh = Mask(positions, segment_ids, chunk=chunk, document_window=document_window)
        if cache is None or whole_rows:
            found = KindContext(fresh, spans_of(Mask(*in_rows, chunk=chunk), *shape, zigzag))
        else:
            found = KindContext(fresh)
        if slots is None:
            return found
        over = lambda keys: Mask(positions, key_positions=keys, chunk=chunk)  # noqa: E731
        if not cache.is_empty:
            joined = jnp.concatenate([slots.positions, jnp.where(valid, positions, EMPTY)], axis=1)  # [B, S + T]
            found = found.replace(joined=over(joined))
        places = slots.places(positions, valid)
        if whole_rows:
            lengths = valid.sum(axis=1, dtype=jnp.int32)
            first = last_window(lengths, slots.positions.shape[1])
            if chunk is None or holds_windows(shape[1], slots.positions.shape[1], 1 if zigzag is None else 2):
                found = found.replace(last_chunk=first if zigzag is None else zigzag.places(first))
            slots = slots.filled(lengths, zigzag if chunk is None else None)
        else:
            slots = slots.write(positions, places)
        return found.replace(slots=slots, places=places, written=over(slots.positions))

    return Context(
        valid=valid,
        rotation=rotation(indices, inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), chunk),
        temperature=None if config.temperature is None else temperature_factor(indices, config.temperature),
        local=kind(chunk, None if cache is None else cache.local),
        full=kind(None, None if cache is None else cache.full),
        cache_is_empty=cache is not None and cache.is_empty,
        zigzag=zigzag,
    )

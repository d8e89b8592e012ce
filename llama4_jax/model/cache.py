"""Keys and values of what has been read, in slots that decoding updates in place.

A layer with RoPE never looks past its chunk, so it keeps C slots, position p in slot p mod C; a NoPE layer keeps a slot
for every position. Each slot knows its position, and the masks of decoding are those of training. Keys are stored as
attention uses them: rotated and normalised.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.config import ModelConfig
from llama4_jax.parallel.context_parallel import Zigzag

EMPTY = -1  # the position of a slot that holds nothing


@struct.dataclass
class Slots:
    """Which position each slot of one kind of layer holds, and where new tokens go.

    Attributes:
        positions: of each slot; EMPTY where it holds nothing.
        zigzag: the order of the slots, where it is not that of the positions.
    """

    positions: Int[Array, "B S"]
    zigzag: Zigzag | None = struct.field(pytree_node=False, default=None)

    def places(self, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
        """The slot of each token; S, which is out of range, for padding and for tokens that a later one overwrites."""
        S = self.positions.shape[1]
        last = jnp.max(jnp.where(valid, positions, EMPTY), axis=1, keepdims=True)
        slots = positions % S if self.zigzag is None else self.zigzag.places(positions % S)
        return jnp.where(valid & (positions > last - S), slots, S)

    def write(self, positions: Int[Array, "B T"], places: Int[Array, "B T"]) -> "Slots":
        rows = jnp.arange(positions.shape[0])[:, None]
        return self.replace(positions=self.positions.at[rows, places].set(positions, mode="drop"))

    def filled(self, lengths: Int[Array, " B"], zigzag: Zigzag | None) -> "Slots":
        """After the positions 0 to lengths - 1 were written to empty slots, of which the last S-aligned window is kept."""
        S = self.positions.shape[1]
        held = last_window(lengths, S)[:, None] + jnp.arange(S, dtype=jnp.int32)
        held = held if zigzag is None else zigzag.arrange(held)
        return Slots(jnp.where(held < lengths[:, None], held, EMPTY), zigzag)


def last_window(lengths: Int[Array, " B"], size: int) -> Int[Array, " B"]:
    """The multiple of `size` at which the window with the last of so many positions begins."""
    return jnp.maximum(lengths - 1, 0) // size * size


@struct.dataclass
class Cache:
    """The state of decoding: an argument and a result of the model, never hidden in it.

    Attributes:
        keys, values: for each layer j of the repeating block, all its L / period instances: [Lb, B, S_j, K, H].
        local: slots of the layers with RoPE.
        full: slots of the NoPE layers.
        lengths: tokens read so far, by row.
        is_empty: nothing was read yet. Known while the program is traced: the first piece of a prompt has a program of its own.
    """

    keys: tuple[Float[Array, "Lb B _ K H"], ...]
    values: tuple[Float[Array, "Lb B _ K H"], ...]
    local: Slots
    full: Slots
    lengths: Int[Array, " B"]
    is_empty: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, config: ModelConfig, batch_size: int, max_length: int, dtype=jnp.float32) -> "Cache":
        """An empty cache for rows of at most `max_length` tokens. Slots past a row's end would overwrite its start:
        whoever decodes must stop there."""
        kinds = config.block_kinds
        local = min(config.attention_chunk_size or max_length, max_length)
        sizes = [local if kind.uses_rope else max_length for kind in kinds]
        shapes = [(config.num_layers // len(kinds), batch_size, s, config.num_kv_heads, config.head_dim) for s in sizes]
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for shape in shapes),
            values=tuple(jnp.zeros(shape, dtype) for shape in shapes),
            local=Slots(jnp.full((batch_size, local), EMPTY, jnp.int32)),
            full=Slots(jnp.full((batch_size, max_length), EMPTY, jnp.int32)),
            lengths=jnp.zeros(batch_size, jnp.int32),
            is_empty=True,
        )


@struct.dataclass
class LayerCache:
    """One layer's view while the scan runs: the stacked slots, and which instance is now running."""

    keys: Float[Array, "Lb B S K H"]
    values: Float[Array, "Lb B S K H"]
    index: Int[Array, ""]

    def read(self) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        keys, values = (jax.lax.dynamic_index_in_dim(x, self.index, keepdims=False) for x in (self.keys, self.values))
        return keys, values

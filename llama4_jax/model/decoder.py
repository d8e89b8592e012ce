"""The decoder: one lax.scan over the shortest block of layers that repeats."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from llama4_jax.config import ExecutionConfig, LayerKind, ModelConfig
from llama4_jax.model.attention import Attention
from llama4_jax.model.cache import Cache, LayerCache
from llama4_jax.model.context import Context
from llama4_jax.model.moe import DenseFFN, MoE, RouterStats
from llama4_jax.model.norms import RMSNorm
from llama4_jax.model.remat import rematerialized


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then that + feed_forward(norm(that))."""

    config: ModelConfig
    execution: ExecutionConfig
    kind: LayerKind

    def setup(self):
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps)
        self.attention = Attention(c, self.execution, self.kind.uses_rope)
        self.ffn_norm = RMSNorm(c.norm_eps)
        self.feed_forward = MoE(c, self.execution) if self.kind.is_moe else DenseFFN(c, self.execution, c.dense_ffn_size)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, RouterStats | None]:
        attended, cache = self.attention(self.attention_norm(x), context, cache)
        x = nn.with_logical_constraint(x + attended, ("batch", "seq", "act_embed"))
        normed = self.ffn_norm(x)
        y, stats = self.feed_forward(normed, context) if self.kind.is_moe else (self.feed_forward(normed), None)
        return nn.with_logical_constraint(x + y, ("batch", "seq", "act_embed")), cache, stats


@struct.dataclass
class Carry:
    """What goes from block to block. The cache is carried, not scanned over, so that it is updated in place."""

    x: Float[Array, "*L B T D"]
    keys: tuple[Float[Array, "*L Lb B _ K H"], ...] | None
    values: tuple[Float[Array, "*L Lb B _ K H"], ...] | None
    index: Int[Array, "*L"]


class Block(nn.Module):
    """The body of the scan: the layers of `config.block_kinds`, called layer_0, layer_1, ..."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, carry: Carry, context: Context) -> tuple[Carry, tuple[RouterStats | None, ...]]:
        Layer = rematerialized(DecoderLayer, self.execution.remat)
        x, caches, all_stats = carry.x, [], []
        for j, kind in enumerate(self.config.block_kinds):
            cache = None if carry.keys is None else LayerCache(carry.keys[j], carry.values[j], carry.index)
            x, cache, stats = Layer(self.config, self.execution, kind, name=f"layer_{j}")(x, context, cache)
            caches.append(cache)
            all_stats.append(stats)
        carry = carry.replace(x=x, index=carry.index + 1)
        if carry.keys is not None:
            carry = carry.replace(keys=tuple(c.keys for c in caches), values=tuple(c.values for c in caches))
        return carry, tuple(all_stats)


def scanned_blocks(config: ModelConfig, execution: ExecutionConfig) -> Block:
    """All L layers. Parameters of instance b of a block's layer j lie at index b of `layer_j`'s leading axis."""
    return nn.scan(
        Block,
        variable_axes={"params": 0, "router_bias": 0, "intermediates": 0},
        split_rngs={"params": True, "jitter": True},
        in_axes=nn.broadcast,
        length=config.num_layers // len(config.block_kinds),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )(config, execution)


def run_layers(
    blocks: Block, x: Float[Array, "B T D"], context: Context, cache: Cache | None
) -> tuple[Float[Array, "B T D"], Cache | None, RouterStats | None]:
    """The residual stream after all layers, the cache with these tokens in it, and the statistics of every MoE layer."""
    keys, values = (None, None) if cache is None else (cache.keys, cache.values)
    carry, stats = blocks(Carry(x, keys, values, jnp.zeros((), jnp.int32)), context)
    if cache is not None:
        cache = Cache(
            keys=carry.keys,
            values=carry.values,
            local=context.local.slots,
            full=context.full.slots,
            lengths=cache.lengths + context.valid.sum(axis=1, dtype=jnp.int32),
        )
    return carry.x, cache, in_layer_order(stats)


def in_layer_order(stats: tuple[RouterStats | None, ...]) -> RouterStats | None:
    """Statistics stacked by block, [Lb, ...] for each layer of the block, as one array over all MoE layers in order."""
    stats = [s for s in stats if s is not None]
    if not stats:
        return None
    return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *stats)

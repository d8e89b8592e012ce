"""The token table."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from llama4_jax.config import ModelConfig
from llama4_jax.model.linear import normal
from llama4_jax.model.transfer import initial_stddev
from llama4_jax.parallel.dense_parallel import ROWS, gathered, gathering_mesh
from llama4_jax.parallel.rules import partition

TABLE_AXES = "vocab", "embed"
SCATTERED = 8192  # tokens whose gradients are added at once: XLA sorts them, and a sort of more compiles for long on TPU


class Embedding(nn.Module):
    """The token table, which a tied head reads too."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", normal(initial_stddev(c, "table"), TABLE_AXES), (c.vocab_size, c.hidden_size))

    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        mesh = gathering_mesh(*tokens.shape)
        if mesh is None or mesh.shape["tensor"] > 1:
            return lookup(self.embedding, tokens, dtype)
        spec = partition("embedding", self.embedding.shape, P(*TABLE_AXES), mesh)

        @partial(jax.shard_map, mesh=mesh, in_specs=(spec, ROWS), out_specs=ROWS, check_vma=False)
        @jax.checkpoint
        def on_shard(table, tokens):
            return lookup(gathered(table.astype(dtype), spec), tokens, dtype)

        return on_shard(self.embedding, tokens)

    def table(self) -> Float[Array, "V D"]:
        return self.embedding


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Rows of the table in `dtype`. Its gradient adds up in float32: a frequent token gets thousands of terms."""
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _forward(table, tokens, dtype):
    return lookup(table, tokens, dtype), (tokens, jnp.zeros((0, len(table)), table.dtype))


def _backward(dtype, residuals, dx):
    del dtype
    tokens, like = residuals
    D = dx.shape[-1]
    blocks = -(-tokens.size // SCATTERED)
    missing = -tokens.size % blocks
    tokens = jnp.pad(tokens.reshape(-1), (0, missing), constant_values=like.shape[1])  # beyond the table: dropped
    rows = jnp.pad(dx.reshape(-1, D), ((0, missing), (0, 0)))

    def add(table, block):
        tokens, rows = block
        return table.at[tokens].add(rows.astype(jnp.float32), mode="drop"), None

    parts = tokens.reshape(blocks, -1), rows.reshape(blocks, -1, D)
    table = jax.lax.scan(add, jnp.zeros((like.shape[1], D), jnp.float32), parts)[0]
    return table.astype(like.dtype), None


lookup.defvjp(_forward, _backward)

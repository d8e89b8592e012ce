"""The token table."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.config import ModelConfig
from llama4_jax.model.linear import normal
from llama4_jax.model.transfer import initial_stddev
from llama4_jax.parallel.dense_parallel import gathering_mesh, on_rows

TABLE_AXES = "vocab", "embed"
SCATTERED = 8192  # tokens whose gradients are added at once: XLA sorts them, and a TPU's sort of 65,536 takes 17 s to compile, of these 4


class Embedding(nn.Module):
    """The token table, which a tied head reads too."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embedding = self.param("embedding", normal(initial_stddev(c, "table"), TABLE_AXES), (c.vocab_size, c.hidden_size))

    def __call__(self, tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        if mesh := gathering_mesh(*tokens.shape, with_tensor=False):
            look_up = lambda table, tokens: lookup(table, tokens, dtype)  # noqa: E731
            return on_rows(look_up, mesh, self.embedding.astype(dtype), TABLE_AXES, tokens)
        return lookup(self.embedding, tokens, dtype)

    def table(self) -> Float[Array, "V D"]:
        return self.embedding


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Rows of the table in `dtype`. Its gradient adds up in float32: a frequent token gets thousands of terms."""
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _forward(table, tokens, dtype):
    return lookup(table, tokens, dtype), (table, tokens)  # of the table only its shape is used


def _backward(dtype, residuals, dx):
    del dtype
    table, tokens = residuals
    V, D = table.shape
    blocks = -(-tokens.size // SCATTERED)
    missing = -tokens.size % blocks
    tokens = jnp.pad(tokens.reshape(-1), (0, missing), constant_values=V)  # beyond the table: dropped
    rows = jnp.pad(dx.reshape(-1, D), ((0, missing), (0, 0)))

    def add(total, block):
        tokens, rows = block
        return total.at[tokens].add(rows.astype(jnp.float32), mode="drop"), None

    parts = tokens.reshape(blocks, -1), rows.reshape(blocks, -1, D)
    dtable = jax.lax.scan(add, jnp.zeros((V, D), jnp.float32), parts)[0]
    return dtable.astype(table.dtype), None


lookup.defvjp(_forward, _backward)

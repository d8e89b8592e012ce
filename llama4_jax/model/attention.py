"""Grouped-query attention of one layer: rotary and chunked, or NoPE and full with a temperature on the queries."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama4_jax.config import ExecutionConfig, ModelConfig
from llama4_jax.model.cache import LayerCache
from llama4_jax.model.context import Context, KindContext
from llama4_jax.model.linear import Linear
from llama4_jax.model.norms import rms_normalize
from llama4_jax.model.rotary import rotate
from llama4_jax.model.transfer import initial_stddev
from llama4_jax.parallel import context_parallel
from llama4_jax.parallel.cache_parallel import decode, store
from pallas_kernels.attention import attention


class Attention(nn.Module):
    """Attributes:
    config, execution: of the whole model.
    uses_rope: whether this layer is local (RoPE, chunks, QK norm) or full (NoPE, temperature).
    """

    config: ModelConfig
    execution: ExecutionConfig
    uses_rope: bool

    def setup(self):
        c = self.config
        shape, axes = (c.hidden_size, c.num_heads, c.head_dim), ("embed", "heads", "head_dim")
        kv_shape, kv_axes = (c.hidden_size, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim")
        stddev, settings = initial_stddev(c, "matrix"), {"use_bias": c.attention_bias, "matmul": self.execution.matmul}
        self.query = Linear(shape, axes, stddev, **settings)
        self.key = Linear(kv_shape, kv_axes, stddev, **settings)
        self.value = Linear(kv_shape, kv_axes, stddev, **settings)
        self.output = Linear(
            (c.num_heads, c.head_dim, c.hidden_size),
            ("heads", "head_dim", "embed"),
            initial_stddev(c, "residual"),
            in_axes=2,
            **settings,
        )

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        q, k, v = self.query(x), self.key(x), self.value(x)  # [B, T, N or K, H]
        if self.uses_rope:
            kind = context.local
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
            if self.config.qk_norm:
                q, k = rms_normalize(q, self.config.norm_eps), rms_normalize(k, self.config.norm_eps)
        else:
            kind = context.full
            if context.temperature is not None:
                q = (q.astype(jnp.float32) * context.temperature).astype(q.dtype)
        q = nn.with_logical_constraint(q, ("batch", "seq", "act_heads", None))
        if cache is None:
            out = self._attend_fresh(q, k, v, context, kind)
        else:
            out, cache = self._attend_cached(q, k, v, context, kind, cache)
        return self.output(out), cache

    def _attend_fresh(self, q, k, v, context: Context, kind: KindContext):
        options = {"zigzag": context.zigzag, "local": self._attend, "execution": self.execution}
        return context_parallel.attention(q, k, v, kind.fresh, kind.spans, **options)

    def _attend(self, q, k, v, mask):
        return attention(q, k, v, mask, implementation=self.execution.attention)

    def _attend_cached(self, q, k, v, context: Context, kind: KindContext, cache: LayerCache):
        """One token reads the slots after it was written. Several may overwrite slots that the first of them still
        needs, so they read the slots as they were, unless they were empty, and each other."""
        where = kind.places, cache.index, kind.written, kind.last_chunk
        written = cache.replace(keys=store(cache.keys, k, *where), values=store(cache.values, v, *where))
        if q.shape[1] == 1:
            slots = written.keys, written.values, kind.written, written.index
            return decode(q, *slots, implementation=self.execution.attention), written
        if context.cache_is_empty:
            return self._attend_fresh(q, k, v, context, kind), written
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip(_as(q, cache.read()), (k, v), strict=True))
        return self._attend(q, keys, values, kind.joined), written


def _as(like, arrays):
    return [x.astype(like.dtype) for x in arrays]

"""Attention over slots, as its definition says it."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention import Mask, Part
from pallas_kernels.decode_attention.quantized import Quantized


def decode_attention(query, keys, values, mask: Mask, layer) -> Part:
    """See `api.decode_attention`."""
    groups = query.shape[2] // keys.shape[-2]
    k, v = (jnp.repeat(_float32(x)[0 if layer is None else layer], groups, axis=2) for x in (keys, values))
    q = query.astype(jnp.float32) * query.shape[-1] ** -0.5
    scores = jnp.einsum("btnh,bsnh->btns", q, k, precision="highest")
    allowed = mask.allowed(slice(0, query.shape[1]), slice(0, k.shape[1]))  # [B, T, S]
    scores = jnp.where(allowed[:, :, None], scores, -1e30)
    out = jnp.einsum("btns,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v, precision="highest")
    return Part(out.astype(query.dtype), jax.nn.logsumexp(scores, axis=-1))


def _float32(x):
    return x.integers * x.scale[..., None] if isinstance(x, Quantized) else x.astype(jnp.float32)

"""Attention on TPU: its two kernels, joined for differentiation."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.attention.mask import Mask, by_windows
from pallas_kernels.attention.tpu_backward import backward
from pallas_kernels.attention.tpu_forward import check, forward


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    interpret=False,
) -> Float[Array, "B T N H"]:
    """See `api.attention`.

    Raises:
        NotImplementedError: keys of a cache, a head size that is no multiple of 128, or other dtypes than bfloat16 or float32.
    """
    check(query, key, value)
    return by_windows(functools.partial(_attention, interpret), query, key, value, mask)


def _attention(interpret, query, key, value, mask: Mask):
    where = intervals(mask, query.shape[1])
    return _attend(query, key, value, where.first, where.last, mask.chunk, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(query, key, value, first, last, reach: int | None, interpret):
    return forward(query, key, value, Intervals(first, last), reach=reach, interpret=interpret).out


def _forward(query, key, value, first, last, reach, interpret):
    where = Intervals(first, last)
    part = forward(query, key, value, where, reach=reach, interpret=interpret)
    return part.out, (query, key, value, where, part)


def _backward(reach, interpret, residuals, dout):
    query, key, value, where, part = residuals
    delta = jnp.sum(dout.astype(jnp.float32) * part.out.astype(jnp.float32), axis=-1)
    return *backward(query, key, value, where, part.lse, dout, delta, interpret=interpret), None, None


_attend.defvjp(_forward, _backward)

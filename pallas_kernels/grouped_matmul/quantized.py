"""Matrices in eight or four bits, with a scale for each block of the contraction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = {"int8": 127, "int4": 7}  # symmetric: -128 and -8 are left out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """values * scales, each scale for the `block` values below one another. Frozen: no gradient goes to either.

    Attributes:
        values: [.., D, F], int8 or int4.
        scales: [.., D / block, F], float32 or bfloat16.
    """

    values: Any  # not jax.Array: jax also rebuilds pytrees around abstract values and placeholders
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def block(self) -> int:
        return self.values.shape[-2] // self.scales.shape[-2]

    def __getitem__(self, index) -> "Quantized":
        """Some of the matrices: an index of the axes before D."""
        return Quantized(self.values[index], self.scales[index])


def quantize(w: Float[Array, "*G D F"], dtype: str, block: int) -> Quantized:
    """The nearest values of `dtype`, each block's largest magnitude being the largest value.

    An element changes by at most half of its scale, that is max |w| of its block / 254 in int8 and / 14 in int4, and by
    float32's rounding.

    Args:
        dtype: int8 or int4.
        block: elements of a column that share a scale.

    Raises:
        ValueError: another dtype, or a block that does not divide D.
    """
    if dtype not in LARGEST:
        raise ValueError(f"quantize: dtype must be int8 or int4, not {dtype}")
    *groups, D, F = w.shape
    if block < 1 or D % block:
        raise ValueError(f"quantize: blocks of {block} do not divide a contraction of {D}")
    blocks = w.astype(jnp.float32).reshape(*groups, D // block, block, F)
    scales = jnp.max(jnp.abs(blocks), axis=-2) / LARGEST[dtype]
    safe = jnp.where(scales > 0, scales, 1.0)
    values = jnp.clip(jnp.round(blocks / safe[..., None, :]), -LARGEST[dtype], LARGEST[dtype])
    return Quantized(values.reshape(w.shape).astype(dtype), scales)


def dequantize(w: Quantized, dtype) -> Float[Array, "*G D F"]:
    """The product in float32, rounded to `dtype`; no gradient."""
    wide = jnp.promote_types(dtype, jnp.float32)
    scales = jnp.repeat(jax.lax.stop_gradient(w.scales).astype(wide), w.block, axis=-2)
    return (w.values.astype(wide) * scales).astype(dtype)

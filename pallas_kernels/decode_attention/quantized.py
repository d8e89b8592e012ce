"""Keys and values in eight bits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """integers * scale, with one scale for each slot and head.

    A key's scale can be taken out of its product with a query, and a value's put into its probability, so that neither is ever
    written out in full.
    """

    integers: Int8[Array, "*L B S K H"]
    scale: Float[Array, "*L B S K"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.integers.shape


def quantize(x: Float[Array, "*L B S K H"]) -> Quantized:
    """The nearest of 255 evenly spaced numbers up to the largest magnitude of each slot and head; an error of at most half a
    step, 1/254 of that magnitude."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    integers = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None]).astype(jnp.int8)
    return Quantized(integers, scale)


def parts(x: Float[Array, "*L B S K H"] | Quantized) -> tuple[Array, Float[Array, "*L B S K"] | None]:
    """The numbers to multiply, and the scale of each slot and head if they have one."""
    return (x.integers, x.scale) if isinstance(x, Quantized) else (x, None)

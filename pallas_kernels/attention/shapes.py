"""Real shapes, shared by the tests, the schedule tool and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case
from pallas_kernels.attention import tpu_forward
from pallas_kernels.attention.intervals import intervals
from pallas_kernels.attention.mask import Mask


@dataclasses.dataclass(frozen=True)
class Shape:
    """Self-attention of rows of T tokens, in chunks if `chunk`."""

    B: int
    T: int
    N: int
    K: int
    H: int
    chunk: int | None = None


SHAPES = {
    "group": Shape(1, 8192, 5, 1, 128),  # what one KV head of Scout and Maverick serves, in a chunk
    "scout": Shape(1, 8192, 40, 8, 128),
    "scout_packed": Shape(1, 32768, 40, 8, 128, chunk=8192),  # a RoPE layer whose chunks do not lie on windows
    "scout_long": Shape(1, 131072, 40, 8, 128),  # a NoPE layer
}


def case(devices, shape: str, dtype: str = "bfloat16") -> Case:
    """The TPU kernel on one of SHAPES, for `aot.compile_for`."""
    size = SHAPES[shape]

    def function(query, key, value):
        return tpu_forward.forward(query, key, value, intervals(Mask(chunk=size.chunk), size.T), reach=size.chunk)

    abstract = lambda heads: jax.ShapeDtypeStruct((size.B, size.T, heads, size.H), jnp.dtype(dtype))  # noqa: E731
    return Case(function, (abstract(size.N), abstract(size.K), abstract(size.K)))

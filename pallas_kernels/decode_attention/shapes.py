"""Real shapes, shared by the tests, the schedule tool and benchmarks."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case
from pallas_kernels.attention import Mask
from pallas_kernels.decode_attention import tpu
from pallas_kernels.decode_attention.quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Shape:
    """T queries of N heads over S slots of K heads of size H, for each of B rows; L layers in the stack."""

    L: int
    B: int
    T: int
    S: int
    N: int = 40  # heads of Llama 4 Scout and Maverick
    K: int = 8
    H: int = 128
    chunk: int | None = None


SHAPES = {
    "local": Shape(L=4, B=32, T=1, S=8192, chunk=8192),
    "full": Shape(L=2, B=4, T=1, S=131_072),
    "guessed": Shape(L=2, B=8, T=4, S=32_768),  # several tokens at once, to be checked
}


def case(devices, shape: str, eight_bits: bool = False, block: int | None = None) -> Case:
    """The TPU kernel on one of SHAPES, for `aot.compile_for`."""
    size = SHAPES[shape]
    abstract = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    slots = size.L, size.B, size.S, size.K
    cache = abstract(jnp.bfloat16, *slots, size.H)
    if eight_bits:
        cache = Quantized(abstract(jnp.int8, *slots, size.H), abstract(jnp.float32, *slots))

    def function(query, keys, values, query_positions, slot_positions, layer):
        mask = Mask(query_positions, key_positions=slot_positions, chunk=size.chunk)
        return tpu.decode_attention(query, keys, values, mask, layer, block=block)

    query = abstract(jnp.bfloat16, size.B, size.T, size.N, size.H)
    positions = abstract(jnp.int32, size.B, size.T), abstract(jnp.int32, size.B, size.S)
    return Case(function, (query, cache, cache, *positions, abstract(jnp.int32)))

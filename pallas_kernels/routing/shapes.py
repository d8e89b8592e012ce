"""Real shapes, shared by the tests and the schedule tool."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.aot import Case
from pallas_kernels.routing import api, tpu


@dataclasses.dataclass(frozen=True)
class Shape:
    """M tokens that choose X of E experts; D numbers each."""

    M: int
    E: int
    X: int
    D: int


SHAPES = {
    "scout": Shape(8192, 16, 1, 5120),  # Llama 4 Scout
    "maverick": Shape(8192, 128, 1, 5120),  # Llama 4 Maverick
    "eight_of_128": Shape(8192, 128, 8, 5120),  # as many small experts' models choose
}


def case(devices, shape: str) -> Case:
    """The TPU kernel on one of SHAPES, for `aot.compile_for`."""
    size = SHAPES[shape]
    logits = jax.ShapeDtypeStruct((size.M, size.E), jnp.float32)
    valid = jax.ShapeDtypeStruct((size.M,), jnp.bool_)
    return Case(lambda logits, valid: tpu.route(logits, size.X, None, valid), (logits, valid))


def moving(devices, shape: str, implementation: str = "tpu", gradients: bool = False) -> Case:
    """The tokens of one of SHAPES to their experts, in bfloat16; with `gradients` those alone, of the tokens and scores."""
    size, permute = SHAPES[shape], api.PERMUTE[implementation]
    abstract = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    choices = abstract(size.M, size.X, dtype=jnp.float32), abstract(size.M, size.X, dtype=jnp.int32)
    arguments = (abstract(size.M, size.D), *choices)

    def backward(x, scores, place, drows):
        return jax.vjp(lambda x, scores: permute(x, scores, place), x, scores)[1](drows)

    return Case(backward, (*arguments, abstract(size.M * size.X, size.D))) if gradients else Case(permute, arguments)

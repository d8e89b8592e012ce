"""Real shapes, shared by the tests, the schedule tool and benchmarks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.aot import Case
from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.ring_attention import tpu

AXIS = "context"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows of T tokens on each shard."""

    B: int
    T: int
    N: int
    K: int
    H: int


SHAPES = {
    "group": Shape(1, 8192, 5, 1, 128),  # what one KV head of Scout and Maverick serves
    "scout": Shape(1, 8192, 40, 8, 128),
    "scout_long": Shape(1, 65_536, 40, 8, 128),  # 512 shards of these are 32 million tokens
}


def case(devices, shape: str, zigzag: bool = False, gradients: bool = False, remote: bool = True) -> Case:
    """The ring over all `devices` on one of SHAPES, for `aot.compile_for`."""
    size, mesh = SHAPES[shape], Mesh(np.array(devices), (AXIS,))
    rows = P(None, AXIS)
    ring = jax.shard_map(
        partial(tpu.ring_attention, axis=AXIS, zigzag=zigzag, remote=remote),
        mesh=mesh,
        in_specs=(rows, rows, rows, Intervals(rows, rows)),
        out_specs=rows,
        check_vma=False,
    )

    def backward(query, key, value, spans, dout):
        return jax.vjp(lambda *arrays: ring(*arrays, spans), query, key, value)[1](dout)

    def abstract(*rest, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((size.B, size.T * len(devices), *rest), dtype, sharding=NamedSharding(mesh, rows))

    heads = lambda n: abstract(n, size.H)  # noqa: E731
    spans = Intervals(abstract(dtype=jnp.int32), abstract(dtype=jnp.int32))
    arguments = (heads(size.N), heads(size.K), heads(size.K), spans)
    function, arguments = (backward, (*arguments, heads(size.N))) if gradients else (ring, arguments)
    return Case(function, arguments, partial(jax.set_mesh, mesh))

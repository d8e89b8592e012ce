"""Programs whose work is known by hand, compiled and measured: a child of test_measure.py prints their measurements as JSON."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.planning.chips import parse_topology
from llama4_jax.planning.measure import measure

BF16, F32 = jnp.bfloat16, jnp.float32


def programs(mesh):
    """Name to (function, arguments), on axes a of 4 and b of 2, and slices."""
    everything = P(("slice", "a", "b"))
    n = mesh.size

    def array(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def mapped(function, inputs, output):
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)

    rows = array((1024 * n, 512), BF16, ("slice", "a", "b"))

    def scanned(x, w):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "a", axis=0, tiled=True)), None

        return jax.lax.scan(layer, x, w)[0]

    def nested(x, w):
        def outer(x, _):
            return jax.lax.fori_loop(1, 8, lambda _, x: jnp.tanh(x @ w), x), None

        return jax.lax.scan(outer, x, length=3)[0]

    def layers(x, weights):  # large enough that gathers run beside products
        for w in weights:
            x = jnp.tanh(x @ w)
        return x

    def as_long_as(x, turns):
        return jax.lax.while_loop(lambda c: c[0] < turns, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (jnp.int32(0), x))[1]

    def either(x, w, small):
        return jax.lax.cond(small, lambda: jnp.tanh(x) @ w[:, :128] @ w[:128], lambda: jnp.tanh(x @ w @ w))

    def kernel(x):
        def double(x_ref, y_ref):
            y_ref[...] = x_ref[...] * 2

        estimate = pl.CostEstimate(flops=123_456, transcendentals=0, bytes_accessed=7_890)
        return pl.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), cost_estimate=estimate)(x)

    def carried(x):
        def turn(_, arrays):
            a, b, c = arrays
            return jnp.roll(b, 1, axis=0) * 2, jnp.flip(a, axis=0) + 1, jnp.roll(c, 3, axis=0)

        return sum(a.sum() for a in jax.lax.fori_loop(0, 5, turn, (x, x * 2, x * 3)))

    square = array((512, 512), BF16)
    ring = [(i, (i + 1) % mesh.shape["a"]) for i in range(mesh.shape["a"])]
    return {
        "fsdp": (jnp.dot, [array((1024 * n, 2048), BF16, ("slice", "a", "b")), array((2048, 4096), BF16, "a")]),
        "all_to_all": (mapped(lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True) * 2, (everything,), everything), [rows]),
        "permute": (mapped(lambda x: jax.lax.ppermute(x, "a", ring) * 2, (everything,), everything), [rows]),
        "scatter": (
            mapped(lambda x: jax.lax.psum_scatter(x, "a", tiled=True), (P(),), P("a")),
            [array((4096, 512), BF16)],
        ),
        "sum_over_two": (mapped(lambda x: jax.lax.psum(x, ("a", "b")), (everything,), P("slice")), [rows]),
        "sum_over_all": (mapped(lambda x: jax.lax.psum(x, ("slice", "a", "b")), (everything,), P()), [rows]),
        "scan": (
            mapped(scanned, (P(("slice", "b")), P(None, "a")), P(("slice", "b"))),
            [array((2048, 512), BF16, ("slice", "b")), array((6, 512, 512), BF16, None, "a")],
        ),
        "nested": (nested, [square, square]),
        "layers": (layers, [array((1024 * n, 2048), BF16, ("slice", "a", "b")), [array((2048, 2048), BF16, "a", "b")] * 4]),
        "batched": (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [array((8, 256, 384), F32), array((8, 384, 128), F32)]),
        "grouped": (lambda x, y: jnp.einsum("mgd,gdf->mgf", x, y), [array((512, 4, 256), BF16), array((4, 256, 128), BF16)]),
        "eight_bits": (
            lambda x, y: jax.lax.dot(x, y, preferred_element_type=jnp.int32),
            [array((512, 512), jnp.int8), array((512, 512), jnp.int8)],
        ),
        "as_long_as": (as_long_as, [square, array((), jnp.int32)]),
        "either": (either, [square, square, array((), jnp.bool_)]),
        "kernel": (mapped(kernel, (P(),), P()), [array((512, 512), F32)]),
        "elementwise": (lambda x, y: x * y + 1, [array((4096, 4096), F32), array((4096, 4096), F32)]),
        "carried": (carried, [array((4096, 8192), F32)]),
        "padded": (lambda x: jnp.tanh(x), [array((1000, 1000), F32)]),
    }


def main(name: str, slices: int, chosen: list[str]) -> None:
    options = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    per_slice = len(devices) // slices
    mesh = Mesh(np.array(devices).reshape(slices, per_slice // 2, 2), ("slice", "a", "b"), axis_types=(AxisType.Auto,) * 3)
    topology, found = parse_topology(name, slices), {}
    for program, (function, arguments) in programs(mesh).items():
        if program in chosen or not chosen:
            with jax.set_mesh(mesh):
                compiled = jax.jit(function).lower(*arguments).compile()
            found[program] = dataclasses.asdict(measure(compiled, tuple(arguments), topology, mesh))
    print("measured: " + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

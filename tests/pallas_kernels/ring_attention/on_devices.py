"""Run by test_ring_attention.py in a process of its own: the ring on simulated devices against one device.

    python on_devices.py DEVICES CASE...

Writes a JSON line for each case: relative errors of the output and of every gradient, and races that were found.
"""

import json
import os
import sys
from functools import partial

# More than are used: there are as many threads, and the interpreter's devices wait for each other in them.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import Mask, attention
from pallas_kernels.attention import gpu as gpu_kernels
from pallas_kernels.attention.intervals import Intervals, intervals
from pallas_kernels.attention.tpu_forward import Tiling
from pallas_kernels.ring_attention import gpu, reference, tpu, xla
from pallas_kernels.ring_attention.layout import Layout, reach

B, N, K, H = 2, 2, 1, 128
LAYOUTS = {"": False, "_zigzag": True}
MASKS = ("causal", "documents", "chunks", "both_ways", "alone", "none")
CASES = {mask + suffix: (mask, zigzag) for mask in MASKS for suffix, zigzag in LAYOUTS.items()}


def row_mask(name: str, length: int) -> Mask:
    segments = np.zeros((B, length), np.int32)
    for row, edges in enumerate(([0.1, 0.12, 0.7], [0.45, 0.5, 0.97])):
        for edge in edges:
            segments[row, int(edge * length) :] += 1
    positions = np.array([[i - np.flatnonzero(row == row[i])[0] for i in range(length)] for row in segments], np.int32)
    segments, positions = jnp.asarray(segments), jnp.asarray(positions)
    return {
        "causal": Mask(),
        "documents": Mask(positions, segments),
        "chunks": Mask(positions, segments, chunk=length // 5),
        "both_ways": Mask(positions, segments, causal=False),
        "alone": Mask(chunk=1),
        "none": Mask(positions, segments),
    }[name]


def order(shards: int, length: int, zigzag: bool):
    """The place in the row of each place of the layout."""
    pieces = np.arange(length).reshape(2 * shards, -1)
    if not zigzag:
        return np.arange(length)
    return np.concatenate([pieces[[i, 2 * shards - 1 - i]].reshape(-1) for i in range(shards)])


def run(implementation, case: str, shards: int, per_shard: int):
    """(out, dq, dk, dv) of the ring in the row's order, and of one device."""
    name, zigzag = CASES[case]
    T = shards * per_shard
    rng = np.random.default_rng(len(case))
    q, k, v, dout = (jnp.asarray(rng.standard_normal((B, T, n, H)), jnp.float32) for n in (N, K, K, N))
    mask = row_mask(name, T)
    spans = intervals(mask, T)
    readers = jnp.ones((1, T, 1, 1), bool)
    if name == "none":  # some queries read nothing at all
        readers = (jnp.arange(T) % 3 > 0)[None, :, None, None]
        spans = Intervals(spans.first, jnp.where(readers[..., 0, 0], spans.last, -1))
    whole = lambda q, k, v: jnp.where(readers, attention(q, k, v, mask, implementation="reference"), 0)  # noqa: E731
    want = jax.jit(partial(with_gradients, whole))(q, k, v, dout)

    mesh, rows = make_mesh(shards), P(None, "context")
    places = order(shards, T, zigzag)
    ring = jax.shard_map(
        partial(implementation, axis="context", zigzag=zigzag),
        mesh=mesh,
        in_specs=(rows, rows, rows, Intervals(rows, rows)),
        out_specs=rows,
        check_vma=False,
    )
    arranged = jax.tree.map(lambda x: jnp.take(x, places, axis=1), (q, k, v, dout, spans))
    *arrays, dout, spans = arranged
    got = jax.jit(partial(with_gradients, lambda *arrays: ring(*arrays, spans)))(*arrays, dout)
    back = np.argsort(places)
    return [x[:, back] for x in got], want


def make_mesh(shards: int):
    return jax.make_mesh((shards,), ("context",), (AxisType.Auto,), devices=jax.devices()[:shards])


def reaches(case: str, shards: int, per_shard: int):
    """How far each piece of each shard goes; the same on all shards."""
    name, zigzag = CASES[case]
    T, rows = shards * per_shard, P(None, "context")
    spans = jax.tree.map(lambda x: jnp.take(x, order(shards, T, zigzag), axis=1), intervals(row_mask(name, T), T))
    found = jax.shard_map(
        lambda spans: reach(spans, Layout("context", zigzag, per_shard))[None],
        mesh=make_mesh(shards),
        in_specs=(Intervals(rows, rows),),
        out_specs=P("context"),
        check_vma=False,
    )(spans)
    assert (found == found[0]).all()
    return found[0].tolist()


def with_gradients(function, q, k, v, dout):
    out, pullback = jax.vjp(function, q, k, v)
    return out, *pullback(dout)


def main(devices: int, *cases: str) -> None:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    small = Tiling(queries=128, keys=128, edge=128, span=128)
    for name in cases:
        implementation, case = name.split(":")
        functions = {
            "reference": reference.ring_attention,
            "xla": xla.ring_attention,
            "tpu": partial(tpu.ring_attention, tiling=small, interpret=strict, remote=True),
            "gpu": partial(gpu.ring_attention, tiling=gpu_kernels.Tiling(16, 16, 1, 1), interpret=True),
            "permuted": partial(tpu.ring_attention, tiling=small, interpret=True, remote=False),
        }
        per_shard = 256 if CASES[case][1] else 128
        if implementation == "reach":
            print(json.dumps({"case": name, "reach": reaches(case, devices, per_shard)}), flush=True)
            continue
        got, want = run(functions[implementation], case, devices, per_shard)
        errors = [float(np.abs(a - b).max() / max(np.abs(b).max(), 1)) for a, b in zip(got, want, strict=True)]
        races = interpret_pallas_call.races
        print(json.dumps({"case": name, "errors": errors, "races": bool(races is not None and races.races_found)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

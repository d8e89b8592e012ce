"""Attention over a cache against its definition, where rows have any length, slots any order, and chunks end anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.attention import Mask, merge
from pallas_kernels.decode_attention import decode_attention, quantize, reference, tpu, xla
from pallas_kernels.decode_attention.shapes import SHAPES

S, N, K, H, C = 384, 6, 2, 128, 256
BLOCK = 128
STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def cache_mask(lengths, T, chunk=None, slots=S):
    """Rows of which `lengths` tokens were written one by one, the last T of them the queries; slot = position mod slots."""
    positions = np.full((len(lengths), slots), -1, np.int32)
    for row, length in enumerate(lengths):
        for p in range(length):
            positions[row, p % slots] = p
    queries = np.array([[max(length - T + t, 0) for t in range(T)] for length in lengths], np.int32)
    return Mask(jnp.asarray(queries), key_positions=jnp.asarray(positions), chunk=chunk)


def inputs(B, T, dtype=jnp.float32, seed=0, layers=()):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (*layers, B, S, K, H), (*layers, B, S, K, H)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames="implementation")
def run(query, keys, values, mask, implementation, layer=None):
    functions = {
        "reference": reference.decode_attention,
        "xla": xla.decode_attention,
        "tpu": functools.partial(tpu.decode_attention, interpret=True, block=BLOCK),
        "strict": functools.partial(tpu.decode_attention, interpret=STRICT, block=BLOCK),
    }
    if layer is None:
        keys, values = jax.tree.map(lambda x: x[None], (keys, values))
    return functions[implementation](query, keys, values, mask, layer)


def check(implementation, arrays, mask, tolerance=2e-6, **options):
    got, want = (run(*arrays, mask, name, **options) for name in (implementation, "reference"))
    T, slots = mask.query_positions.shape[1], mask.key_positions.shape[1]
    reads = np.asarray(mask.allowed(slice(0, T), slice(0, slots)).any(axis=2))
    assert got.out.dtype == arrays[0].dtype
    out, wanted = (np.asarray(x.out, np.float32) for x in (got, want))
    np.testing.assert_allclose(out[reads], wanted[reads], atol=tolerance)
    np.testing.assert_allclose(np.asarray(got.lse)[reads], np.asarray(want.lse)[reads], atol=max(tolerance, 1e-5))
    assert np.isfinite(out).all() and (np.asarray(got.lse)[~reads] < -1e29).all()


HARD = {
    "nothing was written": ([0, 0, 0], 1, None),
    "ragged, to block edges and one past": ([128, 129, 1], 1, None),
    "an empty row between others": ([300, 0, 384], 1, None),
    "chunks: first of one, last of one, wrapped": ([257, 256, 900], 1, C),
    "several queries on both sides of a chunk's edge": ([258, 5, 0], 4, C),
}


@pytest.mark.parametrize("implementation", ["xla", "tpu", "strict"])
@pytest.mark.parametrize("name", HARD)
def test_hard_cases_are_the_reference(name, implementation):
    lengths, T, chunk = HARD[name]
    check(implementation, inputs(3, T), cache_mask(lengths, T, chunk))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=3, max_size=3), st.integers(0, 99))
def test_any_lengths_after_many_turns_of_the_slots(implementation, lengths, seed):
    check(implementation, inputs(3, 2, seed=seed), cache_mask(lengths, 2, C))


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_eight_bits_are_the_reference_of_what_they_stand_for(implementation):
    q, k, v = inputs(2, 2)
    check(implementation, (q, quantize(k), quantize(v)), cache_mask([300, 77], 2, C), 5e-6)


def test_eight_bits_are_off_by_half_a_step_at_most_and_zeros_stay():
    x = inputs(1, 1)[1].at[0, 3].set(0)
    found = quantize(x)
    error = np.abs(found.integers * found.scale[..., None] - x).max(axis=-1)
    assert (error <= np.abs(x).max(axis=-1) / 254 * 1.0001).all()
    assert found.integers.dtype == jnp.int8 and not found.integers[0, 3].any()


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_bfloat16_differs_by_rounding_alone(implementation):
    check(implementation, inputs(2, 1, jnp.bfloat16), cache_mask([300, 77], 1), 2e-2)


@pytest.mark.parametrize("implementation", ["reference", "xla", "tpu"])
def test_a_layer_of_a_stack_is_that_layer(implementation):
    q, k, v = inputs(2, 1, layers=(3,))
    mask = cache_mask([300, 77], 1)
    got = run(q, k, v, mask, implementation, layer=jnp.int32(2))
    np.testing.assert_array_equal(got.out, run(q, k[2], v[2], mask, implementation).out)


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_shards_of_the_slots_merge_to_the_whole(implementation):
    q, k, v = inputs(3, 1)
    mask = cache_mask([300, 100, 1], 1)
    halves = []
    for cut in (slice(0, 128), slice(128, None)):
        part = Mask(mask.query_positions, key_positions=mask.key_positions[:, cut])
        halves.append(run(q, k[:, cut], v[:, cut], part, implementation))
    whole = run(q, k, v, mask, "reference")
    merged = merge(*halves)
    np.testing.assert_allclose(merged.out, whole.out, atol=2e-6)
    np.testing.assert_allclose(merged.lse, whole.lse, atol=1e-5)


def test_only_blocks_with_something_to_read_are_visited():
    """Rows of 130 tokens, none, and 384, in blocks of 128 slots: two, one (for its output), and three; after a new chunk begins, one."""
    mask = cache_mask([130, 0, 384], 1)
    assert visits(mask) == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    mask = cache_mask([600, 257], 1, chunk=C, slots=C)  # positions 512 to 599 are in slots 0 to 87, position 256 in slot 0
    assert visits(mask) == [(0, 0), (1, 0)]


def visits(mask):
    row, part, count = tpu._visits(mask.key_positions, *tpu._read_by(mask), BLOCK)
    return list(zip(row[:count].tolist(), part[:count].tolist(), strict=True))


def test_what_cannot_be_done_is_refused():
    q, k, v = inputs(1, 1)
    mask = cache_mask([5], 1)
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2"):
        decode_attention(q[:, :, :5], k, v, mask)
    with pytest.raises(ValueError, match="positions of queries and slots"):
        decode_attention(q, k, v, Mask())
    with pytest.raises(NotImplementedError, match="H=64"):
        decode_attention(*(x[..., :64] for x in (q, k, v)), mask, implementation="tpu")
    with pytest.raises(NotImplementedError, match="at most 512"):
        decode_attention(jnp.tile(q, (1, 100, 1, 1)), k, v, mask, implementation="tpu")
    with pytest.raises(NotImplementedError, match="float32 x bfloat16"):
        decode_attention(q, *(x.astype(jnp.bfloat16) for x in (k, v)), mask, implementation="tpu")


needs_libtpu = pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")
REQUESTS = [
    aot.Request("pallas_kernels.decode_attention.shapes:case", {"shape": shape, "eight_bits": eight_bits})
    for shape in SHAPES
    for eight_bits in (False, True)
]


def compiles(chip, requests):
    for request, outcome in zip(requests, aot.compile_for(chip, requests), strict=True):
        assert outcome.error is None, (request, outcome.error)
        size = SHAPES[request.options["shape"]]
        cache = 2 * size.L * size.B * size.S * size.K * size.H * (1 if request.options["eight_bits"] else 2)
        assert outcome.temporary_bytes < 0.2 * cache, "the cache is copied"


@needs_libtpu
def test_it_compiles_for_a_tpu_and_copies_no_cache():
    compiles("v5p", REQUESTS[:2])


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_it_compiles_for_every_tpu(chip):
    compiles(chip, REQUESTS)

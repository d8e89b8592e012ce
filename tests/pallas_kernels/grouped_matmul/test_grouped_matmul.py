"""Grouped products against the loop over all groups, forward and both gradients, where groups end anywhere at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu, reference, tiling, tpu, visits, xla
from pallas_kernels.grouped_matmul.shapes import SHAPES

TILING = tiling.Tiling(rows=16, columns=128, piece=128)
D, F = 256, 256
CASES = {  # rows, sizes of all groups, first of ours, how many are ours; few different shapes, so few compilations
    "groups end inside tiles": (40, [10, 0, 25, 0], 0, 4),
    "nobody at all": (40, [0, 0, 0, 0], 0, 4),
    "one row": (40, [0, 1, 0, 0], 0, 4),
    "groups end on tiles": (40, [16, 16, 0, 8], 0, 4),
    "one group has all rows": (40, [0, 0, 40, 0], 0, 4),
    "all in one tile": (40, [3, 7, 2, 1], 0, 4),
    "rows after the last group": (40, [3, 14, 0, 1], 0, 4),
    "a shard in the middle": (40, [16, 1, 1, 22], 1, 2),
    "a shard that nobody chose": (40, [20, 0, 0, 20], 1, 2),
    "the last shard": (40, [0, 7, 9, 24], 2, 2),
    "a single row and group": (1, [1], 0, 1),
    "no rows": (0, [0], 0, 1),
}
OPERATIONS = ["grouped_matmul", "grouped_swiglu"]


@functools.cache
def interpreted(op, tile=TILING, interpret=True):
    return functools.partial(getattr(tpu, op), tiling=tile, interpret=interpret)


def operands(op, M, G, dtype=jnp.float32, seed=0):
    draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape, jnp.float32).astype(dtype)  # noqa: E731
    return draw(seed, M, D), draw(seed + 1, G, *[2] * (op == "grouped_swiglu"), D, F) * D**-0.5


def gradients(function, lhs, rhs, sizes, first, dout):
    out, back = jax.vjp(lambda lhs, rhs: function(lhs, rhs, sizes, first), lhs, rhs)
    return out, *back(dout)


def check(function, op, M, sizes, offset, G, *, dtype=jnp.float32, tolerance=2e-5, seed=0):
    """Output and both gradients are the reference's, and foreign rows are exactly zero."""
    specification = getattr(reference, op)
    lhs, rhs = operands(op, M, G, dtype, seed)
    sizes, first = jnp.array(sizes, jnp.int32), jnp.int32(offset)
    dout = jax.random.normal(jax.random.key(seed + 2), (M, F)).astype(dtype)
    both = _gradients(function)(lhs, rhs, sizes, first, dout), _gradients(specification)(lhs, rhs, sizes, first, dout)
    for name, got, want in zip(("out", "dlhs", "drhs"), *both, strict=True):
        assert got.dtype == want.dtype == dtype
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        np.testing.assert_allclose(got, want, atol=tolerance * (np.abs(want).max(initial=0) + 1), rtol=0, err_msg=name)
    mine = np.asarray(reference.rows_of_groups(M, G, sizes, first)).any(axis=0)
    assert not np.asarray(both[0][0], np.float32)[~mine].any()


@functools.cache
def _gradients(function):
    return jax.jit(functools.partial(gradients, function))


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_tpu_kernel_is_the_reference_interpreted(name, op):
    M, sizes, offset, G = CASES[name]
    check(interpreted(op), op, M, sizes, offset, G)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", ["groups end inside tiles", "nobody at all", "a shard in the middle"])
def test_xla_is_the_reference(name, op):
    M, sizes, offset, G = CASES[name]
    check(getattr(xla, op), op, M, sizes, offset, G)


@pytest.mark.parametrize("op", OPERATIONS)
def test_bfloat16_differs_from_the_reference_by_rounding_alone(op):
    check(interpreted(op), op, 40, [10, 0, 25, 0], 0, 4, dtype=jnp.bfloat16, tolerance=2e-2)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_sizes_and_any_shard(data):
    """Drawn so that one compilation serves all: only the sizes, the shard's place and the numbers change."""
    sizes = data.draw(st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=5, max_size=5))
    while sum(sizes) > 56:
        sizes[sizes.index(max(sizes))] //= 2
    offset, seed = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 99))
    check(interpreted("grouped_matmul"), "grouped_matmul", 56, sizes, offset, 3, seed=seed)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 16), min_size=6, max_size=6),
    G=st.sampled_from([1, 3, 6]),
    tile=st.sampled_from([7, 16]),
    data=st.data(),
)
def test_visits_cover_every_row_once_in_an_order_that_a_grid_can_walk(sizes, G, tile, data):
    """Against a walk in plain Python, for both orders."""
    M = 100
    offset = data.draw(st.integers(0, 6 - G))
    ends = np.cumsum(sizes)[offset : offset + G]
    starts = ends - np.array(sizes)[offset : offset + G]
    wanted = [(row // tile, g, row) for g in range(G) for row in range(starts[g], ends[g])]
    for plan in (_by_tile, _by_group):
        walk = np.stack(plan(jnp.asarray(starts), jnp.asarray(ends), M, tile).arrays(), axis=1)
        assert [(t, g, row) for t, g, _, _, start, stop in walk for row in range(start, stop)] == wanted
        useful = walk[walk[:, 4] < walk[:, 5]]
        assert (useful[:, 0] == useful[:, 2]).all() and (useful[:, 1] == useful[:, 3]).all()
        order, tiles = walk[:, 0 if plan is _by_tile else 1], -(-M // tile)
        assert (np.diff(order) >= 0).all() and set(order) == set(range(tiles if plan is _by_tile else G))
        assert (np.diff(walk[:, 2]) >= 0).all() and (walk[:, 2] < tiles).all() and (walk[:, 3] < G).all()


_by_tile, _by_group = (jax.jit(plan, static_argnums=(2, 3)) for plan in (visits.by_tile, visits.by_group))


def test_garbage_in_rows_of_nobody_reaches_no_sum():
    """Rows after the last group may hold anything, NaN too: neither output nor gradients take any of it."""
    lhs, rhs = operands("grouped_matmul", 40, 2)
    lhs = lhs.at[20:].set(jnp.nan)
    sizes, zero = jnp.array([8, 12]), jnp.int32(0)
    out, back = jax.vjp(lambda lhs, rhs: interpreted("grouped_matmul")(lhs, rhs, sizes, zero), lhs, rhs)
    dlhs, drhs = back(jnp.ones_like(out).at[20:].set(jnp.nan))
    for array in (out, dlhs, drhs):
        assert np.isfinite(np.asarray(array)).all()


@pytest.mark.parametrize("name", ["groups end inside tiles", "a shard in the middle"])
def test_nothing_is_read_before_it_is_written_and_no_copy_races(name):
    """In the interpreter that simulates a TPU's memories, where what nobody wrote is NaN."""
    M, sizes, offset, G = CASES[name]
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(interpreted("grouped_matmul", interpret=strict), "grouped_matmul", M, sizes, offset, G)


def test_a_tile_with_the_whole_contraction_at_once():
    whole = tiling.Tiling(rows=32, columns=256, piece=D)
    check(interpreted("grouped_swiglu", whole), "grouped_swiglu", 40, [10, 0, 25, 0], 0, 4)


def test_what_cannot_be_done_is_refused():
    lhs, rhs = operands("grouped_matmul", 16, 2)
    sizes = jnp.array([8, 8])
    with pytest.raises(ValueError, match="matrices of 2 groups, sizes of only 1"):
        grouped_matmul(lhs, rhs, sizes[:1])
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        grouped_matmul(lhs[:, :100], rhs[:, :100], sizes, implementation="tpu")
    with pytest.raises(NotImplementedError, match="not bfloat16 x float32"):
        grouped_matmul(lhs.astype(jnp.bfloat16), rhs, sizes, implementation="tpu")
    with pytest.raises(NotImplementedError, match="D and F must be multiples of 128, not 256 and 64"):
        grouped_swiglu(lhs, jnp.stack([rhs[..., :64]] * 2, axis=1), sizes, implementation="tpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_the_default_tiling_fit_into_vmem(shape):
    size = SHAPES[shape]
    for halves in (1, 2):
        tile = tiling.choose(size.M, size.D, size.F, 2, matrices=halves)
        blocks = tile.rows * size.D + halves * size.D * tile.columns + tile.rows * tile.columns
        assert 4 * blocks + 4 * halves * tile.rows * tile.columns <= tiling.VMEM_BYTES


needs_libtpu = pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")


def compiles(chip, *options):
    requests = [aot.Request("pallas_kernels.grouped_matmul.shapes:case", option) for option in options]
    for outcome in aot.compile_for(chip, requests):
        assert outcome.error is None, (outcome.request, outcome.error)


@needs_libtpu
def test_forward_and_fused_compile_for_a_tpu():
    compiles("v6e", {"shape": "scout"}, {"shape": "scout", "op": "grouped_swiglu"})


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize(
    ("shape", "op"), [("scout", "grouped_matmul"), ("scout_down", "grouped_matmul"), ("scout", "grouped_swiglu")]
)
def test_forward_and_gradients_compile_for_every_tpu(chip, shape, op):
    compiles(chip, {"shape": shape, "op": op}, {"shape": shape, "op": op, "gradients": True})


def flops_of_kernels(function, *args) -> int:
    """As their cost estimates say."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                total += equation.params["cost_estimate"].flops
                continue
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(jax.jit(function))(*args).jaxpr)


@pytest.mark.parametrize("remat", [False, True])
def test_a_layer_of_experts_takes_eleven_products_rematerialised_or_not(remat):
    """Three forward, six gradients, and gate and up once more."""
    M, D, F, G = 64, 128, 256, 2
    groups = jnp.array([30, 34], jnp.int32), jnp.int32(0)
    ffn = lambda x, gate_up, down: tpu.grouped_ffn(x, gate_up, down, *groups)  # noqa: E731
    ffn = jax.checkpoint(ffn) if remat else ffn
    shapes = (M, D), (G, 2, D, F), (G, F, D), (M, D)
    flops = flops_of_kernels(lambda *args: jax.vjp(ffn, *args[:3])[1](args[3]), *map(jnp.zeros, shapes))
    assert flops == 11 * 2 * M * D * F

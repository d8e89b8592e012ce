"""Products with matrices in eight and four bits, against float64 products with what their values and scales say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import aot
from pallas_kernels.grouped_matmul import grouped_matmul, quantize, reference, tpu, xla
from pallas_kernels.grouped_matmul.tiling import Tiling

D, F, G = 512, 256, 3
SIZES = [10, 0, 25]  # of 40 rows
OPERATIONS = ["grouped_matmul", "grouped_swiglu"]


def operands(op, dtype, block, seed=0):
    rng = np.random.default_rng(seed)
    matrices = rng.standard_normal((G, *[2] * (op == "grouped_swiglu"), D, F)) * D**-0.5
    lhs, dout = rng.standard_normal((40, D)), rng.standard_normal((40, F))
    return *(jnp.asarray(a, jnp.float32) for a in (lhs, dout)), quantize(jnp.asarray(matrices, jnp.float32), dtype, block)


def exact(op, lhs, weights, dout):
    """Output and rows' gradient in float64, by numpy."""
    lhs, dout = np.asarray(lhs, np.float64), np.asarray(dout, np.float64)
    w = np.asarray(weights.values, np.float64) * np.repeat(np.asarray(weights.scales, np.float64), weights.block, axis=-2)
    out, dlhs, start = np.zeros_like(dout), np.zeros_like(lhs), 0
    for g, size in enumerate(SIZES):
        rows = slice(start, start + size)
        start += size
        if op == "grouped_matmul":
            out[rows], dlhs[rows] = lhs[rows] @ w[g], dout[rows] @ w[g].T
            continue
        gate, up = lhs[rows] @ w[g, 0], lhs[rows] @ w[g, 1]
        s = 1 / (1 + np.exp(-gate))
        out[rows] = gate * s * up
        dgate = dout[rows] * up * s * (1 + gate * (1 - s))
        dlhs[rows] = dgate @ w[g, 0].T + (dout[rows] * gate * s) @ w[g, 1].T
    return out, dlhs


FUNCTIONS = {
    "reference": lambda op: getattr(reference, op),
    "xla": lambda op: getattr(xla, op),
    "tpu": lambda op: functools.partial(getattr(tpu, op), tiling=Tiling(16, 128, 256), interpret=True),
}


@pytest.mark.parametrize(("dtype", "block"), [("int8", 128), ("int4", 32)])
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_output_and_rows_gradient_are_those_of_float64(name, op, dtype, block):
    lhs, dout, weights = operands(op, dtype, block)

    @jax.jit
    def both(lhs, weights, dout):
        out, back = jax.vjp(lambda x: FUNCTIONS[name](op)(x, weights, jnp.array(SIZES), jnp.int32(0)), lhs)
        return out, back(dout)[0]

    for got, want in zip(both(lhs, weights, dout), exact(op, lhs, weights, dout), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from(["int8", "int4"]),
    block=st.sampled_from([1, 32, 64]),
    power=st.integers(-30, 30),
)
def test_quantising_changes_an_element_by_half_a_scale_at_most(seed, dtype, block, power):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((2, 64, 3)) * 2.0**power).astype(np.float32)
    w[0, : block // 2 + 1] = 0
    found = quantize(jnp.asarray(w), dtype, block)
    back = np.asarray(found.values, np.float64) * np.repeat(np.asarray(found.scales, np.float64), block, axis=1)
    peak = np.repeat(np.abs(w.reshape(2, 64 // block, block, 3)).max(axis=2), block, axis=1)
    assert (np.abs(back - w) <= peak * (1 / (254 if dtype == "int8" else 14) + 1e-6)).all()
    assert np.abs(np.asarray(found.values, np.int32)).max() <= (127 if dtype == "int8" else 7)


def test_quantised_matrices_get_no_gradient():
    """Asked for the scales', the only part that could have one, jax gets zeros from every implementation."""
    lhs, _, weights = operands("grouped_matmul", "int8", 32)
    for name, function in FUNCTIONS.items():

        def total(scales, function=function):
            frozen = type(weights)(weights.values, scales)
            return function("grouped_matmul")(lhs, frozen, jnp.array(SIZES), jnp.int32(0)).sum()

        assert not jax.jit(jax.grad(total))(weights.scales).any(), name


def test_what_cannot_be_done_is_refused():
    lhs, _, weights = operands("grouped_matmul", "int8", 16)
    with pytest.raises(NotImplementedError, match="blocks must be a multiple of 32, not 16"):
        grouped_matmul(lhs, weights, jnp.array(SIZES), implementation="tpu")
    with pytest.raises(NotImplementedError, match="no quantised matrices"):
        grouped_matmul(lhs, weights, jnp.array(SIZES), implementation="gpu")
    with pytest.raises(ValueError, match="blocks of 48 do not divide a contraction of 512"):
        quantize(jnp.zeros((512, 8)), "int8", 48)
    with pytest.raises(ValueError, match="must be int8 or int4, not int2"):
        quantize(jnp.zeros((512, 8)), "int2", 32)


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize(("weights", "block"), [("int8", 128), ("int4", 32)])
def test_it_compiles_for_every_tpu(chip, weights, block):
    options = [{"shape": "scout", "op": op, "weights": weights, "block": block} for op in OPERATIONS]
    requests = [
        aot.Request("pallas_kernels.grouped_matmul.shapes:case", option | {"gradients": g})
        for option in options
        for g in (False, True)
    ]
    for outcome in aot.compile_for(chip, requests):
        assert outcome.error is None, (outcome.request, outcome.error)

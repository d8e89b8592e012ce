"""Products of bfloat16 rows with a float32 weight are those of float64, rounded once or nearly so."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from llama4_jax.model.float32_product import float32_product, pieces

NORMAL = st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-100)


@settings(deadline=None, max_examples=50)
@given(arrays.arrays(np.float32, 8, elements=NORMAL))
def test_three_pieces_are_the_number(x):
    first, second, third = (np.asarray(part, np.float64) for part in jax.jit(pieces)(x))  # compiled: nothing is simplified away
    assert (first + second + third == x).all()


def case(dtype, M=64, D=96, N=5):
    numbers = np.random.default_rng(0)
    x = jnp.asarray(numbers.normal(size=(2, M // 2, D)), dtype)
    weight = jnp.asarray(numbers.normal(size=(D, N)) * D**-0.5, jnp.float32)
    dy = jnp.asarray(numbers.normal(size=(2, M // 2, N)), jnp.float32)
    return x, weight, dy, *(np.asarray(a, np.float64) for a in (x, weight, dy))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_product_in_float32_and_so_are_its_gradients(dtype, compiled):
    x, weight, dy, x64, weight64, dy64 = case(dtype)

    def both(x, weight, dy):
        y, pull_back = jax.vjp(float32_product, x, weight)
        return y, *pull_back(dy)

    y, dx, dweight = (jax.jit(both) if compiled else both)(x, weight, dy)
    assert (y.dtype, dx.dtype, dweight.dtype) == (jnp.float32, dtype, jnp.float32)
    np.testing.assert_allclose(y, x64 @ weight64, atol=1e-6)
    np.testing.assert_allclose(dweight, np.einsum("bmd,bmn->dn", x64, dy64), atol=1e-5)
    exact = dy64 @ weight64.T
    rounding = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(np.asarray(dx, np.float64), exact, rtol=rounding, atol=2e-4 * rounding**0.5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_weight_in_bfloat16_is_taken_as_it_is(dtype):
    """Of a model whose parameters are loaded in it."""
    x, weight, *_ = case(dtype)
    weight = weight.astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(float32_product(x, weight), exact, rtol=1e-6, atol=1e-6)


def test_a_matrix_unit_meets_bfloat16_alone():
    x, weight, dy, *_ = case(jnp.bfloat16)

    def both(x, weight, dy):
        y, pull_back = jax.vjp(float32_product, x, weight)
        return y, pull_back(dy)

    products = re.findall(r"stablehlo.dot_general .*: \((.*)\) ->", jax.jit(both).lower(x, weight, dy).as_text())
    assert len(products) == 3
    assert all(operand.endswith("xbf16>") for product in products for operand in product.split(", "))

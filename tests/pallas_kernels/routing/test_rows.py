"""Rows to their experts and back, with gradients, by every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.routing import reference, rows, rows_tpu

D = 256


def operands(M, X, E, share, seed, dtype=jnp.float32):
    """x, scores and places, where only a `share` of the tokens has any."""
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((M, E)), axis=1)[:, :X].astype(np.int32)
    place, _ = reference.places(jnp.asarray(experts), E, jnp.asarray(rng.random(M) < share))
    return jnp.asarray(rng.standard_normal((M, D)), dtype), jnp.asarray(rng.random((M, X)), jnp.float32), place


@functools.partial(jax.jit, static_argnums=0)
def there_and_back(functions, x, scores, place, dout):
    """Rows, their sums and every gradient; between the two something that is not linear."""
    permute, unpermute = functions
    y, back = jax.vjp(lambda x, s: unpermute(jnp.sin(permute(x, s, place)), place), x, scores)
    return permute(x, scores, place), y, *back(dout)


def check(functions, *arguments, tolerance=1e-5):
    dout = jnp.cos(jnp.arange(arguments[0].size)).reshape(arguments[0].shape).astype(arguments[0].dtype)
    got = there_and_back(functions, *arguments, dout)
    want = there_and_back((reference.permute, reference.unpermute), *arguments, dout)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=tolerance, rtol=tolerance)


XLA = rows.permute, rows.unpermute
TPU = tuple(functools.partial(f, interpret=True) for f in (rows_tpu.permute, rows_tpu.unpermute))
both = pytest.mark.parametrize("functions", [XLA, TPU], ids=["xla", "tpu"])


@both
@pytest.mark.parametrize(("M", "X", "share"), [(1, 1, 1.0), (40, 1, 0.5), (33, 3, 1.0), (17, 8, 0.3), (9, 2, 0.0)])
def test_rows_travel_as_the_reference_has_it(functions, M, X, share):
    check(functions, *operands(M, X, 8, share, seed=0))


@both
@pytest.mark.parametrize("X", [1, 2])
def test_bfloat16_rows(functions, X):
    check(functions, *operands(300, X, 8, 0.7, seed=1, dtype=jnp.bfloat16), tolerance=2e-2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0, 1))
def test_any_places(seed, share):
    check(XLA, *operands(24, 2, 5, share, seed))


def test_no_direction_and_no_gradient_scatters_rows():
    """The only scatter is that of row numbers, four bytes each."""
    x, scores, place = operands(40, 2, 8, 0.7, seed=2)
    text = str(jax.make_jaxpr(functools.partial(there_and_back, XLA))(x, scores, place, x))
    assert "scatter" in text and not any(f"f32[{n},{D}]" in line for n in (40, 80) for line in text.splitlines() if "scatter" in line)  # fmt: skip

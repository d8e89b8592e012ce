"""Routing in one kernel against the specification: choices, places and statistics, and the gradient of all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import aot
from pallas_kernels.routing import reference, route, tpu
from pallas_kernels.routing.shapes import SHAPES

TILE = 128
INTEGERS = ("experts", "place", "group_sizes")


@functools.partial(jax.jit, static_argnums=(0, 1))
def with_gradient(function, X, logits, bias, valid, cotangents):
    """The route, and the gradient of its inner product with `cotangents`."""
    out, back = jax.vjp(lambda logits: floats(function(logits, X, bias, valid)), logits)
    return function(logits, X, bias, valid), back(cotangents)[0], out


def floats(found):
    return {name: getattr(found, name) for name in ("scores", "probabilities", "entropy", "z_loss")}


interpreted = functools.partial(tpu.route, tile=TILE, interpret=True)


def check(logits, X, bias=None, valid=None, function=interpreted):
    logits = jnp.asarray(logits, jnp.float32)
    M, E = logits.shape
    draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)  # noqa: E731
    cotangents = {"scores": draw(1, M, X), "probabilities": draw(2, E), "entropy": draw(3), "z_loss": draw(4)}
    got, got_gradient, _ = with_gradient(function, X, logits, bias, valid, cotangents)
    want, want_gradient, _ = with_gradient(reference.route, X, logits, bias, valid, cotangents)
    for field in dataclasses.fields(got):
        pair = (np.asarray(getattr(found, field.name)) for found in (got, want))
        if field.name in INTEGERS:
            np.testing.assert_array_equal(*pair, err_msg=field.name)
        else:
            np.testing.assert_allclose(*pair, rtol=1e-5, atol=1e-6, err_msg=field.name)
    np.testing.assert_allclose(got_gradient, want_gradient, rtol=1e-5, atol=1e-6)
    return got


def normal(M, E, seed=0):
    return np.random.default_rng(seed).standard_normal((M, E)).astype(np.float32)


@pytest.mark.parametrize(("M", "E", "X"), [(300, 16, 1), (128, 128, 8), (1, 16, 2), (129, 20, 3), (256, 8, 8)])
def test_the_kernel_interpreted_is_the_reference(M, E, X):
    """Tiles that are full, over-full and nearly empty; experts that fill no register; every expert chosen."""
    check(normal(M, E), X)


def test_of_equal_logits_the_lower_index_is_chosen():
    assert np.array_equal(check(np.zeros((140, 16)), 4).experts, [[0, 1, 2, 3]] * 140)


def test_all_tokens_on_one_expert_keep_their_order_over_tiles():
    logits = normal(300, 16)
    logits[:, 5] = 9
    assert np.array_equal(check(logits, 1).place[:, 0], np.arange(300))


def test_infinite_logits_choose_no_expert_twice():
    """Minus infinity is a logit like others (what it leaves is chosen by index); a NaN is the highest. Each choice has a place."""
    logits = jnp.asarray(normal(40, 8)).at[:20, 1:].set(-jnp.inf).at[20:, 2:].set(jnp.nan)
    found = jax.jit(interpreted, static_argnums=1)(logits, 4, None, None)
    experts = np.asarray(found.experts)
    np.testing.assert_array_equal(experts[:20], np.tile([0, 1, 2, 3], (20, 1)))
    np.testing.assert_array_equal(experts[20:], np.tile([2, 3, 4, 5], (20, 1)))
    np.testing.assert_array_equal(np.sort(np.asarray(found.place).reshape(-1)), np.arange(160))


def test_the_bias_chooses_and_no_score_knows_of_it():
    logits, bias = normal(140, 16), jnp.zeros(16).at[3].set(50.0)
    found = check(logits, 2, bias)
    assert (found.experts[:, 0] == 3).all()
    np.testing.assert_allclose(found.scores[:, 0], jax.nn.sigmoid(logits[:, 3]), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.02, 0.5, 1.0]), ties=st.booleans(), X=st.sampled_from([1, 3]))
def test_any_logits_and_any_padding(seed, share, ties, X):
    logits = normal(200, 16, seed)
    valid = np.random.default_rng(seed).random(200) < share
    found = check(np.round(logits) if ties else logits, X, jnp.asarray(normal(16, 1, seed)[:, 0]), jnp.asarray(valid))
    assert (np.asarray(found.place)[~valid] == 200 * X).all() and found.group_sizes.sum() == valid.sum() * X


def test_nothing_is_read_before_it_is_written():
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    check(normal(140, 16), 2, None, jnp.arange(140) % 3 > 0, functools.partial(tpu.route, tile=TILE, interpret=strict))


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="9 choices of 8 experts"):
        route(jnp.zeros((4, 8)), 9)
    with pytest.raises(NotImplementedError, match="do not fit into VMEM"):
        jax.eval_shape(lambda logits: route(logits, 1, implementation="tpu"), jax.ShapeDtypeStruct((2**20, 8), jnp.float32))


def test_no_tokens_at_all():
    found = interpreted(jnp.zeros((0, 8)), 2, None, None)
    assert found.place.shape == (0, 2) and not found.group_sizes.any()


@pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")
@pytest.mark.parametrize("chip", ["v6e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5e", "v5p", "tpu7x"))])
def test_it_compiles_for_a_tpu(chip):
    requests = [aot.Request("pallas_kernels.routing.shapes:case", {"shape": shape}) for shape in SHAPES]
    for outcome in aot.compile_for(chip, requests):
        assert outcome.error is None, (outcome.request, outcome.error)

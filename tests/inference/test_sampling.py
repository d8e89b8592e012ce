"""Draws follow the filtered distribution, and the filters are those of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.errors import UserError
from llama4_jax.inference.sampling import Sampling


def brute_force(logits, temperature, top_k, top_p, min_p):
    """Which tokens stay, token by token in float64. The logits have no ties."""
    logits = np.asarray(logits, np.float64) / temperature
    order = np.argsort(-logits)
    if top_k is not None:
        order = order[:top_k]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    nucleus, reached = [], 0.0
    for token, probability in zip(order, p, strict=True):
        if reached >= top_p:
            break
        nucleus.append(token)
        reached += probability
    return {int(t) for t in nucleus if np.exp(logits[t] - logits.max()) >= min_p}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 1.0]),
)
def test_the_tokens_that_may_be_drawn_are_those_of_brute_force(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 2, 12).astype(np.float32)
    filtered = np.asarray(Sampling(temperature, top_k, top_p, min_p).filtered(jnp.asarray(logits)[None])[0])
    kept = set(np.flatnonzero(np.isfinite(filtered)).tolist())
    assert kept == brute_force(logits, temperature, top_k, top_p, min_p)
    np.testing.assert_allclose(filtered[list(kept)], logits[list(kept)] / temperature, rtol=1e-6)


def test_draws_have_the_frequencies_of_the_filtered_distribution():
    """20,000 draws lie within five standard errors of softmax over the three tokens that stay."""
    logits = jnp.array([2.0, 0.0, -1.0, 4.0])
    draws = Sampling(2.0, top_k=3).draw(jnp.tile(logits, (20_000, 1)), jax.random.split(jax.random.key(0), 20_000))
    p = np.asarray(jax.nn.softmax(jnp.where(jnp.arange(4) == 2, -jnp.inf, logits / 2)))
    got = np.bincount(np.asarray(draws), minlength=4) / 20_000
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / 20_000)).all()


def test_of_equally_likely_tokens_all_stay_and_greedy_takes_the_first():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0]])
    assert np.isfinite(Sampling(1.0, top_k=1).filtered(logits)).tolist() == [[False, True, True, False]]
    assert np.isfinite(Sampling(1.0, top_p=0.01).filtered(logits)).tolist() == [[False, True, True, False]]
    assert Sampling().draw(logits, jax.random.split(jax.random.key(0), 1)).tolist() == [1]


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("temperature", -1.0, "0 or more"),
        ("temperature", float("nan"), "0 or more"),
        ("top_k", 0, "1 or more"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("min_p", 1.5, r"in \[0, 1\]"),
    ],
)
def test_a_setting_out_of_range_is_named(field, value, rule):
    with pytest.raises(UserError, match=rf"Sampling.{field} must .*{rule}, got {value}"):
        Sampling(**{field: value})

"""The formulas of the parts, each against a direct evaluation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.config import AttentionTemperature, RopeScaling
from llama4_jax.model.cache import EMPTY, Slots
from llama4_jax.model.context import document_positions, temperature_factor
from llama4_jax.model.moe import router_stats
from llama4_jax.model.norms import rms_normalize
from llama4_jax.model.rotary import inverse_frequencies, rotate, rotation
from pallas_kernels.routing import route


def scaled_by_definition(theta, head_dim, scaling):
    out = []
    for j in range(head_dim // 2):
        f = theta ** (-2 * j / head_dim)
        wavelength, original = 2 * math.pi / f, scaling.original_max_position_embeddings
        if wavelength < original / scaling.high_freq_factor:
            out.append(f)
        elif wavelength > original / scaling.low_freq_factor:
            out.append(f / scaling.factor)
        else:
            t = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            out.append((1 - t) * f / scaling.factor + t * f)
    return np.array(out)


@pytest.mark.parametrize(("scaling", "changed"), [(RopeScaling(), 29), (RopeScaling(8, 1, 4), 35)])
def test_rope_scaling_by_definition(scaling, changed):
    """29 of Scout's 64 pairs are divided by 16; the first published 8/1/4 touched 35."""
    got = inverse_frequencies(128, 5e5, scaling)
    np.testing.assert_allclose(got, scaled_by_definition(5e5, 128, scaling), rtol=1e-6)
    assert int((got != inverse_frequencies(128, 5e5, None)).sum()) == changed


def test_equal_frequency_factors_make_no_nan():
    """Scout's 1/1 makes the interpolation 0/0 (Q10)."""
    with jax.debug_nans(True):
        assert np.isfinite(inverse_frequencies(128, 5e5, RopeScaling())).all()


def test_rotation_turns_interleaved_pairs():
    """As multiplication of complex numbers x[2j] + i x[2j+1] by exp(i p f_j) (Q1)."""
    rng = np.random.default_rng(0)
    x, inv_freq = rng.standard_normal((2, 5, 3, 8)).astype(np.float32), inverse_frequencies(8, 1e4, None)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]], np.int32)
    want = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[..., None, None] * inv_freq.astype(np.float64))
    got = np.asarray(rotate(jnp.asarray(x), rotation(jnp.asarray(positions), inv_freq, None)))
    np.testing.assert_allclose(got[..., ::2] + 1j * got[..., 1::2], want, atol=1e-5)


def test_temperature_steps_at_multiples_of_the_floor():
    """Exactly 1 below position 8191, and right in float32 where bfloat16 positions would not be (Q4)."""
    tuning = AttentionTemperature(floor=8192, scale=0.1)
    positions = np.array([[0, 8190, 8191, 16382, 16383, 1_000_000]], np.int32)
    want = 1 + 0.1 * np.log(1 + np.floor((positions.astype(np.float64) + 1) / 8192))
    got = temperature_factor(jnp.asarray(positions), tuning)[..., 0, 0]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[0, 1] == 1 and got[0, 2] > 1


def test_rms_normalize_is_float32_inside():
    x = jnp.asarray([[3e-4, 4e-4], [300.0, 400.0]], jnp.bfloat16)
    got = rms_normalize(x, 1e-5)
    assert got.dtype == jnp.bfloat16
    want = np.asarray(x, np.float64)
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=8e-3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_document_positions_restart(lengths):
    lengths = [*lengths, 60 - sum(lengths)]  # one shape, compiled once
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None]
    np.testing.assert_array_equal(document_positions(jnp.asarray(segments))[0], np.concatenate([np.arange(n) for n in lengths]))


def test_ring_slots_keep_the_last_tokens_and_drop_padding():
    """Five tokens at positions 3..7, the first two padding, into a ring of two slots."""
    slots = Slots(jnp.full((1, 2), EMPTY, jnp.int32))
    positions, valid = jnp.array([[3, 4, 5, 6, 7]]), jnp.array([[False, False, True, True, True]])
    places = slots.places(positions, valid)
    np.testing.assert_array_equal(places, [[2, 2, 2, 0, 1]])
    np.testing.assert_array_equal(slots.write(positions, places).positions, [[6, 7]])


def stats_of(logits, X=1, valid=None):
    return router_stats(route(jnp.asarray(logits, jnp.float32), X, valid=valid))


def test_router_losses_by_definition():
    logits = np.random.default_rng(0).standard_normal((50, 4)) * 2
    valid = np.arange(50) < 40
    stats = stats_of(logits, 2, jnp.asarray(valid))
    kept = logits[valid]
    p = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    load = np.bincount(np.argsort(-kept, axis=-1)[:, :2].ravel(), minlength=4) / 80
    np.testing.assert_allclose(stats.load, load, atol=1e-6)
    np.testing.assert_allclose(stats.entropy, -(p * np.log(p)).sum(-1).mean(), atol=1e-5)
    np.testing.assert_allclose(stats.load_balance_loss, 4 * (load * p.mean(0)).sum(), atol=1e-5)
    np.testing.assert_allclose(stats.z_loss, (np.log(np.exp(kept).sum(-1)) ** 2).mean(), rtol=1e-5)


def test_the_load_balance_loss_pushes_down_the_busy_expert():
    """Its gradient lowers the logits of an expert that takes everything, and moves nothing when all are equal."""
    loss = lambda logits: stats_of(logits).load_balance_loss  # noqa: E731
    gradient = jax.grad(loss)(jnp.tile(jnp.array([2.0, 0, 0, 0]), (8, 1)))
    assert (gradient[:, 0] > 0).all() and (gradient[:, 1:] < 0).all()
    even = jnp.tile(10 * jnp.eye(4), (2, 1))
    np.testing.assert_allclose(jax.grad(loss)(even), 0, atol=1e-6)


def test_ties_go_to_the_lowest_expert():
    from tiny import tiny_model, tokens

    for X in (1, 2):
        model, params = tiny_model(experts_per_token=X, moe_interval=1, num_layers=1, nope_interval=0)
        params["layers"]["layer_0"]["feed_forward"]["router"]["kernel"] *= 0
        _, state = model.apply({"params": params}, tokens(1, 4), capture_intermediates=True)
        routing = state["intermediates"]["layers"]["layer_0"]["feed_forward"]["router"]["__call__"][0]
        np.testing.assert_array_equal(routing.experts[0], np.tile(np.arange(X), (4, 1)))

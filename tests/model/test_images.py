"""Early fusion: which tile lands where, that padding counts for nothing, and that what cannot be is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_model

from llama4_jax.config import VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.cache import Cache

PATCH = 60
VISION = VisionConfig(
    hidden_size=16, num_layers=2, num_heads=2, mlp_size=64, image_size=12, patch_size=3, adapter_size=10, patch_token_id=PATCH
)  # 4 patch tokens a tile


@pytest.fixture(scope="module")
def setting():
    """A model, its parameters, its jitted forward pass, and two rows with two tiles and one."""
    model, params = tiny_model(vision=VISION)
    random = np.random.default_rng(0)
    params["vision"] = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32), params["vision"])
    run = jax.jit(lambda params, tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs))
    tokens = random.integers(0, 50, (2, 20))
    tokens[0, 3:7] = tokens[0, 9:13] = tokens[1, [0, 1, 2, 19]] = PATCH
    images = random.normal(0, 1, (2, 2, 12, 12, 3)).astype(np.float32)
    return model, params, run, jnp.asarray(tokens, jnp.int32), jnp.asarray(images)


def test_a_rows_patch_tokens_take_its_tiles_in_turn(setting):
    """Swapping two tiles is swapping their places; what stands before a tile does not see it."""
    _, params, run, tokens, images = setting
    want = run(params, tokens, images=images).logits
    got = run(params, tokens, images=images.at[0].set(images[0, ::-1])).logits
    np.testing.assert_array_equal(got[0, :3], want[0, :3])
    assert np.abs(got[0, 3:7] - want[0, 3:7]).max() > 1e-3
    np.testing.assert_array_equal(got[1], want[1])
    other = run(params, tokens, images=images.at[0, 1].add(1)).logits
    np.testing.assert_array_equal(other[0, :9], want[0, :9])
    assert np.abs(other[0, 9] - want[0, 9]).max() > 1e-3


def test_empty_slots_and_the_ids_of_rows_without_pictures_change_nothing(setting):
    _, params, run, tokens, images = setting
    want = run(params, tokens, images=images).logits
    np.testing.assert_array_equal(run(params, tokens, images=images.at[1, 1].set(7.0)).logits[1], want[1])
    padded = jnp.concatenate([images, jnp.ones((2, 1, 12, 12, 3))], axis=1)
    np.testing.assert_allclose(run(params, tokens, images=padded).logits, want, atol=1e-5)
    text = jnp.where(tokens == PATCH, 5, tokens)
    np.testing.assert_array_equal(run(params, text, images=images).logits, run(params, text).logits)


def test_a_place_without_a_tile_is_never_silent(setting):
    """Nine places for the patches of two tiles."""
    _, params, run, tokens, images = setting
    logits = run(params, tokens.at[0, 15].set(PATCH), images=images).logits
    assert np.all(np.isnan(logits[0, 15:]))


def test_decoding_after_pictures_equals_one_pass(setting):
    model, params, run, tokens, images = setting
    want = run(params, tokens, images=images).logits
    output = run(params, tokens[:, :14], images=images, cache=Cache.create(model.config, 2, 20))
    for i in range(14, 19):
        output = run(params, tokens[:, i : i + 1], cache=output.cache)
        np.testing.assert_allclose(output.logits[0, 0], want[0, i], atol=5e-5)


def test_gradients_reach_every_parameter_of_the_tower(setting):
    _, params, run, tokens, images = setting
    targets = jnp.roll(tokens, -1, axis=1)
    loss = lambda params: -jnp.mean(run(params, tokens, images=images, targets=targets).log_probs)  # noqa: E731
    for path, grad in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)["vision"]):
        assert np.all(np.isfinite(grad)) and np.any(grad != 0), jax.tree_util.keystr(path)


def test_bytes_and_floats_give_the_same(setting):
    _, params, run, tokens, _ = setting
    pixels = np.random.default_rng(3).integers(0, 256, (2, 2, 12, 12, 3), dtype=np.uint8)
    floats = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    want = run(params, tokens, images=floats).logits
    np.testing.assert_allclose(run(params, tokens, images=pixels).logits, want, atol=1e-5)


def test_pictures_for_a_model_that_cannot_see_are_refused(setting):
    _, _, _, tokens, images = setting
    model, params = tiny_model()
    with pytest.raises(UserError, match="no vision tower"):
        model.apply({"params": params}, tokens, images=images)
    assert "vision" not in params and dataclasses.replace(TINY, vision=VISION) != TINY

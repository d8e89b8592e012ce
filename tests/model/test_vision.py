"""Properties of the vision tower's parts; the whole is compared with transformers in tests/parity."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import VisionConfig
from llama4_jax.model.vision import VisionTower, normalized, patch_places, patch_rotation, patches, pixel_shuffle

CONFIG = VisionConfig(hidden_size=16, num_layers=2, num_heads=2, mlp_size=64, image_size=12, patch_size=3, adapter_size=10)
TOWER = VisionTower(CONFIG, text_size=6)


@pytest.fixture(scope="module")
def params():
    random = np.random.default_rng(0)
    abstract = nn.unbox(jax.eval_shape(TOWER.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))["params"])
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.3, leaf.shape), jnp.float32), abstract)


@jax.jit
def features(params, tiles):
    return TOWER.apply({"params": params}, tiles)


def test_patches_are_cut_row_by_row():
    tiles = np.random.default_rng(0).normal(size=(2, 6, 6, 3))
    cut = patches(jnp.asarray(tiles), 2)
    for place, (row, column) in enumerate(np.ndindex(3, 3)):
        np.testing.assert_array_equal(
            cut[:, place], tiles[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].astype(np.float32)
        )


def test_pixel_shuffle_joins_each_square_with_the_channel_fastest():
    grid = np.random.default_rng(0).normal(size=(1, 4, 4, 5)).astype(np.float32)
    joined = pixel_shuffle(jnp.asarray(grid.reshape(1, 16, 5)), 2)
    for place, (row, column) in enumerate(np.ndindex(2, 2)):
        square = grid[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]  # [2, 2, D]: row, column, channel
        np.testing.assert_array_equal(joined[0, place], square.reshape(-1))


def test_rotation_follows_the_column_then_the_row_from_1_and_leaves_the_class_token():
    turn = patch_rotation(CONFIG)
    angles = np.arctan2(turn.sin, turn.cos)[0, :, 0]  # [T, H/2]
    np.testing.assert_allclose(angles[4 * 1 + 2], [3, 0.03, 2, 0.02], atol=1e-6)  # row 1, column 2; frequencies 1 and 0.01
    np.testing.assert_array_equal(angles[-1], 0)


def test_tiles_do_not_see_each_other_and_each_gives_a_quarter_of_its_patches(params):
    tiles = jnp.asarray(np.random.default_rng(1).normal(size=(3, 12, 12, 3)), jnp.float32)
    together = features(params, tiles)
    assert together.shape == (3, 4, 6)
    for i in range(3):
        np.testing.assert_allclose(features(params, tiles[i : i + 1])[0], together[i], atol=1e-5)


def test_every_parameter_matters(params):
    tiles = jnp.asarray(np.random.default_rng(1).normal(size=(1, 12, 12, 3)), jnp.float32)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(features(params, tiles)))))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        # A key bias shifts a row of scores by a constant, unless RoPE turns it: here it does.
        assert np.all(np.isfinite(grad)) and np.any(grad != 0), name


def test_bytes_are_the_pixels_that_the_tower_was_trained_on():
    tiles = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(1, 16, 16, 3)  # each value three times
    np.testing.assert_allclose(normalized(jnp.asarray(tiles)), (tiles / 255 - 0.5) / 0.5, atol=1e-7)
    floats = jnp.linspace(-1, 1, 12).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(normalized(floats), floats)


def test_patch_tokens_are_counted_row_by_row():
    tokens = jnp.array([[9, 1, 9, 9, 2], [1, 2, 3, 4, 9]])
    np.testing.assert_array_equal(patch_places(tokens, 9), [[0, -1, 1, 2, -1], [-1, -1, -1, -1, 0]])

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llama4_jax.config import ExecutionConfig, ModelConfig, OptimizerConfig
from llama4_jax.model.llama4 import Llama4, abstract_params
from llama4_jax.training.optimizer import decays, learning_rate_schedule, make_optimizer, matrix_axes


def test_the_rate_climbs_from_the_first_update_and_ends_at_its_fraction():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1), 24)
    rates = [float(schedule(count)) for count in range(24)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[13] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


@pytest.mark.parametrize("shape", ["cosine", "linear", "one_minus_sqrt"])
def test_a_plateau_keeps_the_peak_until_the_decay(shape):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_fraction=0.25, decay_shape=shape, final_fraction=0.0)
    rates = [float(learning_rate_schedule(config, 24)(count)) for count in range(24)]
    assert rates[3:19] == pytest.approx([1.0] * 16)
    assert rates[-1] == pytest.approx(0.0, abs=1e-7)
    assert all(a > b for a, b in itertools.pairwise(rates[18:]))


@pytest.mark.parametrize("warmup", [0, 1, 5, 9])
def test_any_warm_up_gives_positive_rates_of_at_most_the_peak(warmup):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=warmup, final_fraction=0.5), 5)
    assert all(0 < float(schedule(count)) <= 2.0 for count in range(5))


def test_weights_decay_but_norms_biases_and_the_token_table_do_not():
    config = ModelConfig(num_layers=4, num_experts=2, moe_interval=2, attention_bias=True)
    mask = flatten_dict(decays(abstract_params(Llama4(config, ExecutionConfig()))), sep="/")
    assert {path.rsplit("/", 1)[1]: decay for path, decay in mask.items()} == {
        "kernel": True, "scale": False, "bias": False, "embedding": False,
    }  # fmt: skip


def test_one_update_is_adamw_of_the_clipped_gradient():
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, final_fraction=1.0, b1=0.9, b2=0.99, weight_decay=0.5, clip_norm=1.0
    )
    optimizer = make_optimizer(config, 10)
    params = {"a": {"kernel": jnp.array([2.0, -1.0])}, "b": {"scale": jnp.array([3.0])}}
    gradients = {"a": {"kernel": jnp.array([3.0, 0.0])}, "b": {"scale": jnp.array([4.0])}}  # norm 5
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    clipped = np.array([0.6, 0.0, 0.8])
    adam = clipped / (np.abs(clipped) + 1e-8)  # bias-corrected moments of a first step
    expected = -0.1 * (adam + 0.5 * np.array([2.0, -1.0, 0.0]))  # no decay of the scale
    np.testing.assert_allclose(np.concatenate(jax.tree.leaves(updates)), expected, rtol=1e-5)


def test_a_gradient_within_the_norm_is_not_scaled():
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0), 10)
    params = {"kernel": jnp.ones(2)}
    _, state = optimizer.update({"kernel": jnp.array([0.3, 0.4])}, optimizer.init(params), params)
    np.testing.assert_allclose(state[1][0].mu["kernel"], 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


def test_muon_moves_every_matrix_of_a_stack_along_its_own_orthogonal_factor():
    config = ModelConfig(
        vocab_size=32, hidden_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, num_experts=3, expert_ffn_size=8,
        nope_interval=2,
    )  # fmt: skip
    shapes = abstract_params(Llama4(config, ExecutionConfig()))
    keys = iter(jax.random.split(jax.random.key(0), 99))
    gradients = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)
    settings = OptimizerConfig(
        rule="muon", learning_rate=1.0, warmup_steps=0, decay_fraction=0.01, weight_decay=0.0, clip_norm=1e9
    )
    optimizer = make_optimizer(settings, 1000)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(gradients), gradients)
    got, given = flatten_dict(updates, sep="/"), flatten_dict(gradients, sep="/")

    def expect_orthogonal(update, gradient):  # both [n, m]
        left, _, right = np.linalg.svd(np.asarray(gradient), full_matrices=False)
        directions = left.T @ -np.asarray(update) @ right.T / (0.2 * np.sqrt(max(gradient.shape)))
        diagonal = np.diag(directions)
        assert np.all((diagonal > 0.6) & (diagonal < 1.3))  # Newton-Schulz with Muon's coefficients comes this near to 1
        np.testing.assert_allclose(directions, np.diag(diagonal), atol=0.05)

    block = "layers/layer_0/"
    for expert in range(3):
        expect_orthogonal(*(t[f"{block}feed_forward/experts/down/kernel"][0, expert] for t in (got, given)))
        for half in range(2):
            expect_orthogonal(*(t[f"{block}feed_forward/experts/gate_up/kernel"][0, expert, half] for t in (got, given)))
    expect_orthogonal(*(t[f"{block}attention/query/kernel"][0].reshape(12, 8) for t in (got, given)))
    expect_orthogonal(*(t[f"{block}attention/output/kernel"][0].reshape(8, 12) for t in (got, given)))


def test_muon_leaves_table_head_router_and_norms_to_adamw():
    config = ModelConfig(num_layers=4, num_experts=2, moe_interval=2, attention_bias=True)
    axes = flatten_dict(matrix_axes(abstract_params(Llama4(config, ExecutionConfig()))), sep="/")
    left = {path.rsplit("layer_3/", 1)[-1] for path, found in axes.items() if found is None and "layer_0" not in path}
    assert {"embed/embedding", "lm_head/kernel", "final_norm/scale", "feed_forward/router/kernel"} <= left
    assert {path.rsplit("/", 1)[1] for path, found in axes.items() if found is not None} == {"kernel"}
    assert sum(found is not None for found in axes.values()) == 4 * 4 + 2 * 2 + 2 * 4

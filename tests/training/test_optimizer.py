import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llama4_jax.config import ExecutionConfig, ModelConfig, OptimizerConfig
from llama4_jax.model.llama4 import Llama4, abstract_params
from llama4_jax.training.optimizer import decays, learning_rate_schedule, make_optimizer


def test_the_rate_climbs_from_the_first_update_and_ends_at_its_fraction():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1), 24)
    rates = [float(schedule(count)) for count in range(24)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[13] == pytest.approx(0.55)  # half way down
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


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

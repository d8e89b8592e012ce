from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import ObjectiveConfig
from llama4_jax.data.batch import Batch
from llama4_jax.training.objective import cross_entropy_objective

LOG_PROBS = np.log([[0.5, 0.25, 0.125], [0.5, 0.5, 0.1]]).astype(np.float32)


class Model:
    """Answers with given log-probabilities."""

    def __init__(self, router_stats=None):
        self.router_stats = router_stats

    def apply(self, variables, tokens, *, targets, **inputs):
        self.variables, self.inputs = variables, inputs
        return SimpleNamespace(log_probs=jnp.asarray(LOG_PROBS), router_stats=self.router_stats)


def batch_with(weights):
    tokens = np.zeros((2, 3), np.int32)
    return Batch(tokens, tokens, np.array(weights, np.float32), positions=tokens, segment_ids=tokens + 1)


def test_cross_entropy_is_the_weighted_mean_over_the_whole_batch():
    objective = cross_entropy_objective(Model(), ObjectiveConfig())
    loss, metrics = objective({}, batch_with([[1, 0, 2], [0, 0, 0.5]]), None)
    assert loss == pytest.approx((np.log(2) + 2 * np.log(8) + 0.5 * np.log(10)) / 3.5)
    assert metrics["cross_entropy"] == metrics["loss"] == loss
    assert metrics["tokens"] == 3


def test_a_batch_without_targets_costs_nothing():
    loss, _ = cross_entropy_objective(Model(), ObjectiveConfig())({}, batch_with(np.zeros((2, 3))), None)
    assert loss == 0


def test_router_terms_are_means_over_layers_times_their_weights():
    stats = SimpleNamespace(
        load=jnp.array([[0.5, 0.5], [0.9, 0.1]]),
        drop_share=jnp.array([0.0, 0.2]),
        entropy=jnp.array([0.6, 0.4]),
        load_balance_loss=jnp.array([1.0, 3.0]),
        z_loss=jnp.array([4.0, 8.0]),
    )
    config = ObjectiveConfig(load_balance_weight=0.1, router_z_weight=0.01)
    loss, metrics = cross_entropy_objective(Model(stats), config)({}, batch_with(np.ones((2, 3))), None)
    assert loss == pytest.approx(float(metrics["cross_entropy"]) + 0.1 * 2 + 0.01 * 6)
    assert metrics["load_balance_loss"] == 2 and metrics["router_z_loss"] == 6
    assert metrics["expert_load"].shape == (2, 2) and metrics["router_entropy"].shape == (2,)
    np.testing.assert_array_equal(metrics["router_drop_share"], stats.drop_share)


def test_the_model_gets_its_state_the_capacity_and_a_key_for_jitter_alone():
    model, batch = Model(), batch_with(np.ones((2, 3)))
    config = ObjectiveConfig(capacity_factor=1.5, router_jitter=0.1)
    cross_entropy_objective(model, config)({"w": 1}, batch, "key", model_state={"router_bias": 2})
    assert model.variables == {"params": {"w": 1}, "router_bias": 2}
    given = {name: model.inputs[name] for name in ("capacity_factor", "router_jitter", "rngs")}
    assert given == {"capacity_factor": 1.5, "router_jitter": 0.1, "rngs": {"jitter": "key"}}
    cross_entropy_objective(model, ObjectiveConfig())({"w": 1}, batch, "key")
    assert model.variables == {"params": {"w": 1}} and model.inputs["rngs"] == {}

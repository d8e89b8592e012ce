"""What training minimises. Every objective is built on per-token log-probabilities."""

from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from llama4_jax.config import ObjectiveConfig
from llama4_jax.data.batch import Batch
from llama4_jax.evaluation.forward import apply_to_batch

PyTree = Any
Metrics = dict[str, Array]


class Objective(Protocol):
    """A loss over a batch."""

    def __call__(
        self, params: PyTree, batch: Batch, key: Array, model_state: PyTree = None, frozen: PyTree = None
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss to differentiate, what to log of it: a flat dict).

        Args:
            params: the model's parameters; gradients are taken of these.
            batch: one global batch.
            key: for whatever is random; a function of seed and step alone.
            model_state: what the model carries beside its parameters, see TrainState.
            frozen: parameters of a reference or teacher model, where the objective compares with one.
        """


def cross_entropy_objective(model, config: ObjectiveConfig) -> Objective:
    """Mean cross entropy (nats a token) over the weighted targets, plus the router's terms.

    Load balance (arXiv 2101.03961, equation 4) and router z-loss (arXiv 2202.08906, equation 5) are means over layers.
    Metrics of a model with experts hold each MoE layer's expert_load, router_drop_share and router_entropy.
    """
    routing = {"capacity_factor": config.capacity_factor, "router_jitter": config.router_jitter}

    def objective(params, batch, key, model_state=None, frozen=None):
        del frozen
        rngs = {"jitter": key} if config.router_jitter else {}
        output = apply_to_batch(model, params, batch, model_state, rngs=rngs, **routing)
        weights = batch.loss_weights
        total = jnp.sum(weights)
        loss = cross_entropy = -jnp.sum(weights * output.log_probs) / jnp.where(total > 0, total, 1.0)
        metrics = {"cross_entropy": cross_entropy, "tokens": jnp.sum(weights > 0)}
        if (router := output.router_stats) is not None:
            load_balance, router_z = jnp.mean(router.load_balance_loss), jnp.mean(router.z_loss)
            loss = cross_entropy + config.load_balance_weight * load_balance + config.router_z_weight * router_z
            metrics |= {
                "load_balance_loss": load_balance,
                "router_z_loss": router_z,
                "expert_load": router.load,  # [Lm, E]
                "router_drop_share": router.drop_share,  # [Lm]
                "router_entropy": router.entropy,  # [Lm]
            }
        return loss, metrics | {"loss": loss}

    return objective

"""Loss-free balancing of experts (arXiv 2408.15664): a bias of each expert, moved against its load after every step.

The bias takes part in the choice of experts alone, so that no gradient works against the cross entropy, as that of an
auxiliary loss does. It lies in `TrainState.model_state["router_bias"]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.config import ModelConfig, ObjectiveConfig

PyTree = Any
Balance = Callable[[PyTree, Float[Array, "L E"], Int[Array, ""]], PyTree]


def bias_balancing(model: ModelConfig, config: ObjectiveConfig, total_steps: int) -> Balance | None:
    """What moves the bias: `balance(model_state, load, step) -> next model_state`; None for a model without one.

    `load` is the metric expert_load, of the MoE layers in order over the global batch, and `step` the number of updates
    before this one. Every bias moves by bias_update_rate towards an even load (algorithm 1), whatever the difference.
    During the last bias_anneal_fraction of the steps it does not move but shrinks linearly, to exactly zero after the last
    one: published Llama 4 has no place for it, and by then the parameters do without.
    """
    if not model.router_bias:
        return None
    moe_layers = [f"layer_{j}" for j, kind in enumerate(model.block_kinds) if kind.is_moe]
    anneal_steps = config.bias_anneal_fraction * total_steps

    def share_left(step):
        return jnp.clip((total_steps - step) / anneal_steps, 0.0, 1.0) if anneal_steps else jnp.ones(())

    def balance(model_state, load, step):
        load = load.reshape(-1, len(moe_layers), load.shape[-1])  # [blocks, MoE layers of a block, E]
        left, left_next = share_left(step), share_left(step + 1)
        rate = jnp.where(left_next < 1, 0.0, config.bias_update_rate)
        shrink = left_next / jnp.where(left > 0, left, 1.0)
        push = {"layers": {name: _in_router(towards_even(load[:, i])) for i, name in enumerate(moe_layers)}}
        move = lambda bias, push: shrink * bias + rate * push  # noqa: E731
        return model_state | {"router_bias": jax.tree.map(move, model_state["router_bias"], push)}

    return balance


def _in_router(bias: Float[Array, "L E"]) -> PyTree:
    """At its place in a layer's part of the collection."""
    return {"feed_forward": {"router": {"bias": bias}}}


def towards_even(load: Float[Array, "*L E"]) -> Float[Array, "*L E"]:
    """+1 for an expert with less than the mean load, -1 for one with more, 0 at the mean."""
    return jnp.sign(load.mean(axis=-1, keepdims=True) - load)

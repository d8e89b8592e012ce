"""AdamW (arXiv 1711.05101) under a warm-up and cosine decay, gradients clipped by their global norm."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama4_jax.config import OptimizerConfig

PyTree = Any

# Norm scales and biases have no scale to hold down. The embedding's rows get a gradient only where their token occurs,
# so decay would pull the rows of rare tokens to zero; OLMo 2 (arXiv 2501.00656) leaves its embeddings undecayed too.
UNDECAYED = re.compile(r"(^|/)(scale|bias|embedding)$")


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of the update after `count` earlier ones.

    Linear up to the peak at update `warmup_steps`, then half a cosine down to final_fraction of it at the last update.
    """

    def schedule(count):
        step = count + 1
        warm = jnp.minimum(step / max(config.warmup_steps, 1), 1.0)
        done = jnp.clip((step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1), 0.0, 1.0)
        cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return config.learning_rate * warm * cosine

    return schedule


def decays(params: PyTree) -> PyTree:
    """True for each parameter that weight decay reaches: the matrices of projections, router, experts and output."""

    def decays_at(path, _):
        return UNDECAYED.search(jax.tree_util.keystr(path, simple=True, separator="/")) is None

    return jax.tree_util.tree_map_with_path(decays_at, params)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The update rule for the parameters that train."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )

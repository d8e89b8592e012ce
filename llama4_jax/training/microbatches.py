"""Gradients of a large batch from its parts, one after another, in the memory of one part."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama4_jax.data.batch import Batch
from llama4_jax.training.objective import Metrics

PyTree = Any
GradientsOf = Callable[[Batch, jax.Array], tuple[PyTree, Metrics]]


def in_microbatches(gradients_of: GradientsOf, parts: int) -> GradientsOf:
    """`gradients_of(batch, key)` computed in `parts` parts of the batch's rows.

    Each part counts by its weighted targets, so that a mean over targets comes out as of the whole batch. What is no mean
    over targets (load balance, which is a product of two means) is the mean of the parts' own.
    """
    if parts == 1:
        return gradients_of

    def summed(batch: Batch, key: jax.Array) -> tuple[PyTree, Metrics]:
        batches = jax.tree.map(lambda x: _strided(x, parts), batch)
        total = jnp.maximum(batch.loss_weights.sum(), 1e-9)

        def add(sums, part_and_index):
            part, index = part_and_index
            share = part.loss_weights.sum() / total
            new = gradients_of(part, jax.random.fold_in(key, index))
            return jax.tree.map(lambda total, x: total + share.astype(x.dtype) * x, sums, new), None

        first = jax.tree.map(lambda x: x[0], batches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients_of, first, key))
        return jax.lax.scan(add, zeros, (batches, jnp.arange(parts)))[0]

    return summed


def _strided(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] as [parts, B / parts, ...], part p of rows p, p + parts, ...: every device finds its rows of each at home."""
    x = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
    return nn.with_logical_constraint(x, (None, "batch", "seq") if x.ndim == 3 else (None, "batch"))

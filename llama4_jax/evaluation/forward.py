"""The forward pass over a Batch, on which objectives and evaluations alike are built."""

from typing import Any

from llama4_jax.data.batch import Batch

PyTree = Any


def apply_to_batch(model, params: PyTree, batch: Batch, model_state: PyTree = None, **options):
    """The model's Output for a batch, log-probabilities of its targets included.

    Args:
        model: a Llama4.
        params: its parameters.
        batch: what to read.
        model_state: its other collections, as in TrainState.
        options: further arguments of `model.apply`.
    """
    return model.apply(
        {"params": params} | (model_state or {}),
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        images=batch.images,
        targets=batch.targets,
        document_window=batch.document_window,
        **options,
    )

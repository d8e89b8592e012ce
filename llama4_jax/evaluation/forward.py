"""The forward pass over a Batch, on which objectives and evaluations alike are built."""

from typing import Any

from llama4_jax.data.batch import Batch

PyTree = Any


def apply_to_batch(model, params: PyTree, batch: Batch):
    """The model's Output for a batch, log-probabilities of its targets included."""
    return model.apply(
        {"params": params},
        batch.tokens,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        images=batch.images,
        targets=batch.targets,
        document_window=batch.document_window,
    )

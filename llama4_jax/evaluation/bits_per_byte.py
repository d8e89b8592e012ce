"""Bits per byte: how many bits the model needs for a byte of held-out text, whatever its tokenizer."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.evaluation.forward import apply_to_batch
from llama4_jax.parallel.rules import put_batch


def bits_per_byte(context):
    """Makes `evaluate(params, model_state) -> {"bits_per_byte", "nats_per_token"}` over the context's batches.

    Bits per byte are the sum of -log2 p over all held-out tokens, divided by the UTF-8 bytes of the held-out text. Over
    the first `max_batches` alone, it is estimated with the bytes that a token holds on average.
    """
    count = len(context.batches) if context.config.max_batches is None else context.config.max_batches
    batches = lambda: (put_batch(batch, context.mesh) for batch in itertools.islice(context.batches, count))  # noqa: E731

    everywhere = NamedSharding(context.mesh, P())  # of several processes each reads the sums

    @functools.partial(jax.jit, out_shardings=everywhere)
    def nats_and_tokens(params, model_state, batch):
        counted = batch.loss_weights > 0
        log_probs = apply_to_batch(context.model, params, batch, model_state).log_probs
        return jnp.array([-jnp.sum(jnp.where(counted, log_probs, 0.0)), jnp.sum(counted)])

    @functools.cache
    def bytes_of(tokens: float) -> float:
        """Bytes that the evaluated tokens stand for."""
        if count >= len(context.batches):
            return context.corpus.heldout_bytes
        counted = jax.jit(lambda weights: jnp.sum(weights > 0), out_shardings=everywhere)
        total = sum(int(counted(put_batch(batch.replace(images=None), context.mesh).loss_weights)) for batch in context.batches)
        return context.corpus.heldout_bytes * tokens / total

    def evaluate(params, model_state) -> dict[str, float]:
        sums = [nats_and_tokens(params, model_state, batch) for batch in batches()]
        nats, tokens = np.sum(np.asarray(jax.device_get(sums), np.float64), axis=0)
        return {"bits_per_byte": nats / math.log(2) / bytes_of(tokens), "nats_per_token": nats / tokens}

    return evaluate

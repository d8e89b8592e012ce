"""Log-probabilities of given tokens, without ever holding [B, T, V]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def target_log_probs(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], block_size: int
) -> Float[Array, "B T"]:
    """log softmax(hidden head)[target] in float32, for `block_size` positions of every row at a time.

    The backward pass computes each block's logits again, so at most one block of them exists at any time.
    """
    B, T, D = hidden.shape
    blocks = -(-T // block_size)
    size = -(-T // blocks)
    padding = blocks * size - T
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(B, blocks, size, D).swapaxes(0, 1)
    targets = jnp.pad(targets, ((0, 0), (0, padding))).reshape(B, blocks, size).swapaxes(0, 1)

    @jax.checkpoint
    def block(_, inputs):
        hidden, targets = inputs
        logits = jax.lax.dot_general(hidden, head, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, chosen - jax.nn.logsumexp(logits, axis=-1)  # [B, size]

    log_probs = jax.lax.scan(block, None, (hidden, targets))[1]  # [blocks, B, size]
    return log_probs.swapaxes(0, 1).reshape(B, -1)[:, :T]

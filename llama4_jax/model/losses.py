"""Log-probabilities of given tokens, without ever holding [B, T, V]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama4_jax.parallel.dense_parallel import gathering_mesh, on_rows
from llama4_jax.parallel.mesh import current_mesh

HEAD_AXES = "embed", "vocab"


def target_log_probs(
    hidden: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], block_size: int
) -> Float[Array, "B T"]:
    """log softmax(hidden head)[target] in float32, for `block_size` positions of every row at a time.

    The backward pass computes each block's logits again, so at most one block of them exists at any time. On a mesh every
    device goes through its own positions.
    """
    if mesh := gathering_mesh(*hidden.shape[:2], with_tensor=False):

        def on_device(head, hidden, targets):
            return _in_blocks(hidden, head, targets, block_size, shards=1)

        return on_rows(on_device, mesh, head, HEAD_AXES, hidden, targets)
    mesh = current_mesh()
    shards = mesh.shape["context"] if mesh and hidden.shape[1] % mesh.shape["context"] == 0 else 1
    return _in_blocks(hidden, head, targets, block_size, shards)


def _in_blocks(hidden, head, targets, block_size, shards):
    """Over `shards` parts of each row at once, where XLA is to split them."""
    B, T, _ = hidden.shape
    length = T // shards
    blocks = -(-length // block_size)
    size = -(-length // blocks)

    def split(x):  # [B, T, ...] to [blocks, B, shards, size, ...]
        x = x.reshape(B, shards, length, *x.shape[2:])
        x = jnp.pad(x, [(0, blocks * size - length) if axis == 2 else (0, 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(B, shards, blocks, size, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def block(_, inputs):
        hidden, targets = inputs
        logits = jax.lax.dot_general(hidden, head, (((3,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return None, chosen - jax.nn.logsumexp(logits, axis=-1)  # [B, shards, size]

    log_probs = jax.lax.scan(block, None, (split(hidden), split(targets)))[1]  # [blocks, B, shards, size]
    return jnp.moveaxis(log_probs, 0, 2).reshape(B, shards, -1)[:, :, :length].reshape(B, T)

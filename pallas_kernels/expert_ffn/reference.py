"""Every expert on every token: E times the work, and no way to get it wrong."""

import jax
import jax.numpy as jnp


def expert_ffn(x, experts, scores, gate_up, down, order=None):
    """See `api.expert_ffn`."""
    del order

    def expert(index, gate_up, down):
        score = jnp.sum(jnp.where(experts == index, scores, 0.0), axis=-1)  # [M]; 0 where it was not chosen, and f(0) = 0
        z = (x * score[:, None]).astype(x.dtype)
        gate, up = (jnp.dot(z, w, precision="highest") for w in (gate_up[0], gate_up[1]))
        return jnp.dot(jax.nn.silu(gate) * up, down, precision="highest")

    return jax.vmap(expert)(jnp.arange(gate_up.shape[0]), gate_up, down).sum(axis=0).astype(x.dtype)

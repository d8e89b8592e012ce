"""Plain jax.numpy: the specification, and on CPU and GPU also what runs."""

import jax
import jax.numpy as jnp

from pallas_kernels.routing.decision import Route


def route(logits, num_choices, bias, valid):
    """See `api.route`."""
    M, E = logits.shape
    ranked = logits if bias is None else logits + jax.lax.stop_gradient(bias)
    if num_choices == 1:
        experts = jnp.argmax(ranked, axis=-1, keepdims=True).astype(jnp.int32)
    else:
        experts = jax.lax.top_k(ranked, num_choices)[1]
    scores = jax.nn.sigmoid(jnp.take_along_axis(logits, experts, axis=-1))
    place, group_sizes = places(experts, E, valid)
    weights = jnp.ones(M) if valid is None else valid.astype(jnp.float32)
    weights = weights / jnp.maximum(weights.sum(), 1.0)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    return Route(
        experts=experts,
        scores=scores,
        place=place,
        group_sizes=group_sizes,
        load=weights @ jax.lax.stop_gradient(jax.nn.one_hot(experts, E).mean(axis=1)),
        probabilities=weights @ p,
        entropy=-jnp.vdot(weights, (p * log_p).sum(axis=-1)),
        z_loss=jnp.vdot(weights, jnp.square(jax.nn.logsumexp(logits, axis=-1))),
    )


def places(experts, num_experts, valid=None):
    """`place` and `group_sizes` of a Route. By counting: XLA's sort of 65,536 takes 20 s to compile for v5p
    (jax 0.10.2, libtpu 0.0.42, on two busy cores)."""
    chosen = experts if valid is None else jnp.where(valid[:, None], experts, num_experts)
    here = jax.nn.one_hot(chosen.reshape(-1), num_experts, dtype=jnp.int32, axis=0)  # [E, M X]
    group_sizes = here.sum(axis=1)
    before = jnp.cumsum(group_sizes) - group_sizes
    at_expert = here * (before[:, None] + jnp.cumsum(here, axis=1) - 1)
    place = at_expert.sum(axis=0).reshape(experts.shape)
    return jnp.where(chosen < num_experts, place, experts.size), group_sizes


def permute(x, scores, place):
    """See `api.permute`."""
    M, X = place.shape
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scaled = (x[:, None].astype(wide) * scores[..., None]).astype(x.dtype).reshape(M * X, -1)
    return jnp.zeros_like(scaled).at[place.reshape(-1)].set(scaled, mode="drop")


def unpermute(rows, place):
    """See `api.unpermute`."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.take(rows, place, axis=0, mode="fill", fill_value=0).astype(wide).sum(axis=1).astype(rows.dtype)

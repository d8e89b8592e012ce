"""Rows on their way to the experts and back, with gradients that gather too (left to itself, XLA scatters them)."""

import jax
import jax.numpy as jnp
import numpy as np


@jax.custom_vjp
def permute(x, scores, place):
    """See `api.permute`."""
    return _forward(x, scores, place)[0]


def _forward(x, scores, place):
    pair = inverse(place)
    score = jnp.take(scores.reshape(-1), pair, mode="fill", fill_value=0)[:, None]
    rows = jnp.take(x, pair // place.shape[1], axis=0, mode="fill", fill_value=0)
    return (rows.astype(jnp.promote_types(x.dtype, jnp.float32)) * score).astype(x.dtype), (x, scores, place)


def _backward(residuals, drows):
    x, scores, place = residuals
    there = jnp.take(drows, place, axis=0, mode="fill", fill_value=0)  # [M, X, D]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    dx = (there.astype(wide) * scores[..., None]).sum(axis=1).astype(x.dtype)
    dscores = (there.astype(wide) * x[:, None].astype(wide)).sum(axis=-1).astype(scores.dtype)
    return dx, dscores, _none(place)


permute.defvjp(_forward, _backward)


@jax.custom_vjp
def unpermute(rows, place):
    """See `api.unpermute`."""
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.take(rows, place, axis=0, mode="fill", fill_value=0).astype(wide).sum(axis=1).astype(rows.dtype)


def _unpermute_forward(rows, place):
    return unpermute(rows, place), (place, rows.shape[0])


def _unpermute_backward(residuals, dout):
    place, count = residuals
    return jnp.take(dout, inverse(place, count) // place.shape[1], axis=0, mode="fill", fill_value=0), _none(place)


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def inverse(place, rows=None):
    """The choice, numbered token * X + choice, at each row; the number of choices where there is none."""
    rows = place.size if rows is None else rows
    return jnp.full(rows, place.size, jnp.int32).at[place.reshape(-1)].set(jnp.arange(place.size), mode="drop")


def _none(integers):
    return np.zeros(integers.shape, jax.dtypes.float0)

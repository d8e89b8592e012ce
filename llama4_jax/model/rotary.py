"""Rotary positions with interleaved pairs (RoFormer, arXiv 2104.09864) and Llama 3's scaling of long wavelengths."""

import math

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from llama4_jax.config import RopeScaling


@struct.dataclass
class Rotation:
    """cos and sin of each pair's angle at each token, over a head axis of 1."""

    cos: Float[Array, "#B T 1 h"]
    sin: Float[Array, "#B T 1 h"]


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[np.ndarray, " h"]:
    """Radians a position for each of the head_dim / 2 pairs, float32.

    A wavelength below original / high keeps its frequency, one above original / low has it divided by `factor`, and one
    between is interpolated. With high = low, as in Scout, nothing lies between, and the interpolation is not computed.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        original, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
        turns = original * frequencies / (2 * math.pi)  # full turns over the original length
        kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else turns >= low
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies.astype(np.float32)


def rotation(positions: Int[Array, "#B T"], inv_freq: Float[np.ndarray, " h"], period: int | None) -> Rotation:
    """The rotation at each position. With a period (the attention chunk) the position counts from its chunk's start:
    the scores within a chunk are the same, and the angles stay exact at ten million tokens."""
    if period is not None:
        positions = positions % period
    angles = positions[..., None, None].astype(jnp.float32) * inv_freq  # [#B, T, 1, H/2]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Each pair (x[2j], x[2j+1]) turned by its angle, in float32, cast back."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]  # [B, T, N, H/2]
    turned = jnp.stack([even * by.cos - odd * by.sin, even * by.sin + odd * by.cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)

"""Matmuls of a dense projection in 8 bits, for training: scaled as they are met, gradients straight through."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llama4_jax.errors import UserError

# Number format and its largest value. Symmetric int8 leaves -128 out.
FORMATS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}

# Devices that multiply fp8 (jax.Device.device_kind begins so). A CPU computes the same numbers, slower than plain ones.
# int8 is multiplied by every TPU and GPU that jax still serves.
FP8_DEVICES = ("cpu", "TPU7x", "NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA B200", "NVIDIA GB200", "NVIDIA L40")


def check_hardware(matmul: str, device_kind: str) -> None:
    """Raises UserError where devices of this jax.Device.device_kind have no multipliers for the format."""
    if matmul == "fp8" and not device_kind.startswith(FP8_DEVICES):
        raise UserError(f"execution.matmul=fp8: {device_kind} multiplies no fp8; use int8 or plain")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def low_precision_project(
    x: Float[Array, "..."], weight: Float[Array, "..."], in_axes: int, matmul: str
) -> Float[Array, "..."]:
    """`linear.project` with both sides rounded to 8 bits: x with a scale for each of its rows, the weight with one for each
    output. Sums are int32 or float32. Gradients are those of the plain product, in the dtype of x: two thirds of the
    training FLOPs stay there, and no rounding error gathers in them.
    """
    x8, x_scale = _quantize(x, range(x.ndim - in_axes, x.ndim), matmul)
    w8, w_scale = _quantize(weight, range(in_axes), matmul)
    sums = jnp.int32 if matmul == "int8" else jnp.float32
    product = _dot(x8, w8, in_axes, sums).astype(jnp.float32)
    outputs = product.ndim - (x.ndim - in_axes)
    x_scale = x_scale.reshape(*x.shape[: x.ndim - in_axes], *[1] * outputs)
    return (product * x_scale * w_scale.reshape(weight.shape[in_axes:])).astype(x.dtype)


def _quantize(x: jax.Array, axes: range, matmul: str) -> tuple[jax.Array, jax.Array]:
    """(8-bit values, float32 scales with the contracted axes of size 1). A row of zeros has scale 1."""
    dtype, largest = FORMATS[matmul]
    x = x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True)
    scale = jnp.where(peak > 0, peak / largest, 1.0)
    scaled = x / scale
    return (jnp.round(scaled) if matmul == "int8" else scaled).astype(dtype), scale


def _dot(x, weight, in_axes, sums=None):
    contract = tuple(range(x.ndim - in_axes, x.ndim)), tuple(range(in_axes))
    return jax.lax.dot_general(x, weight, (contract, ((), ())), preferred_element_type=sums)


def _forward(x, weight, in_axes, matmul):
    return low_precision_project(x, weight, in_axes, matmul), (x, weight)


def _backward(in_axes, matmul, residuals, dy):
    del matmul
    x, weight = residuals
    _, pull_back = jax.vjp(lambda x, w: _dot(x, w.astype(x.dtype), in_axes), x, weight)
    return pull_back(dy)


low_precision_project.defvjp(_forward, _backward)

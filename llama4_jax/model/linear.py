"""The one place where activations meet weights.

Every projection and every expert matmul of the model goes through `project` or `expert_ffn`. What a weight may be is
decided here alone: today an array; a quantised array or one with a low-rank adapter joins by becoming another `Weight`.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import pallas_kernels.expert_ffn as expert_ffn_kernel
from llama4_jax.model.float32_product import float32_product
from llama4_jax.model.low_precision import FORMATS, low_precision_project
from llama4_jax.parallel.dense_parallel import gathering_mesh, product_with_gathered
from llama4_jax.parallel.expert_parallel import routed_experts

Weight = jax.Array


def project(
    x: Float[Array, "..."], weight: Weight, axes: Sequence[str | None], *, in_axes: int = 1, matmul: str = "plain"
) -> Float[Array, "..."]:
    """x contracted over its last `in_axes` axes with the first `in_axes` axes of the weight, in the dtype of x.

    `axes` are the weight's logical names, by which it lies on a mesh (parallel/dense_parallel.py). `matmul` is ExecutionConfig's
    (see low_precision.py for others than plain), or float32: so are products and sums, and the result (float32_product.py).
    """
    if matmul in FORMATS:
        return low_precision_project(x, weight, in_axes, matmul)
    mesh = gathering_mesh(*x.shape[:2]) if x.ndim == 2 + in_axes else None
    precision = jax.config.jax_default_matmul_precision  # of now: the gradient is traced elsewhere

    def in_its_dtype(x, weight):
        return _product(x, weight, in_axes, precision)

    product, weight = (float32_product, weight) if matmul == "float32" else (in_its_dtype, weight.astype(x.dtype))
    return product(x, weight) if mesh is None else product_with_gathered(product, mesh, x, weight, axes, in_axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, weight, in_axes, precision):
    return _plain(x, weight, in_axes, precision)


def _plain(x, weight, in_axes, precision):
    contract = tuple(range(x.ndim - in_axes, x.ndim)), tuple(range(in_axes))
    return jax.lax.dot_general(x, weight, (contract, ((), ())), precision=precision)


def _product_backward(in_axes, precision, residuals, dy):
    """The weight's gradient first. A compiler that may put it off does so for all layers of a block, and keeps x and dy of
    each meanwhile: 20 GB a chip in Scout's training on 128 chips of v5p."""
    x, weight = residuals
    (dweight,) = jax.linear_transpose(lambda weight: _plain(x, weight, in_axes, precision), weight)(dy)
    dy, dweight = jax.lax.optimization_barrier((dy, dweight))
    (dx,) = jax.linear_transpose(lambda x: _plain(x, weight, in_axes, precision), x)(dy)
    return dx, dweight


_product.defvjp(lambda x, weight, *rest: (_plain(x, weight, *rest), (x, weight)), _product_backward)


def expert_ffn(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T X"],
    scores: Float[Array, "B T X"],
    gate_up: Weight,
    down: Weight,
    order: tuple[Int[Array, "M X"], Int[Array, " E"]],
    *,
    implementation: str,
    exchange: str,
) -> Float[Array, "B T D"]:
    """The routed experts' output, summed over each token's choices. See pallas_kernels/expert_ffn for one device, where
    `order` saves a sort, and parallel/expert_parallel for how tokens and experts meet on a mesh."""
    ffn = partial(expert_ffn_kernel.expert_ffn, implementation=implementation)
    weights = gate_up.astype(x.dtype), down.astype(x.dtype)
    return routed_experts(x, experts, scores, *weights, order, ffn=ffn, exchange=exchange)


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "... 2 F"]) -> Float[Array, "... F"]:
    """silu(gate) * up. Its gradient keeps the input alone and writes both halves at once."""
    return nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def _swiglu_backward(gate_up, dy):
    gate, up = gate_up[..., 0, :], gate_up[..., 1, :]
    s = nn.sigmoid(gate)
    return (jnp.stack([dy * up * (s + gate * s * (1 - s)), dy * gate * s], axis=-2),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _swiglu_backward)


class Linear(nn.Module):
    """A projection with named axes.

    Attributes:
        shape: of the kernel: the input axes, then the output axes.
        axes: the logical name of each of them.
        in_axes: how many of them are input axes.
        use_bias: whether a bias of the output's shape is added.
        stddev: of the normal initialisation.
        matmul: see `project`.
    """

    shape: Sequence[int]
    axes: Sequence[str | None]
    stddev: float
    in_axes: int = 1
    use_bias: bool = False
    matmul: str = "plain"

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        kernel = self.param("kernel", normal(self.stddev, self.axes), tuple(self.shape), jnp.float32)
        y = project(x, kernel, self.axes, in_axes=self.in_axes, matmul=self.matmul)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.axes[self.in_axes :]))
            y += self.param("bias", init, tuple(self.shape[self.in_axes :]), jnp.float32).astype(y.dtype)
        return y


def normal(stddev: float, axes: Sequence[str | None]):
    """A normal initialiser whose parameter knows its logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(stddev), tuple(axes))

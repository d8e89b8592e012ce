"""How parameters move: AdamW or Muon, clipped gradients, one schedule, decay of matrices alone."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from llama4_jax.config import ModelConfig, OptimizerConfig
from llama4_jax.model.transfer import learning_rate_factors

PyTree = Any

# Norm scales and biases have no scale to hold down. The embedding's rows get a gradient only where their token occurs,
# so decay would pull the rows of rare tokens to zero; OLMo 2 (arXiv 2501.00656) leaves its embeddings undecayed too.
UNDECAYED = re.compile(r"(^|/)(scale|bias|(\w+_)?embedding)$")

# What Muon orthogonalises: the decoder layers' matrices, with their input and output axes counted from the end (the axes before
# are a stack of matrices: repeated blocks, experts, gate and up). Table, head, router and vision tower stay with AdamW, as Muon's
# authors have it (arXiv 2502.16982).
MATRICES = {
    re.compile(r"^layers/.*attention/(query|key|value)/kernel$"): ((-3,), (-2, -1)),
    re.compile(r"^layers/.*attention/output/kernel$"): ((-3, -2), (-1,)),
    re.compile(r"^layers/.*(experts/gate_up|down)/kernel$"): ((-2,), (-1,)),
    re.compile(r"^layers/.*gate_up/kernel$"): ((-3,), (-1,)),
}
MUON_RMS = 0.2  # root mean square of a Muon update at rate 1, as of AdamW's: one rate serves both. arXiv 2502.16982, 2.2

_DECAY_SHAPES: dict[str, Callable] = {
    "cosine": lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t)),
    "linear": lambda t: 1 - t,
    "one_minus_sqrt": lambda t: 1 - jnp.sqrt(t),  # arXiv 2405.18392, section 3
}


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of the update after `count` earlier ones.

    Linear up to the peak at update `warmup_steps`; the peak, until the last `decay_fraction` of the updates after the
    warm-up; then down to `final_fraction` of the peak at the last update.
    """
    decay_steps = max(config.decay_fraction * (total_steps - config.warmup_steps), 1)

    def schedule(count):
        step = count + 1
        warm = jnp.minimum(step / max(config.warmup_steps, 1), 1.0)
        done = jnp.clip(1 - (total_steps - step) / decay_steps, 0.0, 1.0)
        left = config.final_fraction + (1 - config.final_fraction) * _DECAY_SHAPES[config.decay_shape](done)
        return config.learning_rate * warm * left

    return schedule


def decays(params: PyTree) -> PyTree:
    """True for each parameter that weight decay reaches: the matrices of projections, router, experts and output."""
    return _by_path(lambda path, _: UNDECAYED.search(path) is None, params)


def matrix_axes(params: PyTree) -> PyTree:
    """The input and output axes of each parameter that Muon orthogonalises, None for the others."""

    def axes(path, param):
        for pattern, (inputs, outputs) in MATRICES.items():
            if pattern.search(path):
                return MuonDimensionNumbers(*(tuple(param.ndim + axis for axis in side) for side in (inputs, outputs)))

    return _by_path(axes, params)


def make_optimizer(config: OptimizerConfig, total_steps: int, model: ModelConfig | None = None) -> optax.GradientTransformation:
    """The update rule for the parameters that train.

    With a `model` whose config has `transfer`, each parameter's rate is scaled as model/transfer.py says; its weight decay
    is not, so that the product of rate and decay stays what it was.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            _direction(config),
            _scale_by_transfer(model),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
        ),
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.rule == "adamw":
        return adam

    def rules(params):
        is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
        return jax.tree.map(lambda axes: "adamw" if axes is None else "muon", matrix_axes(params), is_leaf=is_leaf)

    muon = optax.chain(scale_by_muon(beta=config.muon_beta, weight_dimension_numbers=matrix_axes), _scale_by_size())
    return optax.partition({"adamw": adam, "muon": muon}, rules)


def _scale_by_transfer(model: ModelConfig | None) -> optax.GradientTransformation:
    if model is None or model.transfer is None:
        return optax.identity()
    return optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, learning_rate_factors(model, updates)))


def _scale_by_size() -> optax.GradientTransformation:
    """From orthogonal matrices [.., n, m], of root mean square 1 / sqrt(max(n, m)), to updates of MUON_RMS."""

    def scale(update, axes):
        if isinstance(update, optax.MaskedNode):
            return update
        sizes = (math.prod(update.shape[axis] for axis in side) for side in (axes.reduction_axis, axes.output_axis))
        return MUON_RMS * math.sqrt(max(sizes)) * update

    def update(updates, state, params=None):
        is_leaf = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        return jax.tree.map(scale, updates, matrix_axes(updates), is_leaf=is_leaf), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _by_path(function: Callable, params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(jax.tree_util.keystr(path, simple=True, separator="/"), x), params
    )

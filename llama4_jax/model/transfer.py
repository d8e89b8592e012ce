"""Initial deviations, and learning rates that stay right as a model grows.

Without `ModelConfig.transfer` every weight starts at initializer_range, and projections into the residual stream smaller the
more of them add up (GPT-2's rule). With it, a rate and a deviation that are best at (base_width, base_depth) stay best at
another size: in width by muP (arXiv 2203.03466, table 3: the form without multipliers in the forward pass, so that published
Llama 4 stays what it is), in depth by CompleteP (arXiv 2505.01618, alpha = 1: residual branches by 1 / depth, which for Adam
is their last projection's deviation and rate by 1 / depth). With m = width / base_width and d = depth / base_depth:

    role        parameters                               deviation       Adam's rate
    table       token embedding, vision, biases, norms   1               1
    matrix      query, key, value, gate, up              m^-1/2          m^-1
    residual    attention output, down                   m^-1/2 d^-1     m^-1 d^-1
    readout     head, router                             m^-1            m^-1

FFN widths are taken to grow with the model's, the head size to stay.
"""

import math
import re
from typing import Any, Literal

import jax

from llama4_jax.config import ModelConfig

PyTree = Any
Role = Literal["table", "matrix", "residual", "readout"]

_ROLES: tuple[tuple[re.Pattern, Role], ...] = (
    (re.compile(r"^vision/"), "table"),  # its width does not grow with the text model's
    (re.compile(r"(attention/output|down)/kernel$"), "residual"),
    (re.compile(r"(lm_head|router)/kernel$"), "readout"),
    (re.compile(r"kernel$"), "matrix"),
)


def initial_stddev(config: ModelConfig, role: Role) -> float:
    """Deviation of the normal that a weight of this role starts from."""
    width, depth = _growth(config)
    base_depth = config.num_layers / depth
    residual = 1 / (depth * math.sqrt(2 * base_depth))
    factors = {"table": 1.0, "matrix": width**-0.5, "residual": width**-0.5 * residual, "readout": 1 / width}
    return config.initializer_range * factors[role]


def learning_rate_factors(config: ModelConfig, params: PyTree) -> PyTree:
    """What the learning rate of each parameter is multiplied by."""
    width, depth = _growth(config)
    factors = {"table": 1.0, "matrix": 1 / width, "residual": 1 / (width * depth), "readout": 1 / width}

    def factor(path, _):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return factors[next((role for pattern, role in _ROLES if pattern.search(name)), "table")]

    return jax.tree_util.tree_map_with_path(factor, params)


def _growth(config: ModelConfig) -> tuple[float, float]:
    if config.transfer is None:
        return 1.0, 1.0
    return config.hidden_size / config.transfer.base_width, config.num_layers / config.transfer.base_depth

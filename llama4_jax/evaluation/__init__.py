"""Evaluations that the training loop runs, by name.

An evaluation is made once for a run, from an EvaluationContext, and is then called with parameters, and what the model
carries beside them, as often as wanted: `evaluate(params, model_state) -> {name: value}`. Register one by adding it to EVALUATIONS.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llama4_jax.config import EvaluationConfig
from llama4_jax.data.batch import Batch
from llama4_jax.errors import UserError
from llama4_jax.evaluation.bits_per_byte import bits_per_byte

PyTree = Any
Evaluate = Callable[[PyTree, PyTree], dict[str, float]]


@dataclass
class EvaluationContext:
    """What an evaluation may read.

    Attributes:
        model: to apply.
        mesh: on which its parameters and batches lie.
        corpus: held-out text, its tokenizer and its size in bytes (llama4_jax.data.pipeline.Corpus).
        batches: all held-out batches, each process's own rows.
        config: of this evaluation.
    """

    model: Any
    mesh: Any
    corpus: Any
    batches: Sequence[Batch]
    config: EvaluationConfig


EVALUATIONS: dict[str, Callable[[EvaluationContext], Evaluate]] = {"bits_per_byte": bits_per_byte}


def require_known(name: str, config: EvaluationConfig) -> None:
    """Raises UserError when the evaluation's function is not registered."""
    if config.function not in EVALUATIONS:
        near = difflib.get_close_matches(config.function, EVALUATIONS, n=1) or sorted(EVALUATIONS)
        raise UserError(f"evaluations.{name}.function={config.function!r} is unknown; did you mean {', '.join(near)}?")

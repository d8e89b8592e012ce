"""Which of a run's checkpoints stay."""

import math
from collections.abc import Mapping

from llama4_jax.config import CheckpointConfig
from llama4_jax.errors import UserError


def require_known_value(config: CheckpointConfig, values: Mapping[str, float]) -> None:
    """Raises UserError when the evaluation of `config.keep_best` has run, but has no such value."""
    evaluation = f"{(config.keep_best or '').partition('.')[0]}."
    given = [name for name in values if name.startswith(evaluation)]
    if given and config.keep_best not in given:
        raise UserError(f"CheckpointConfig.keep_best={config.keep_best} is unknown; there are {', '.join(given)}")


def superfluous(config: CheckpointConfig, checkpoints: Mapping[int, Mapping[str, float]]) -> list[int]:
    """The steps that may go: neither among the newest, nor at a step that is kept for ever, nor the best.

    Args:
        checkpoints: the values of evaluations at each step that has a whole checkpoint.
    """
    steps = sorted(checkpoints)
    stay = set(steps[-config.keep :])
    if config.keep_every is not None:
        stay |= {step for step in steps if step % config.keep_every == 0}
    best = best_step(config, checkpoints)
    return [step for step in steps if step not in stay and step != best]


def best_step(config: CheckpointConfig, checkpoints: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the best `config.keep_best`, the older of equals; None where no checkpoint has one."""
    values = {step: values[config.keep_best] for step, values in checkpoints.items() if config.keep_best in values}
    values = {step: value for step, value in values.items() if not math.isnan(value)}
    sign = -1 if config.best_is == "highest" else 1
    return min(values, key=lambda step: (sign * values[step], step), default=None)

"""Steps that would do harm: how they are told, inside the compiled step, and what becomes of a run that has too many.

A loss or a gradient that is not finite, and one far beyond what steps have lately been like (a spike: bad data, or bad hardware),
change nothing: parameters, moments and the router's bias stay what they were, while step and data go on. The decision is made of
global values, so that all processes make the same. Spikes that are left out and not undone at once come back: after several in a
row the run goes back to its last checkpoint, and on with the data behind them (as PaLM did by hand, arXiv 2204.02311, section 5.1).
"""

import json
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.config import AnomalyConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes
from llama4_jax.training.work_directory import write_whole

PyTree = Any

SOUND, NOT_FINITE, GRADIENT_SPIKE, LOSS_SPIKE = range(4)


@flax.struct.dataclass
class Usual:
    """What sound steps have lately been like. A part of the state, so that a run which goes on judges as it would have.

    Attributes:
        loss, grad_norm: running means over about the last `AnomalyConfig.window` sound steps.
        sound: steps so far whose update was made.
        skipped: steps so far whose update was left out.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    sound: Int[Array, ""]
    skipped: Int[Array, ""]

    @classmethod
    def at_start(cls) -> "Usual":
        return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def judge(usual: Usual, loss: Float[Array, ""], grad_norm: Float[Array, ""], config: AnomalyConfig) -> Int[Array, ""]:
    """SOUND, or what is wrong with a step. A mean that is not positive, as some objectives have, makes no spike."""
    known = usual.sound >= config.window

    def is_spike(value, mean, factor):
        return jnp.bool_(False) if factor is None else known & (mean > 0) & (value > factor * mean)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    verdict = jnp.where(is_spike(loss, usual.loss, config.loss_factor), LOSS_SPIKE, SOUND)
    verdict = jnp.where(is_spike(grad_norm, usual.grad_norm, config.grad_norm_factor), GRADIENT_SPIKE, verdict)
    return jnp.where(finite, verdict, NOT_FINITE)


def next_usual(usual: Usual, loss: Float[Array, ""], grad_norm: Float[Array, ""], sound, config: AnomalyConfig) -> Usual:
    """After a step that was `sound`, or not."""
    weight = 1.0 / jnp.minimum(usual.sound + 1, config.window)
    move = lambda mean, value: jnp.where(sound, mean + weight * (value - mean), mean)  # noqa: E731
    return Usual(
        move(usual.loss, loss), move(usual.grad_norm, grad_norm), usual.sound + sound, usual.skipped + jnp.logical_not(sound)
    )


@jax.jit
def all_finite(params: PyTree) -> Bool[Array, ""]:
    """Of parameters that no step's loss has judged yet: those that the last update left behind."""
    floating = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floating]).all()


def describe(verdict: int, values: dict[str, float], usual: dict[str, float]) -> str:
    """Why a step was left out. `values` are of the step, `usual` the means before it; each has loss and grad_norm."""
    match verdict:
        case 1:
            return f"loss is {values['loss']} and gradient norm {values['grad_norm']}"
        case 2:
            return f"gradient norm {values['grad_norm']:.4g} is a spike: it has been {usual['grad_norm']:.4g}"
        case 3:
            return f"loss {values['loss']:.4g} is a spike: it has been {usual['loss']:.4g}"
    raise ValueError(verdict)


class Rollbacks:
    """rollbacks.json of a work directory: after which step the data went on elsewhere.

    Whatever is done again from an older checkpoint comes to the same step and makes the same leap, so that an interrupted run
    still ends with the bits of one that was not.
    """

    def __init__(self, folder: Path):
        self._path = folder / "rollbacks.json"
        self._made: list[dict[str, Any]] = processes.from_first("the rollbacks", self._read)

    def _read(self) -> list[dict[str, Any]]:
        try:
            return json.loads(self._path.read_text())
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self._path}: {error}; the run cannot tell which batches it left out") from error

    def data_after(self, step: int) -> dict[str, Any] | None:
        """The state of the data to go on with after `step`, where it is not what follows."""
        made = self._to(step)
        return None if made is None else made["data"]

    def _to(self, step: int) -> dict[str, Any] | None:
        return next((made for made in self._made if made["to"] == step), None)

    def never_got_past(self, step: int, sound: int) -> bool:
        """Whether the run has gone back to `step` before, and no step after it was sound, neither then nor now; `sound` is the
        last one that was."""
        before = self._to(step)
        return before is not None and before.get("sound") == step == sound

    def add(self, *, to: int, sound: int, skipped: list[str], data: dict[str, Any]) -> None:
        """Notes that the run goes back `to` a step, for what is told of the steps that were `skipped` after the last `sound` one, and
        on with other data. What it noted of steps behind `to` is void: the run comes to them on other data.

        Raises:
            UserError: it has gone back to there before, so that other data are no help.
        """
        if before := self._to(to):
            raise UserError(
                f"going back to step {to}, and past the batches of {before['skipped'][0]}, did not help: {skipped[0]}. The data are "
                f"not what is wrong: lower optimizer.learning_rate or lengthen optimizer.warmup_steps in a new --workdir; or raise "
                f"anomalies.loss_factor and grad_norm_factor here"
            )
        kept = [made for made in self._made if made["to"] < to]
        self._made = [*kept, {"to": to, "sound": sound, "skipped": skipped, "data": data}]
        processes.from_first("rollbacks.json", self._write)

    def _write(self) -> None:
        try:
            write_whole(self._path, json.dumps(self._made, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error

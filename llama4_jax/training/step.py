"""One update of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.config import AnomalyConfig
from llama4_jax.data.batch import Batch
from llama4_jax.parallel.compiler_options import compiler_options
from llama4_jax.training.anomalies import SOUND, judge, next_usual
from llama4_jax.training.balancing import Balance
from llama4_jax.training.microbatches import in_microbatches
from llama4_jax.training.objective import Metrics, Objective
from llama4_jax.training.state import TrainState, shardings_of
from llama4_jax.training.trainable import merge, split

PyTree = Any
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    state: TrainState,
    mesh: Mesh,
    seed: int,
    balance: Balance | None = None,
    microbatches: int = 1,
    anomalies: AnomalyConfig | None = None,
) -> TrainStep:
    """The compiled `train_step(state, batch, frozen=None) -> (next state, metrics)`; call it inside `use_mesh(mesh)`.

    The state given is used up: its buffers become the next state's. Gradients exist only for the parameters that train.
    A step that `anomalies.judge` does not find sound changes nothing but `step` and `usual`. Metrics are the objective's,
    grad_norm (before clipping), learning_rate, anomaly (`judge`'s verdict), usual_loss and usual_grad_norm (the means that it
    was judged by) and skipped_steps (so far), replicated.

    Args:
        objective: see `Objective`.
        optimizer: of `make_optimizer`.
        schedule: the optimizer's, for the metrics.
        state: a state, or an abstract one, from which shardings are read.
        mesh: of `make_mesh`.
        seed: random keys are a function of this and the step.
        balance: of `bias_balancing`, what moves the router's bias after a step; None leaves `model_state` as it is.
        microbatches: parts of the batch that are computed one after another, see `in_microbatches`.
        anomalies: what counts as a spike; None: the defaults.
    """
    anomalies = anomalies or AnomalyConfig()

    def train_step(state: TrainState, batch: Batch, frozen: PyTree = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, fixed = split(state.params, state.trainable)

        def gradients_of(batch: Batch, key: jax.Array) -> tuple[PyTree, Metrics]:
            loss = lambda p: objective(merge(p, fixed), batch, key, state.model_state, frozen)  # noqa: E731
            return jax.grad(loss, has_aux=True)(trained)

        gradients, metrics = in_microbatches(gradients_of, microbatches)(batch, key)
        loss, grad_norm, usual = metrics["loss"], optax.global_norm(gradients), state.usual
        verdict = judge(usual, loss, grad_norm, anomalies)
        sound = verdict == SOUND

        def update() -> tuple[PyTree, PyTree]:
            updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state

        # A branch needs no memory; a select of each leaf would keep moments before and after it apart.
        moved, opt_state = jax.lax.cond(sound, update, lambda: (trained, state.opt_state))
        params = merge(moved, fixed)
        model_state = state.model_state
        if balance is not None:  # without a load to act on the bias stays, but for its way to zero at the end of a run
            model_state = balance(model_state, jnp.where(sound, metrics["expert_load"], 0.0), state.step)
        next_state = TrainState(
            state.step + 1,
            params,
            opt_state,
            model_state,
            next_usual(usual, loss, grad_norm, sound, anomalies),
            state.trainable,
        )
        metrics |= {
            "grad_norm": grad_norm,
            "learning_rate": jnp.float32(schedule(state.step - usual.skipped)),  # the optimizer counts the updates made
            "anomaly": verdict,
            "usual_loss": usual.loss,
            "usual_grad_norm": usual.grad_norm,
            "skipped_steps": next_state.usual.skipped,
        }
        return next_state, metrics

    replicated = NamedSharding(mesh, P())
    shardings = shardings_of(state), replicated
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options(mesh))

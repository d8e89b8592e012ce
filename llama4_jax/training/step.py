"""One update of the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.data.batch import Batch
from llama4_jax.parallel.compiler_options import compiler_options
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
) -> TrainStep:
    """The compiled `train_step(state, batch, frozen=None) -> (next state, metrics)`; call it inside `use_mesh(mesh)`.

    The state given is used up: its buffers become the next state's. Gradients exist only for the parameters that train.
    Metrics are the objective's, grad_norm (before clipping) and learning_rate, replicated.

    Args:
        objective: see `Objective`.
        optimizer: of `make_optimizer`.
        schedule: the optimizer's, for the metrics.
        state: a state, or an abstract one, from which shardings are read.
        mesh: of `make_mesh`.
        seed: random keys are a function of this and the step.
        balance: of `bias_balancing`, what moves the router's bias after a step; None leaves `model_state` as it is.
        microbatches: parts of the batch that are computed one after another, see `in_microbatches`.
    """

    def train_step(state: TrainState, batch: Batch, frozen: PyTree = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trained, fixed = split(state.params, state.trainable)

        def gradients_of(batch: Batch, key: jax.Array) -> tuple[PyTree, Metrics]:
            loss = lambda p: objective(merge(p, fixed), batch, key, state.model_state, frozen)  # noqa: E731
            return jax.grad(loss, has_aux=True)(trained)

        gradients, metrics = in_microbatches(gradients_of, microbatches)(batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
        params = merge(optax.apply_updates(trained, updates), fixed)
        metrics |= {"grad_norm": optax.global_norm(gradients), "learning_rate": jnp.float32(schedule(state.step))}
        model_state = state.model_state if balance is None else balance(state.model_state, metrics["expert_load"], state.step)
        return TrainState(state.step + 1, params, opt_state, model_state, state.trainable), metrics

    replicated = NamedSharding(mesh, P())
    shardings = shardings_of(state), replicated
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings, compiler_options=compiler_options(mesh))

"""A trained router, collapsed through its weights: each balancing brings the load and the held-out loss back.

One layer of eight small experts must learn which token follows which, and only the layer's feed-forward part trains, so
that what the model knows lies in its experts. One expert alone has room for a fraction of it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import ExecutionConfig, MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from llama4_jax.data.batch import Batch
from llama4_jax.evaluation.forward import apply_to_batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import use_mesh
from llama4_jax.training.balancing import bias_balancing
from llama4_jax.training.objective import cross_entropy_objective
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama4_jax.training.state import TrainState, create_state
from llama4_jax.training.step import make_train_step

VOCABULARY, EXPERTS, STEPS = 64, 8, 150
MODEL = Llama4(
    ModelConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, num_experts=EXPERTS,
        expert_ffn_size=4, shared_expert=False, router_bias=True, nope_interval=0, attention_chunk_size=None,
        initializer_range=0.3,
    ),
    ExecutionConfig(attention="reference", expert_ffn="reference"),
)  # fmt: skip
OPTIMIZER_CONFIG = OptimizerConfig(learning_rate=0.02, warmup_steps=0, final_fraction=0.05, weight_decay=0.0)
OPTIMIZER = make_optimizer(OPTIMIZER_CONFIG, 2 * STEPS)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])
BALANCINGS = {
    "none": ObjectiveConfig(load_balance_weight=0.0, router_z_weight=0.0, bias_update_rate=0.0),
    "auxiliary loss": ObjectiveConfig(load_balance_weight=0.05, router_z_weight=0.0, bias_update_rate=0.0),
    "bias": ObjectiveConfig(load_balance_weight=0.0, router_z_weight=0.0, bias_update_rate=0.07),
}


def batches(seed, phase=0):
    """Every token four times in random order, each with its fixed successor as target."""
    successor = np.random.default_rng(seed).permutation(VOCABULARY).astype(np.int32)
    rng = np.random.default_rng((seed, phase))
    positions = np.tile(np.arange(16, dtype=np.int32), (16, 1))
    while True:
        tokens = rng.permuted(np.tile(np.arange(VOCABULARY), 4)).reshape(16, 16).astype(np.int32)
        yield Batch(tokens, successor[tokens], np.ones((16, 16), np.float32), positions, np.ones((16, 16), np.int32))


@dataclass
class Trained:
    """Attributes:
    state: after STEPS steps.
    busiest: load of the busiest expert over the mean, averaged over the last 20 of them.
    loss: of held-out tokens, in nats.
    """

    state: TrainState
    busiest: float
    loss: float


@pytest.fixture(scope="module")
def programs():
    """A compiled step for each balancing, and the held-out loss."""
    with use_mesh(MESH):
        state, batch = new_state(0), next(batches(0))
        schedule = learning_rate_schedule(OPTIMIZER_CONFIG, 2 * STEPS)
        steps = {}
        for name, config in BALANCINGS.items():
            balance = bias_balancing(MODEL.config, config, 2 * STEPS)
            objective = cross_entropy_objective(MODEL, config)
            step = make_train_step(objective, OPTIMIZER, schedule, state=state, mesh=MESH, seed=0, balance=balance)
            steps[name] = step.lower(state, batch).compile()
        yield steps, jax.jit(lambda s, batch: -apply_to_batch(MODEL, s.params, batch, s.model_state).log_probs.mean())


def new_state(seed):
    state = create_state(MODEL, OPTIMIZER, "feed_forward", MESH, seed=seed)
    state.params["embed"]["embedding"] += 0.3  # tokens share a direction, as they do in larger models
    return state


def trained(state, step, loss, seed, phase):
    state, loads = jax.tree.map(jnp.copy, state), []  # the step uses its state up
    data = batches(seed, phase)
    for _ in range(STEPS):
        state, metrics = step(state, next(data))
        loads.append(metrics["expert_load"])
    return Trained(state, float(np.max(loads[-20:], axis=(1, 2)).mean() * EXPERTS), float(loss(state, next(data))))


def collapsed(state):
    """Expert 0 is made every token's first choice, by six logits along the direction that all tokens share."""
    state = jax.tree.map(jnp.copy, state)
    kernel = state.params["layers"]["layer_0"]["feed_forward"]["router"]["kernel"]  # [1, D, E]
    state.params["layers"]["layer_0"]["feed_forward"]["router"]["kernel"] = kernel.at[..., 0].add(6 / 16 / 0.7)
    return state


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_balancing_undoes_a_collapse_and_without_it_stays(programs, seed):
    steps, loss = programs
    healthy = trained(new_state(seed), steps["auxiliary loss"], loss, seed, phase=0)
    sick = collapsed(healthy.state)
    assert loss(sick, next(batches(seed, phase=1))) > healthy.loss + 0.5
    after = {name: trained(sick, step, loss, seed, phase=1) for name, step in steps.items()}
    print(healthy.busiest, healthy.loss, {name: (it.busiest, it.loss) for name, it in after.items()})
    assert after["none"].busiest > 4 and after["none"].loss > healthy.loss + 0.15
    for name in ("auxiliary loss", "bias"):
        assert after[name].busiest < 1.5 and after[name].loss < healthy.loss + 0.05, name
    moved = {
        name: np.abs(it.state.model_state["router_bias"]["layers"]["layer_0"]["feed_forward"]["router"]["bias"]).max()
        for name, it in after.items()
    }
    assert moved["none"] == moved["auxiliary loss"] == 0 and moved["bias"] > 1

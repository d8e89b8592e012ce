from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llama4_jax.app import load_experiment
from llama4_jax.config import MeshConfig, ObjectiveConfig
from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import put_batch, use_mesh
from llama4_jax.training.anomalies import NOT_FINITE
from llama4_jax.training.balancing import bias_balancing
from llama4_jax.training.objective import cross_entropy_objective
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama4_jax.training.state import abstract_state, create_state
from llama4_jax.training.step import make_train_step

FIXTURE = str(Path(__file__).parents[1] / "fixtures/tiny_experiment.py")
EXPERIMENT = load_experiment(FIXTURE, {})
MODEL = Llama4(EXPERIMENT.model, EXPERIMENT.execution)
OPTIMIZER = make_optimizer(EXPERIMENT.optimizer, 10)
MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(autouse=True)
def _mesh():
    with use_mesh(MESH):
        yield


@pytest.fixture(scope="module")
def batch():
    tokens = np.random.default_rng(0).integers(0, 320, (8, 33)).astype(np.int32)
    positions = np.tile(np.arange(32, dtype=np.int32), (8, 1))
    return put_batch(
        Batch(tokens[:, :-1], tokens[:, 1:], np.ones((8, 32), np.float32), positions, np.ones((8, 32), np.int32)), MESH
    )


def compiled_step(batch, trainable=".*", objective=None, microbatches=1):
    state = create_state(MODEL, OPTIMIZER, trainable, MESH, seed=0)
    objective = objective or cross_entropy_objective(MODEL, EXPERIMENT.objective)
    schedule = learning_rate_schedule(EXPERIMENT.optimizer, 10)
    step = make_train_step(objective, OPTIMIZER, schedule, state=state, mesh=MESH, seed=0, microbatches=microbatches)
    return state, step.lower(state, batch).compile()


@pytest.fixture(scope="module")
def full(batch):
    with use_mesh(MESH):
        return compiled_step(batch)


def test_the_whole_state_is_updated_in_place(full):
    state, step = full
    memory = step.memory_analysis()
    state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    assert memory.alias_size_in_bytes == state_bytes
    assert memory.output_size_in_bytes - state_bytes < 4096  # beside the state, only metrics come out


def test_steps_lower_the_loss_and_use_up_their_state(full, batch):
    state, step = full
    losses = []
    for _ in range(8):
        before = state
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
    assert losses[-1] < losses[0] - 0.2
    assert int(state.step) == 8
    assert metrics["expert_load"].shape == (2, 4)
    np.testing.assert_allclose(metrics["expert_load"].sum(axis=1), 1, rtol=1e-5)
    assert metrics["learning_rate"] == pytest.approx(float(learning_rate_schedule(EXPERIMENT.optimizer, 10)(7)))


@pytest.mark.parametrize(
    "trained, rule", [("attention", "adamw"), (".*", "muon"), pytest.param(".*", "adamw", marks=pytest.mark.slow)]
)
def test_a_step_that_is_left_out_changes_nothing_but_the_counts(batch, trained, rule):
    """A NaN in one row of one batch; the step after it is what it would have been as the first."""
    experiment = load_experiment(FIXTURE, {"model.router_bias": "true", "optimizer.rule": rule})
    model, optimizer = Llama4(experiment.model, experiment.execution), make_optimizer(experiment.optimizer, 10)
    state = create_state(model, optimizer, trained, MESH, seed=0)
    step = make_train_step(
        cross_entropy_objective(model, experiment.objective),
        optimizer,
        learning_rate_schedule(experiment.optimizer, 10),
        state=state,
        mesh=MESH,
        seed=0,
        balance=bias_balancing(experiment.model, experiment.objective, 10),
    )
    weights = np.ones((8, 32), np.float32)
    weights[3, 4] = np.nan
    before = jax.device_get(state)
    state, metrics = step(state, put_batch(batch.replace(loss_weights=weights), MESH))
    after = jax.device_get(state)
    assert metrics["anomaly"] == NOT_FINITE and not np.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 1
    assert after.step == 1 and after.usual == before.usual.replace(skipped=1)
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.opt_state, after.model_state),
        (before.params, before.opt_state, before.model_state),
    )
    _, first = step(create_state(model, optimizer, trained, MESH, seed=0), batch)
    _, second = step(state, batch)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert first[name] == second[name], "rates and moments count the updates made"


def test_only_what_matches_the_pattern_moves_and_has_moments(batch):
    state, step = compiled_step(batch, trainable="router")
    before = flatten_dict(jax.device_get(state.params), sep="/")
    assert len(jax.tree.leaves(state.opt_state[1][0].mu)) == 2
    state, _ = step(state, batch)
    after = flatten_dict(jax.device_get(state.params), sep="/")
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == state.trainable == {path for path in before if "router" in path}


def test_the_key_is_a_function_of_seed_and_step(batch):
    def objective(params, batch, key, model_state=None, frozen=None):
        number = jax.random.uniform(key)
        return 0.0 * jax.tree.leaves(params)[0].sum() + number, {"loss": number}

    state, step = compiled_step(batch, objective=objective)
    for count in range(2):
        state, metrics = step(state, batch)
        assert metrics["loss"] == jax.random.uniform(jax.random.fold_in(jax.random.key(0), count))


def test_a_created_state_is_what_the_abstract_one_says():
    abstract = abstract_state(MODEL, OPTIMIZER, ".*", MESH)
    state = create_state(MODEL, OPTIMIZER, ".*", MESH, seed=0)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)  # noqa: E731
    assert describe(state) == describe(abstract)


def test_microbatches_of_uneven_weight_give_the_whole_batchs_update(batch):
    """The balancing losses are left out: they are of each part by itself."""
    weights = np.ones((8, 32), np.float32)
    weights[1::4, 5:] = 0  # part 1 of 4 counts for less than the others
    weights[2::4] = 0  # part 2 for nothing
    batch = put_batch(batch.replace(loss_weights=weights), MESH)
    objective = cross_entropy_objective(MODEL, ObjectiveConfig(load_balance_weight=0, router_z_weight=0))
    results = []
    for parts in (1, 4):
        state, step = compiled_step(batch, objective=objective, microbatches=parts)
        results.append(step(state, batch))
    (whole, whole_metrics), (summed, summed_metrics) = results
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(summed_metrics[name], whole_metrics[name], rtol=1e-5)

    def first_moments(state):  # b1 times the clipped gradient
        return flatten_dict(state.opt_state[1][0].mu, sep="/")

    for path, expected in first_moments(whole).items():
        np.testing.assert_allclose(
            first_moments(summed)[path], expected, atol=1e-5 * np.abs(expected).max() + 1e-9, err_msg=path
        )

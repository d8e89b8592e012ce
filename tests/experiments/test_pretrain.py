"""The pod configurations fit the pod that their docstrings name; nothing of them is allocated here."""

import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from llama4_jax.app import load_experiment
from llama4_jax.model.llama4 import Llama4, abstract_params, logical_axes
from llama4_jax.named_configs import count_parameters
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import AXES
from llama4_jax.parallel.rules import named_shardings

CHIPS = 128  # of a v5p-256


def on_the_pod(name):
    experiment = load_experiment(str(Path(__file__).parents[2] / f"experiments/{name}.py"), {})
    sizes = {axis: getattr(experiment.mesh, axis) for axis in AXES}
    sizes["data"] = CHIPS // -math.prod(sizes.values())
    assert math.prod(sizes.values()) == CHIPS
    return experiment, AbstractMesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize("name", ["pretrain_scout", "pretrain_maverick"])
def test_model_and_batches_fit_the_mesh(name):
    experiment, mesh = on_the_pod(name)
    check_fit(mesh, experiment.model, experiment.execution, experiment.data)


@pytest.mark.parametrize("name, gigabytes", [("pretrain_scout", 13.5), ("pretrain_maverick", 50.1)])
def test_each_chip_holds_its_share_of_weights_moments_and_gradients(name, gigabytes):
    """As large as the docstring says, and hardly more than a 128th: no matrix is left whole on every chip."""
    experiment, mesh = on_the_pod(name)
    assert experiment.optimizer.rule == "adamw"
    model = Llama4(experiment.model, experiment.execution)
    params = abstract_params(model)
    shardings = named_shardings(params, logical_axes(model), mesh)
    held = jax.tree.map(lambda x, sharding: math.prod(sharding.shard_shape(x.shape)), params, shardings)
    bytes_on_a_chip = 16 * sum(jax.tree.leaves(held))  # weight, gradient and two moments in float32
    assert bytes_on_a_chip / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert bytes_on_a_chip < 1.01 * 16 * count_parameters(experiment.model).total / CHIPS

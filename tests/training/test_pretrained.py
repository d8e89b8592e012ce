"""Runs that start from weights."""

import dataclasses

import jax
import numpy as np
import pytest

import llama4_jax as l4
from llama4_jax.app import load_experiment
from llama4_jax.config import MeshConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params, init_params
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.training.loop import train
from llama4_jax.training.optimizer import make_optimizer
from llama4_jax.training.pretrained import with_pretrained
from llama4_jax.training.state import create_state
from tests.fixtures.tiny_experiment import get_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    config = get_config().model
    l4.save_pretrained(folder, config, init_params(Llama4(config), jax.random.key(42)))
    return folder


def fresh_state(experiment):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(experiment.optimizer, experiment.steps)
    return create_state(Llama4(experiment.model), optimizer, ".*", mesh, seed=0)


def test_the_parameters_are_the_folders_and_lie_where_they_belong(folder):
    experiment = get_config()
    before = fresh_state(experiment)
    state = with_pretrained(before, experiment.model, str(folder))
    expected = init_params(Llama4(experiment.model), jax.random.key(42))
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, before.params)))


def test_another_architecture_is_refused_by_its_fields(folder):
    experiment = get_config()
    other = dataclasses.replace(experiment.model, rope_theta=1234.0)
    with pytest.raises(UserError, match=r"model.rope_theta is .* there and 1234.0 here"):
        with_pretrained(fresh_state(experiment), other, str(folder))
    layers = dataclasses.replace(experiment.model, nope_layers=())
    with pytest.raises(UserError, match="layer_kinds"):
        with_pretrained(fresh_state(experiment), layers, str(folder))


def test_a_text_model_takes_the_text_of_a_multimodal_one_but_not_the_reverse(folder, tmp_path):
    experiment = get_config()
    vision = VisionConfig(hidden_size=8, num_layers=1, num_heads=2, mlp_size=32, image_size=8, patch_size=4, adapter_size=5)
    seeing = dataclasses.replace(experiment.model, vision=vision)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(Llama4(seeing)))
    l4.save_pretrained(tmp_path / "seeing", seeing, params)
    before = fresh_state(experiment)
    state = with_pretrained(before, experiment.model, str(tmp_path / "seeing"))
    text = {name: tree for name, tree in params.items() if name != "vision"}
    jax.tree.map(np.testing.assert_array_equal, state.params, text)
    with pytest.raises(UserError, match=r"model.vision is None there and VisionConfig"):
        with_pretrained(before, seeing, str(folder))


def test_a_run_starts_from_the_folder(folder, tmp_path):
    fixture = get_config.__code__.co_filename
    overrides = {"init_from": str(folder), "steps": "1", "optimizer.learning_rate": "1e-30", "optimizer.weight_decay": "0"}
    result = train(load_experiment(fixture, overrides), tmp_path, progress=False)
    expected = init_params(Llama4(get_config().model), jax.random.key(42))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), result.state.params, expected)

"""Training runs and Orbax folders as checkpoints. Conversions to and from them are in test_conversion.py."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.checkpoints.load import load_config, load_pretrained
from llama4_jax.checkpoints.model_json import config_from_json, config_to_json
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.checkpoints.orbax_writer import OrbaxWriter
from llama4_jax.checkpoints.readers import ParametersReader
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import CheckpointConfig, DataConfig, Experiment, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params, init_model_state
from llama4_jax.named_configs import list_named_configs, named_config
from llama4_jax.training.work_directory import WorkDirectory

CONFIG = ModelConfig(
    vocab_size=12, hidden_size=8, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=3, expert_ffn_size=6,
    dense_ffn_size=8, moe_interval=2, nope_layers=(1, 3), shared_expert=False, rope_scaling=RopeScaling(), temperature=None,
)  # fmt: skip


def random_params(config, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), abstract_params(Llama4(config)))


def make_run(folder, config, states):
    """A work directory as training leaves it, with these states by step."""
    WorkDirectory(folder, Experiment(config, DataConfig(sources=("x",))))
    checkpoints = RunCheckpoints(folder / "checkpoints", CheckpointConfig(keep=5))
    for step, state in states.items():
        checkpoints.save(step, state, {"rows": step}, {"of": "data"})
    checkpoints.wait()
    checkpoints.close()
    return folder


def refused(path, words):
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(path)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a model that only this project can hold, with the optimizer's arrays beside the parameters."""
    states = {}
    for step in (3, 12):
        params = random_params(CONFIG, step)
        states[step] = {"params": params, "opt_state": {"mu": params}, "step": jnp.asarray(step), "model_state": {}}
    return make_run(tmp_path_factory.mktemp("run"), CONFIG, states), states


def test_a_run_is_its_newest_step_and_any_step_can_be_named(run):
    folder, states = run
    assert load_config(folder) == CONFIG
    for path, step in ((folder, 12), (folder / "checkpoints" / "12", 12), (folder / "checkpoints" / "3", 3)):
        model, params = load_pretrained(path)
        assert model.config == CONFIG
        jax.tree.map(np.testing.assert_array_equal, params, states[step]["params"])


def test_parts_of_tensors_are_those_of_the_whole(run):
    with open_checkpoint(run[0]) as reader:
        for name, info in reader.tensors.items():
            index = tuple(slice(size // 3, size - size // 4) for size in info.shape)
            np.testing.assert_array_equal(reader.read(name, index), reader.read(name)[index], err_msg=name)


def test_a_router_bias_must_be_zero(tmp_path):
    config = dataclasses.replace(CONFIG, router_bias=True)
    params, model_state = random_params(config, 0), init_model_state(Llama4(config))
    zero = make_run(tmp_path / "zero", config, {1: {"params": params, "model_state": model_state}})
    assert load_pretrained(zero)[0].config == CONFIG
    moved = jax.tree.map(lambda x: x + 0.5, model_state)
    refused(make_run(tmp_path / "moved", config, {1: {"params": params, "model_state": moved}}), "router_bias/.* reaches 0.5")


def test_damage_is_named(run, tmp_path):
    for name, damage, words in (
        ("no_steps", lambda folder: shutil.rmtree(folder / "checkpoints"), "checkpoints: holds no checkpoint"),
        ("no_model", lambda folder: (folder / "experiment.json").write_text("{}"), "experiment.json: has no settings of a model"),
        ("no_json", lambda folder: (folder / "experiment.json").write_text("{"), "experiment.json: cannot be read as JSON"),
        ("field", lambda folder: change(folder, {"model.widgets": 3}), "experiment.json: ModelConfig has no widgets"),
        ("value", lambda folder: change(folder, {"model.num_heads": "x"}), "experiment.json: "),
        ("group", lambda folder: change(folder, {"model.rope_scaling": 3}), "experiment.json: "),
        ("shape", lambda folder: change(folder, {"model.vocab_size": 13}), r"embed/embedding has shape \(12, 8\), but .* \(13, 8\)"),
        ("missing", lambda folder: change(folder, {"model.shared_expert": True}), "shared_expert/.* is missing"),
        ("flipped", flip, r"checkpoints/12 is damaged: the content of state/.* is not what was written; name another step"),
        ("extra", lambda folder: change(folder, {"model.tie_embeddings": True}), "lm_head/kernel has no place"),
        ("arrays", lambda folder: clear(folder / "checkpoints" / "12" / "state"), "checkpoints/12/state: parameter .* cannot be read"),
    ):  # fmt: skip
        shutil.copytree(run[0], tmp_path / name)
        damage(tmp_path / name)
        refused(tmp_path / name, words)


def change(folder, settings):
    path = folder / "experiment.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name.rpartition(".")[0] not in settings}
    path.write_text(json.dumps(kept | settings))


def flip(folder):
    largest = max((folder / "checkpoints/12/state/ocdbt.process_0/d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def clear(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "_METADATA":
            path.unlink()


def test_a_damaged_folder_of_weights_is_named(tmp_path):
    reader = ParametersReader(CONFIG, random_params(CONFIG, 0))
    with OrbaxWriter(tmp_path / "good", CONFIG, reader.tensors) as writer:
        for name in reader.tensors:
            writer.write(name, reader.read(name))
        writer.finish({})
    assert load_config(tmp_path / "good") == CONFIG
    array = "params/final_norm.scale"
    for name, damage, words in (
        ("cut", lambda folder: (folder / array / "0").write_bytes(b"abc"), "parameter final_norm/scale cannot be read"),
        ("header", lambda folder: (folder / array / ".zarray").write_text("{}"), "parameter final_norm/scale cannot be read"),
        ("gone", lambda folder: shutil.rmtree(folder / array), "parameter final_norm/scale cannot be read"),
        ("tree", lambda folder: (folder / "params/_METADATA").write_text("{}"), "_METADATA: has no tree_metadata"),
        ("key", lambda folder: (folder / "params/_METADATA").write_text('{"tree_metadata": {"a": 3}}'), "without a path"),
        ("config", lambda folder: (folder / "config.json").write_text("{}"), "config.json: ModelConfig is no group"),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        damage(tmp_path / name)
        refused(tmp_path / name, words)


@pytest.mark.parametrize("name", [config.name for config in list_named_configs()])
def test_configurations_survive_json(name):
    config = named_config(name)
    assert config_from_json(json.loads(json.dumps(config_to_json(config))), "here") == config


def test_a_missing_chunk_is_an_error_and_not_zeros(tmp_path):
    config = dataclasses.replace(CONFIG, vision=VisionConfig(
        hidden_size=8, num_layers=2, num_heads=2, mlp_size=32, image_size=8, patch_size=4, adapter_size=5,
    ))  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, random_params(config, 0))
    reader = ParametersReader(config, params)
    with OrbaxWriter(tmp_path / "zeros", config, reader.tensors) as writer:
        for name in reader.tensors:
            writer.write(name, reader.read(name))
        writer.finish({})
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "zeros")[1], params)
    (tmp_path / "zeros/params/vision.layers.up.kernel/1.0.0").unlink()
    refused(tmp_path / "zeros", "parameter vision/layers/up/kernel cannot be read")

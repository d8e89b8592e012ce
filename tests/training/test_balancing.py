"""The router's bias: where it moves, when it stops, and that a whole run carries it."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llama4_jax.app import load_experiment
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import ModelConfig, ObjectiveConfig
from llama4_jax.inference.generator import Generator, Limits
from llama4_jax.model.llama4 import Llama4, init_model_state
from llama4_jax.processing.processor import Processor
from llama4_jax.training.balancing import bias_balancing, towards_even
from llama4_jax.training.loop import train

SMALL = {"vocab_size": 8, "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8, "num_experts": 4}


def test_the_bias_moves_by_the_rate_against_the_load():
    load = jnp.array([[0.7, 0.1, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
    np.testing.assert_array_equal(towards_even(load), [[-1, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize(
    ("layers", "moe_layers", "nope_interval"),
    [(12, (0, 2, 10, 11), 0), (8, (1, 2, 5, 6), 4)],
    ids=["one block of twelve, whose layer_10 sorts before layer_2", "two blocks of four"],
)
def test_each_layer_learns_from_its_own_load(layers, moe_layers, nope_interval):
    config = ModelConfig(**SMALL, num_layers=layers, moe_layers=moe_layers, nope_interval=nope_interval, router_bias=True)
    period, state = len(config.block_kinds), init_model_state(Llama4(config))
    load = jnp.full((4, 4), 0.2) + 0.2 * jnp.eye(4)  # the i-th MoE layer overloads expert i
    state = bias_balancing(config, ObjectiveConfig(bias_update_rate=0.5), 10)(state, load, jnp.int32(0))
    for i, layer in enumerate(moe_layers):
        bias = state["router_bias"]["layers"][f"layer_{layer % period}"]["feed_forward"]["router"]["bias"][layer // period]
        np.testing.assert_array_equal(bias, 0.5 - np.eye(4)[i])


def test_annealing_takes_the_bias_linearly_to_exactly_zero():
    config = ModelConfig(**SMALL, num_layers=1, nope_interval=0, router_bias=True)
    balance = jax.jit(bias_balancing(config, ObjectiveConfig(bias_update_rate=0.1, bias_anneal_fraction=0.4), 10))
    state, seen = init_model_state(Llama4(config)), []
    for step in range(10):
        state = balance(state, jnp.array([[1.0, 0, 0, 0]]), jnp.int32(step))
        seen.append(float(next(iter(jax.tree.leaves(state)))[0, 1]))
    np.testing.assert_allclose(seen, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.45, 0.3, 0.15, 0.0], atol=1e-6)
    assert seen[-1] == 0


def test_a_model_without_a_bias_has_nothing_to_move():
    assert bias_balancing(ModelConfig(), ObjectiveConfig(), 10) is None


@pytest.mark.slow
def test_a_run_with_everything_on_resumes_to_the_same_bits_and_exports_once_annealed(tmp_path):
    """Bias, capacity, jitter and both losses; taken up again from step 4 of 6, between which the bias is annealed."""
    fixture = str(Path(__file__).parents[1] / "fixtures/tiny_experiment.py")
    settings = {
        "model.router_bias": "true",
        "model.num_layers": "1",
        "objective.bias_update_rate": "0.05",
        "objective.bias_anneal_fraction": "0.5",
        "objective.capacity_factor": "1.0",
        "objective.router_jitter": "0.1",
        "checkpoint.every": "4",
        "evaluations.heldout.every": "6",
        "steps": "6",
    }
    straight = train(load_experiment(fixture, settings), tmp_path / "straight", progress=False)
    shutil.rmtree(tmp_path / "straight/checkpoints/6")
    resumed = train(load_experiment(fixture, settings), tmp_path / "straight", progress=False)
    for a, b in zip(jax.tree.leaves(straight.state), jax.tree.leaves(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)

    records = [json.loads(line) for line in (tmp_path / "straight/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 6
    for record in steps:
        assert np.shape(record["expert_load"]) == (1, 4)
        assert np.shape(record["router_entropy"]) == np.shape(record["router_drop_share"]) == (1,)
        # With a capacity of the mean, what is dropped is what lies above the mean.
        above = np.maximum(np.array(record["expert_load"]) - 0.25, 0).sum(axis=1)
        np.testing.assert_allclose(record["router_drop_share"], above, atol=4 / 256)

    assert all((bias == 0).all() for bias in flatten_dict(resumed.state.model_state).values())
    save_pretrained(tmp_path / "export", resumed.model.config, resumed.state.params, resumed.state.model_state)
    processor = Processor(resumed.corpus.tokenizer, resumed.model.config)
    generator = Generator(resumed.model, resumed.state.params, processor, model_state=resumed.state.model_state)
    assert 1 <= len(generator.complete(["def "], limits=Limits(max_new_tokens=2))[0].tokens) <= 2

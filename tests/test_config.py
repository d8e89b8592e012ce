"""Configurations refuse what cannot run, and find the shortest repeating block."""

import dataclasses

import pytest

from llama4_jax.config import (
    DataConfig,
    ExecutionConfig,
    Experiment,
    LayerKind,
    MeshConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RopeScaling,
    validated,
)
from llama4_jax.errors import UserError

LOCAL_MOE, FULL_MOE, LOCAL_DENSE = LayerKind(True, True), LayerKind(False, True), LayerKind(True, False)


@pytest.mark.parametrize(
    ("fields", "block"),
    [
        ({}, (LOCAL_MOE, LOCAL_MOE, LOCAL_MOE, FULL_MOE)),  # Scout
        ({"moe_interval": 2}, (LOCAL_DENSE, LOCAL_MOE, LOCAL_DENSE, FULL_MOE)),  # Maverick
        ({"moe_interval": 0, "nope_interval": 0}, (LOCAL_DENSE,)),  # a dense Llama
        ({"moe_layers": (), "nope_layers": ()}, (LOCAL_DENSE,)),
        ({"num_layers": 6}, (LOCAL_MOE, LOCAL_MOE, LOCAL_MOE, FULL_MOE, LOCAL_MOE, LOCAL_MOE)),  # nothing repeats
        ({"num_layers": 4, "moe_layers": (0, 2), "nope_interval": 0}, (LOCAL_MOE, LOCAL_DENSE)),
    ],
)
def test_the_block_is_the_shortest_that_repeats(fields, block):
    config = ModelConfig(**fields)
    assert config.block_kinds == block
    assert config.layer_kinds == block * (config.num_layers // len(block))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(num_heads=40, num_kv_heads=7), ("num_kv_heads=7", "num_heads=40")),
        (lambda: ModelConfig(head_dim=33), ("head_dim=33", "even")),
        (lambda: ModelConfig(experts_per_token=17), ("experts_per_token", "17")),
        (lambda: ModelConfig(moe_layers=(48,)), ("moe_layers", "48")),
        (lambda: ModelConfig(attention_chunk_size=0), ("attention_chunk_size", "0")),
        (lambda: RopeScaling(low_freq_factor=4, high_freq_factor=1), ("low_freq_factor=4",)),
        (lambda: ModelConfig(moe_interval=0, router_bias=True), ("router_bias", "none")),
        (lambda: ObjectiveConfig(bias_anneal_fraction=1.5), ("bias_anneal_fraction", "1.5")),
        (lambda: ObjectiveConfig(capacity_factor=0.0), ("capacity_factor", "0.0")),
        (lambda: ObjectiveConfig(router_jitter=1.0), ("router_jitter", "1.0")),
        (
            lambda: Experiment(ModelConfig(), DataConfig(), objective=ObjectiveConfig(bias_anneal_fraction=0.2)),
            ("bias_anneal_fraction=0.2", "router_bias=true"),
        ),
        (lambda: ExecutionConfig(compute_dtype="fp8"), ("compute_dtype", "fp8")),
        (lambda: MeshConfig(data=-1, fsdp=-1), ("data, fsdp",)),
        (lambda: MeshConfig(tensor=0), ("tensor", "0")),
        (lambda: OptimizerConfig(b2=1.0), ("b2", "1.0")),
        (lambda: Experiment(ModelConfig(), DataConfig(sequence_length=10_000)), ("10000", "8192")),
    ],
)
def test_bad_values_are_refused_in_one_line_with_the_value(make, words):
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_overrides_are_checked_after_assignment():
    experiment = Experiment(ModelConfig(), DataConfig())
    experiment.model.num_kv_heads = 7
    with pytest.raises(UserError, match="num_kv_heads=7"):
        validated(experiment)


def test_validated_is_a_deep_copy():
    experiment = Experiment(ModelConfig(), DataConfig())
    copy = validated(experiment)
    experiment.model.rope_theta = 1.0
    assert copy.model.rope_theta == 500_000.0


def test_every_model_field_takes_part_in_equality_and_hash():
    """Modules are compared by their config: a field left out would reuse another model's compiled program."""
    assert hash(ModelConfig()) == hash(ModelConfig())
    for field in dataclasses.fields(ModelConfig):
        assert field.compare and field.hash is None

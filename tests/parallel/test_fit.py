import dataclasses

import pytest
from jax.sharding import AbstractMesh, AxisType

from llama4_jax.config import DataConfig, ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import AXES

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, num_experts=4, expert_ffn_size=16,
    dense_ffn_size=24, moe_interval=2, attention_chunk_size=8,
)  # fmt: skip
DATA = DataConfig(batch_size=8, sequence_length=64)


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * len(AXES))


def check(mesh, model=None, data=None, **execution):
    model, data = dataclasses.replace(MODEL, **model or {}), dataclasses.replace(DATA, **data or {})
    check_fit(mesh, model, ExecutionConfig(**execution), data)


def test_what_divides_is_accepted():
    check(mesh_of())
    check(mesh_of(data=2, fsdp=2, expert=2, context=2, tensor=4))
    check(mesh_of(context=4), context_layout="zigzag")
    check(mesh_of(context=2), data={"sequence_length": 6}, model={"attention_chunk_size": 8})  # within one chunk: no edge
    check(mesh_of(context=3), data={"sequence_length": 12}, model={"attention_chunk_size": None})


@pytest.mark.parametrize(
    "sizes, changes, message",
    [
        ({"data": 3, "expert": 2}, {}, "DataConfig.batch_size=8 is not a multiple of the mesh's data=3 x expert=2"),
        ({"context": 3}, {}, "DataConfig.sequence_length=64 is not a multiple of the mesh's context=3"),
        ({"tensor": 8}, {}, "ModelConfig.num_kv_heads=4 is not a multiple of the mesh's tensor=8"),
        ({"tensor": 3}, {}, "ModelConfig.num_heads=8 is not a multiple of the mesh's tensor=3"),
        ({"fsdp": 64}, {"data": {"batch_size": 64}}, "ModelConfig.hidden_size=32 is not a multiple of the mesh's fsdp=64"),
        ({"expert": 8}, {}, "ModelConfig.num_experts=4 is not a multiple of the mesh's expert=8"),
        ({"tensor": 4}, {"model": {"vocab_size": 6}}, "ModelConfig.vocab_size=6 is not a multiple of the mesh's tensor=4"),
        ({"tensor": 4}, {"model": {"expert_ffn_size": 6}}, "ModelConfig.expert_ffn_size=6 is not a multiple of"),
        ({"tensor": 4}, {"model": {"dense_ffn_size": 6}}, "ModelConfig.dense_ffn_size=6 is not a multiple of"),
        (
            {"expert": 2, "tensor": 4},
            {"model": {"hidden_size": 30}},
            "ModelConfig.hidden_size=30 is not a multiple of the mesh's tensor=4",
        ),
        (
            {"context": 4},
            {"model": {"attention_chunk_size": 32}},
            "context=4 cuts DataConfig.sequence_length=64 into pieces of 16, across chunks of ModelConfig.attention_chunk_size=32"
            ": make it a multiple of 128, or context smaller",
        ),
        (
            {"context": 4},
            {"model": {"attention_chunk_size": 16}, "context_layout": "zigzag"},
            "context=4 cuts DataConfig.sequence_length=64 into pieces of 8, across chunks of ModelConfig.attention_chunk_size=16"
            ": make it a multiple of 128, or context smaller",
        ),
        (
            {"context": 4},
            {"data": {"sequence_length": 36}, "context_layout": "zigzag"},
            "DataConfig.sequence_length=36 is not a multiple of 8, the zigzag pieces of context=4",
        ),
    ],
)
def test_what_does_not_is_refused_in_one_line_with_its_numbers(sizes, changes, message):
    with pytest.raises(UserError) as error:
        check(mesh_of(**sizes), **changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)

"""The table between the common form and the parameters, in parts and whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.checkpoints.layout import layout, require_same_tensors
from llama4_jax.checkpoints.readers import leaves_by_path
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params
from llama4_jax.named_configs import named_config

# Every kind of tensor, in sizes that all differ.
CONFIG = ModelConfig(
    vocab_size=11, hidden_size=6, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=3, expert_ffn_size=5,
    dense_ffn_size=7, moe_interval=2, nope_interval=2, attention_bias=True,
    vision=VisionConfig(hidden_size=8, num_layers=2, num_heads=2, mlp_size=32, image_size=8, patch_size=4, adapter_size=5),
)  # fmt: skip
SHAPES = {path: leaf.shape for path, leaf in leaves_by_path(abstract_params(Llama4(CONFIG))).items()}


@st.composite
def parts(draw):
    """A tensor, and a part of its parameter."""
    placed = draw(st.sampled_from(layout(CONFIG)))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in SHAPES[placed.path]]
    return placed, tuple(slice(*end) for end in ends)


def numbered(shape):
    return np.arange(np.prod(shape)).reshape(shape)


def test_every_number_of_every_parameter_is_in_one_tensor():
    leaves = {path: np.full(shape, -1) for path, shape in SHAPES.items()}
    for placed in layout(CONFIG):
        whole, stored = tuple(slice(0, n) for n in SHAPES[placed.path]), numbered(placed.shape)
        before = leaves[placed.path].copy()
        placed.read_into(leaves[placed.path], whole, lambda index, stored=stored: stored[index])
        changed = leaves[placed.path][before != leaves[placed.path]]
        assert np.array_equal(np.sort(changed), np.arange(stored.size))
    assert all((leaf >= 0).all() for leaf in leaves.values())


@settings(max_examples=300, deadline=None)
@given(parts())
def test_a_part_of_a_parameter_reads_its_own_numbers_and_no_others(case):
    """So a host of a mesh reads the shards that it keeps: the argument for checkpoints larger than a host."""
    placed, at = case
    stored, whole = numbered(placed.shape), np.full(SHAPES[placed.path], -1)
    placed.read_into(whole, tuple(slice(0, n) for n in whole.shape), lambda index: stored[index])
    part, read = np.full([s.stop - s.start for s in at], -1), []

    def count(index):
        read.append(stored[index].size)
        return stored[index]

    placed.read_into(part, at, count)
    np.testing.assert_array_equal(part, whole[at])
    assert sum(read) == (part >= 0).sum()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_part_of_a_tensor_is_found_in_its_parameter(data):
    placed = data.draw(st.sampled_from(layout(CONFIG)))
    leaf = numbered(SHAPES[placed.path])
    whole = placed.read_from(lambda index: leaf[index])
    assert whole.shape == placed.shape
    ends = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in placed.shape]
    index = tuple(slice(*end) for end in ends)[: data.draw(st.integers(0, len(ends)))]
    np.testing.assert_array_equal(placed.read_from(lambda at: leaf[at], index), whole[index])


@pytest.mark.parametrize("name", ["scout-17b-16e", "maverick-17b-128e"])
def test_the_published_models_are_whole_in_the_table(name):
    config = named_config(name)
    numbers = sum(int(np.prod(placed.shape)) for placed in layout(config))
    assert numbers == {"scout-17b-16e": 108_641_793_536, "maverick-17b-128e": 401_583_781_376}[name]


def test_differences_are_named():
    found = {placed.name: TensorInfo(placed.shape, np.dtype(np.float32), f"file: {placed.name}") for placed in layout(CONFIG)}
    require_same_tensors(found, CONFIG, "here")
    for change, words in (
        ({"model.norm.weight": None}, "here: tensor model.norm.weight is missing"),
        ({"other": TensorInfo((1,), np.dtype(np.float32), "file: other")}, "file: other has no place in this model"),
        (
            {"model.norm.weight": TensorInfo((7,), np.dtype(np.float32), "file: norm")},
            r"file: norm has shape \(7,\), .* \(6,\)",
        ),
    ):
        changed = {name: info for name, info in (found | change).items() if info is not None}
        with pytest.raises(UserError, match=words):
            require_same_tensors(changed, CONFIG, "here")

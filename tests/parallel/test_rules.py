import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from llama4_jax.config import ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params, logical_axes
from llama4_jax.parallel.mesh import AXES
from llama4_jax.parallel.rules import RULES, named_shardings


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES, (AxisType.Auto,) * len(AXES))


def spec_of(shape, logical, mesh):
    shapes = {"w": jax.ShapeDtypeStruct(shape, "float32")}
    return named_shardings(shapes, {"w": P(*logical)}, mesh)["w"].spec


def test_an_expert_weight_spends_expert_on_its_experts_and_a_dense_one_on_a_dimension():
    mesh = mesh_of(fsdp=4, expert=2, tensor=2)
    assert spec_of((16, 2, 512, 1024), ("experts", None, "embed", "ffn"), mesh) == P("expert", None, "fsdp", "tensor")
    assert spec_of((512, 1024), ("embed", "ffn"), mesh) == P("fsdp", ("tensor", "expert"))
    assert spec_of((1024, 512), ("ffn", "embed"), mesh) == P(("tensor", "expert"), "fsdp")


def test_heads_that_expert_does_not_divide_leave_it_to_the_embedding_dimension():
    mesh = mesh_of(fsdp=2, expert=4, tensor=2)
    assert spec_of((512, 6, 64), ("embed", "heads", "head_dim"), mesh) == P(("fsdp", "expert"), "tensor", None)


def test_every_parameter_of_scout_divides_over_a_pod():
    """128 chips as 16 x 8, the mesh of the compiled prototype: no shard is smaller than a tile's 128 lanes or 8 rows."""
    model = Llama4(ModelConfig(), ExecutionConfig())
    params = abstract_params(model)
    shardings = named_shardings(params, logical_axes(model), mesh_of(fsdp=16, expert=8))
    down = shardings["layers"]["layer_0"]["feed_forward"]["shared_expert"]["down"]["kernel"]
    assert down.spec == P(None, ("tensor", "expert"), "fsdp")
    largest = max(
        math.prod(s.shard_shape(p.shape)) for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    )
    assert largest * 128 == 12 * 16 * 5120 * 2 * 8192  # gate and up of all experts in one of the scan's four stacks


@given(
    sizes=st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 4]) for axis in AXES}),
    logical=st.lists(st.sampled_from(sorted({name for name, _ in RULES} | {""})), max_size=4, unique=True),
    data=st.data(),
)
def test_a_sharding_divides_and_uses_no_axis_twice_or_the_parameter_is_named(sizes, logical, data):
    mesh = mesh_of(**sizes)
    shape = tuple(data.draw(st.sampled_from([1, 6, 12, 16, 144])) for _ in logical)
    try:
        spec = spec_of(shape, [name or None for name in logical], mesh)
    except UserError as error:
        assert "parameter w: dimension" in str(error) and "is not a multiple of the mesh's" in str(error)
        return
    used = [axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ())]
    assert len(used) == len(set(used))
    for size, axes in zip(shape, spec, strict=True):
        assert size % math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())) == 0


def test_a_dimension_that_no_rule_divides_is_named_with_its_axis():
    with pytest.raises(UserError, match=r"parameter w: dimension 1 \(kv_heads, 2\) is not a multiple of the mesh's tensor=4"):
        spec_of((64, 2, 8), ("embed", "kv_heads", "head_dim"), mesh_of(tensor=4))


def test_an_unknown_logical_name_is_a_programming_error():
    with pytest.raises(ValueError, match="no rule for logical axes"):
        spec_of((4,), ("emdeb",), mesh_of())

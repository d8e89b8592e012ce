"""Which implementation runs, and that nothing is slower than it seems without a word."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch


def kernel(x):
    if x.ndim != 1:
        raise NotImplementedError(f"double: one axis, not {x.ndim}")
    return "kernel"


IMPLEMENTATIONS = {"kernel": kernel, "xla": lambda x: "xla"}
AUTO = {"cpu": ("kernel", "xla")}


def choose(name="auto", auto=AUTO):
    return dispatch.choose("double", IMPLEMENTATIONS, auto, name)


def test_auto_takes_the_best_and_says_why_when_it_cannot():
    assert choose()(np.zeros(3)) == "kernel"
    with pytest.warns(UserWarning, match="one axis, not 2; computed by XLA instead"):
        assert choose()(np.zeros((3, 3))) == "xla"


def test_a_named_implementation_refuses_and_never_falls_back():
    with pytest.raises(NotImplementedError, match="one axis, not 2"):
        choose("kernel")(np.zeros((3, 3)))


def test_an_unknown_name_or_platform_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no implementation 'kernle'; choose from auto, kernel, xla"):
        choose("kernle")
    with pytest.raises(ValueError, match="no default implementation on 'cpu'"):
        choose(auto={"tpu": ("kernel",)})


def test_the_platform_is_that_of_the_mesh_also_where_its_devices_are_not_here():
    assert dispatch.platform() == "cpu"
    tpu = AbstractDevice(device_kind="TPU v5p", num_cores=2, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=tpu)):
        assert dispatch.platform() == "tpu"


def test_a_kernel_is_not_left_to_xla_to_split():
    mesh = AbstractMesh((2, 1), ("data", "expert"), (AxisType.Auto,) * 2)
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.warns(UserWarning, match="XLA cannot split a kernel over the mesh's data"),
    ):
        assert choose()(np.zeros(3)) == "xla"


def test_inside_shard_map_a_kernel_is_whole():
    seen = []
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))

    def on_shard(x):
        seen.append(choose()(x))
        return x

    jax.shard_map(on_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(np.zeros(3))
    assert seen == ["kernel"]

import jax
import pytest

from llama4_jax.config import MeshConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import AXES, make_mesh


def test_all_axes_exist_and_are_auto():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=3), "mesh data=3 does not fit 8 device(s): make one axis -1, such as data, or have 3 devices"),
        (MeshConfig(data=-1, fsdp=3), "mesh data=-1 x fsdp=3 does not fit 8 device(s): the sizes must divide 8"),
        (
            MeshConfig(data=4, fsdp=4),
            "mesh data=4 x fsdp=4 does not fit 8 device(s): make one axis -1, such as data, or have 16",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_their_numbers(config, message):
    with pytest.raises(UserError) as error:
        make_mesh(config, [None] * 8)
    assert str(error.value).startswith(message)

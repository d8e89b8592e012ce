import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.parallel.mesh import AXES
from llama4_jax.parallel.table import sharding_table


def test_a_line_for_each_parameter_with_its_bytes_on_one_device():
    mesh = AbstractMesh((1, 2, 4, 1, 2, 1), AXES, (AxisType.Auto,) * len(AXES))

    def param(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    params = {
        "head": {"kernel": param((512, 1024), jnp.float32, ("fsdp", "expert"), None)},
        "norm": {"scale": param((512,), jnp.bfloat16)},
    }
    assert sharding_table(params, mesh).splitlines() == [
        "mesh: data=2 x fsdp=4 x expert=2, 16 device(s)",
        "parameter    shape       dtype     sharding          bytes a device",
        "head/kernel  512 x 1024  float32   fsdp+expert, -           262,144",
        "norm/scale   512         bfloat16  replicated                 1,024",
        "total                                                       263,168",
    ]

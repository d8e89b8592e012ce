import json
import os
import subprocess
import sys

import jax
import pytest

from llama4_jax.config import MeshConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import AXES, make_mesh
from pallas_kernels import aot


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


SLICES = """
import json
from jax.experimental import topologies
from llama4_jax.config import MeshConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel.mesh import make_mesh

def described(config, slices):
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2", num_slices=slices).devices
    try:
        mesh = make_mesh(config, devices[::-1])
    except UserError as error:
        return str(error)
    return [sorted({getattr(device, "slice_index", 0) for device in block.flat}) for block in mesh.devices]

print(json.dumps([
    described(MeshConfig(dcn_data=3, fsdp=4), 3),
    described(MeshConfig(dcn_data=-1, data=1, fsdp=4, tensor=2), 2),
    described(MeshConfig(dcn_data=2, fsdp=4), 1),
    described(MeshConfig(fsdp=4), 2),
    described(MeshConfig(dcn_data=4), 2),
]))
"""


@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")
def test_only_dcn_data_goes_from_slice_to_slice():
    """On the devices of real topologies, in whatever order they come; one slice may be cut by dcn_data too."""
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, "-c", SLICES], env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr[-2000:]
    three, two, one, *refused = json.loads(child.stdout.splitlines()[-1])
    assert (three, two, one) == ([[0], [1], [2]], [[0], [1]], [[0], [0]])
    because = "the devices are 2 slices of 8, joined by a slow network that only dcn_data goes over; make dcn_data=2"
    assert refused == [f"mesh data=-1 x fsdp=4: {because}", f"mesh dcn_data=4 x data=-1: {because}"]

"""Copies that differ are told, with the device that is wrong; copies that are equal never are."""

import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llama4_jax.config import MeshConfig
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.training.replicas import Replicas, checksum


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint32", "float8_e4m3fn"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_one_flipped_bit_changes_the_checksum(dtype, data):
    """Also of a number that is NaN, infinite or minus zero."""
    dtype = jnp.dtype(dtype)
    size = data.draw(st.integers(1, 40))
    raw = np.frombuffer(data.draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize)), np.uint8).copy()
    before = int(checksum(jnp.asarray(raw.view(dtype))))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert int(checksum(jnp.asarray(raw.view(dtype)))) != before


def test_one_device_has_no_copies():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = {"x": jax.device_put(jnp.ones(3), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))}
    assert not Replicas(mesh, state).exist


ON_EIGHT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from llama4_jax.config import MeshConfig
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.training.replicas import Replicas, ReplicasDiffer

mesh = make_mesh(MeshConfig(data=4, fsdp=2))
specs = {"whole": P(), "split": P(("fsdp",)), "all": P(("data", "fsdp")), "step": P()}
values = {"whole": np.arange(24, dtype=np.float32).reshape(4, 6), "split": np.linspace(0, 1, 16), "all": np.arange(8), "step": np.int32(3)}
state = {name: jax.device_put(jnp.asarray(values[name]), NamedSharding(mesh, specs[name])) for name in specs}
replicas = Replicas(mesh, state)
assert replicas.exist
replicas.require_equal(state, "after step 3")

def flipped(name, *ids):
    x = state[name]
    shards = []
    for shard in x.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id in ids:
            data.reshape(-1).view(np.uint8)[1] ^= 8
        shards.append(jax.device_put(data, shard.device))
    return state | {name: jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)}

def told(broken):
    try:
        replicas.require_equal(broken, "after step 3")
    except ReplicasDiffer as error:
        return str(error)

by_id = {device.id: device for device in jax.devices()}
assert "after step 3: whole on device 5 of process 0. Nothing" in told(flipped("whole", 5)), told(flipped("whole", 5))
assert "split on device 2 of process 0. Nothing" in told(flipped("split", 2))
assert "step on device 7 of process 0, device 0" in told(flipped("step", 0, 7)) or "step on device 0 of process 0, device 7" in told(flipped("step", 0, 7))
tie = told(flipped("split", *(mesh.devices[0, i, 0, 0, 0, 0].id for i in (0, 1))))
assert tie.count("device ") == 4, tie  # two against two: any of the four
assert told(flipped("all", 3)) is None, "an array without copies cannot be compared"
print("proved")
"""


def test_the_device_that_is_wrong_is_named_on_any_axis_of_the_mesh():
    """Four copies over data; two shards over fsdp. One wrong, two wrong alike, two against two, and an array without copies."""
    process = subprocess.run([sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, timeout=120)
    assert process.stdout.strip() == "proved", process.stderr[-3000:]

"""Options reach the compiler that knows them, and no other."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llama4_jax.config import MeshConfig
from llama4_jax.parallel.compiler_options import compiler_options
from llama4_jax.parallel.mesh import make_mesh
from pallas_kernels import aot

PROGRAM = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from llama4_jax.config import MeshConfig
from llama4_jax.parallel.compiler_options import compiler_options
from llama4_jax.parallel.mesh import make_mesh

mesh = make_mesh(MeshConfig(expert=-1, data=1), topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices)

def there_and_work(x, w):
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True) + jnp.tanh(x @ w) @ w

rows = NamedSharding(mesh, P("expert"))
x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=s) for shape, s in (((8192, 1024), rows), ((1024, 1024), NamedSharding(mesh, P()))))
mapped = jax.shard_map(there_and_work, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P("expert"))
print(jax.jit(mapped, compiler_options=compiler_options(mesh)).lower(x, w).compile().as_text())
"""  # fmt: skip


def test_other_platforms_and_meshes_without_experts_get_none():
    assert compiler_options(make_mesh(MeshConfig(), jax.devices()[:1])) == {}
    tpu = np.array([SimpleNamespace(platform="tpu")])
    assert compiler_options(SimpleNamespace(devices=tpu, shape={"expert": 1})) == {}


@pytest.mark.skipif(not aot.available(), reason="needs pip install libtpu")
def test_all_to_all_runs_beside_a_matmul_on_tpu():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    output = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-2000:]
    entry = output.stdout[output.stdout.index("ENTRY") :]
    started, ended = entry.index("all-to-all-start("), entry.index("all-to-all-done(")
    assert "tanh" in entry[started:ended]

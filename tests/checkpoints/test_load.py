"""Parameters go from any format straight to where they live."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.checkpoints.conversion import convert
from llama4_jax.checkpoints.load import load_params, load_pretrained
from llama4_jax.checkpoints.readers import ParametersReader
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import MeshConfig, ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params
from llama4_jax.parallel.mesh import make_mesh

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=4, num_experts=4, expert_ffn_size=8,
    dense_ffn_size=8, moe_interval=2, nope_interval=2, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2,
    vision=VisionConfig(hidden_size=16, num_layers=2, num_heads=4, mlp_size=64, image_size=8, patch_size=4, adapter_size=8),
)  # fmt: skip
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}


def random_params(config):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), abstract_params(Llama4(config)))


def test_on_eight_devices_each_shard_is_read_once_and_nothing_else(tmp_path):
    save_pretrained(tmp_path / "hf", CONFIG, random_params(CONFIG))
    convert(tmp_path / "hf", tmp_path / "orbax", format="orbax")
    command = [sys.executable, Path(__file__).with_name("load_on_eight_devices.py"), tmp_path / "hf", tmp_path / "orbax"]
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert output.returncode == 0, output.stderr[-3000:]
    records = [json.loads(line) for line in output.stdout.splitlines()]
    assert len(records) == 6
    for record in records:
        assert record["read"] == record["shards"]


def test_any_reader_gives_parameters():
    params = random_params(CONFIG)
    loaded = load_params(ParametersReader(CONFIG, params), dtype="bfloat16")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), params, loaded)


def test_a_mesh_that_does_not_divide_is_refused_by_parameter(tmp_path):
    config = dataclasses.replace(CONFIG, vision=None)
    save_pretrained(tmp_path / "hf", config, random_params(config))
    mesh = make_mesh(MeshConfig())
    _, params = load_pretrained(tmp_path / "hf", mesh=mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(params))
    abstract = jax.sharding.AbstractMesh((1, 1, 1, 1, 1, 3), ("dcn_data", "data", "fsdp", "context", "expert", "tensor"))
    with pytest.raises(UserError, match=r"parameter .* is not a multiple of the mesh's tensor=3"):
        load_pretrained(tmp_path / "hf", mesh=abstract)


MEASURED = """
import re, sys
from pathlib import Path
import jax, ml_dtypes, numpy as np
from llama4_jax.checkpoints import huggingface_writer as writer
from llama4_jax.checkpoints.conversion import convert
from llama4_jax.checkpoints.layout import layout
from llama4_jax.checkpoints.load import load_pretrained
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig

def memory(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def added(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    kept = work()
    return memory("VmHWM") - before, kept

config = ModelConfig(
    vocab_size=4096, hidden_size=1024, num_layers=10, num_heads=8, num_kv_heads=2, head_dim=128, num_experts=8,
    expert_ffn_size=2048, dense_ffn_size=4096,
)
bfloat16, folder = np.dtype(ml_dtypes.bfloat16), Path(sys.argv[1])
tensors = {placed.name: TensorInfo(placed.shape, bfloat16, placed.name) for placed in layout(config)}
writer.MAX_SHARD_BYTES = 2**28
with writer.HuggingFaceWriter(folder / "model", config, tensors) as files:
    for name, info in tensors.items():
        files.write(name, np.full(info.shape, 0.5, bfloat16))
    files.finish({})
jax.devices()
converting, _ = added(lambda: convert(folder / "model", folder / "again"))
loading, params = added(lambda: load_pretrained(folder / "again"))
total, largest = (f(map(writer.nbytes, tensors.values())) for f in (sum, max))
print(total, largest, converting, loading)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_parameters_and_one_tensor(tmp_path):
    """Of a checkpoint of a gigabyte; llama4_jax/checkpoints/README.md has the figures of a larger one."""
    output = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert output.returncode == 0, output.stderr[-3000:]
    total, largest, converting, loading = map(int, output.stdout.split()[-4:])
    assert total > 2**30 > 8 * largest
    spare = 2**27  # libraries loaded meanwhile, blocks of the checks
    assert converting < largest + spare
    assert 0.9 * total < loading < total + largest + spare

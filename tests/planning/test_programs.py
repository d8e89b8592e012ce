"""A whole layer of Scout's width trains through this project's kernels: it compiles for TPUs that are not here."""

import pytest

from pallas_kernels import aot

# The layers of one repeating block, three with RoPE and one without, forward and backward, on 16 devices: 8,192 tokens each.
TOPOLOGIES = "v5p:2x2x4", "v6e:4x4", "tpu7x:2x2x2"
MESHES = {
    "expert and context": {"mesh.fsdp": "4", "mesh.expert": "2", "mesh.context": "2", "data.sequence_length": "16384"},
    "fsdp and expert": {"mesh.fsdp": "4", "mesh.expert": "4", "data.sequence_length": "8192"},
}


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tpu", TOPOLOGIES)
def test_a_block_of_scout_layers_compiles_with_its_kernels(tpu, mesh):
    rows = {"data.batch_size": str(16 * 8192 // int(MESHES[mesh]["data.sequence_length"]))}
    settings = {"data.prepared": "none", "data.sources": "text", "execution.attention": "tpu", "execution.expert_ffn": "tpu"}
    settings |= rows | MESHES[mesh]
    options = {"config": "experiments/pretrain_scout.py", "settings": settings, "model": {"num_layers": 4}}
    (outcome,) = aot.compile_for(tpu, [aot.Request("llama4_jax.planning.programs:case", options)], timeout=1500)
    assert outcome.error is None, outcome.error

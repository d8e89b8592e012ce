"""A whole layer of Scout's width trains through this project's kernels: it compiles for TPUs that are not here."""

import pytest

from pallas_kernels import aot

# The layers of one repeating block, three with RoPE and one without, forward and backward, on four chips.
ON_FOUR_CHIPS = {"data.batch_size": "2", "data.sequence_length": "16384", "data.prepared": "none", "data.sources": "text"}
MESHES = {
    "expert and context": {"mesh.fsdp": "1", "mesh.expert": "2", "mesh.context": "2"},
    "fsdp and expert": {"mesh.fsdp": "2", "mesh.expert": "2"},
}


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tpu", ["v5p", "v6e", "tpu7x"])
def test_a_block_of_scout_layers_compiles_with_its_kernels(tpu, mesh):
    settings = {**ON_FOUR_CHIPS, **MESHES[mesh], "execution.attention": "tpu", "execution.expert_ffn": "tpu"}
    options = {"config": "experiments/pretrain_scout.py", "settings": settings, "model": {"num_layers": 4}}
    (outcome,) = aot.compile_for(tpu, [aot.Request("llama4_jax.planning.programs:case", options)], timeout=1500)
    assert outcome.error is None, outcome.error

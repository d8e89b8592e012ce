"""A block of layers of full width, compiled for TPUs that are not here through this project's kernels: what it does and sends.

Each compilation takes some five minutes of a core, whatever the width: what costs is the number of kernels and fusions.
"""

import pytest

from llama4_jax.planning import plans
from llama4_jax.planning.compiler import Job
from pallas_kernels import aot

SCOUT, MAVERICK = "experiments/pretrain_scout.py", "experiments/pretrain_maverick.py"
CONTEXT = {"mesh.fsdp": "4", "mesh.expert": "2", "mesh.context": "2", "data.sequence_length": "16384", "data.batch_size": "8"}
EXPERT = {"mesh.fsdp": "4", "mesh.expert": "4", "data.batch_size": "16"}
CASES = {
    "experts come to the tokens": (SCOUT, "v5p:2x2x4", 1, {"mesh.fsdp": "2", "data.batch_size": "128", "execution.loss_block_size": "256"}),
    "rows go to the experts": (MAVERICK, "v5p:2x2x4", 1, {"mesh.fsdp": "1", "mesh.expert": "16", "data.batch_size": "32"}),
    "two slices": (SCOUT, "v5p:2x2x2", 2, {"mesh.dcn_data": "2", "mesh.fsdp": "2", "mesh.expert": "4", "data.batch_size": "64"}),
    "v5p, context": (SCOUT, "v5p:2x2x4", 1, CONTEXT),
    "v6e, context": (SCOUT, "v6e:4x4", 1, CONTEXT),
    "v6e, experts": (SCOUT, "v6e:4x4", 1, EXPERT),
    "tpu7x, context": (SCOUT, "tpu7x:2x2x2", 1, CONTEXT),
    "tpu7x, experts": (SCOUT, "tpu7x:2x2x2", 1, EXPERT),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize("case", CASES)
def test_a_block_of_layers_does_and_sends_little_more_than_it_must(case):
    """FLOPs: at most four thirds of the model's, for layers that are computed twice. Rows that go to experts: a tenth more than
    the least, which is each row five times (there, back, there again for the recomputation, and both gradients). Between slices:
    gradients alone."""
    config, topology, slices, settings = CASES[case]
    settings = {"data.prepared": "none", "data.sources": "text", "model.num_layers": "4"} | settings
    found = plans.make(Job(config, topology, slices, settings=settings))
    measured = found.measurement
    assert found.fits and 1 < measured.flops / found.model_flops < 4 / 3
    sent = {kind: sum(x.sent for x in measured.exchanges if x.kind == kind) for kind in ("all-to-all", "all-gather")}
    assert (sent["all-to-all"] > 0) == (config == MAVERICK)
    if config == MAVERICK:
        layers, tokens, row = 2, found.tokens / found.devices, 5120 * 2
        assert 1 <= sent["all-to-all"] / (5 * layers * tokens * row * 15 / 16) < 1.1
    between = sum(x.sent for x in measured.exchanges if x.slow)
    assert between < 1.1 * measured.memory.arguments["parameters"] and (between > 0) == (slices > 1)

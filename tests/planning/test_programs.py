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
# Config, topology, slices, layers whose rows go to experts, settings.
CASES = {
    "experts come to the tokens": (SCOUT, "v5p:2x2x4", 1, 0, {"mesh.fsdp": "2", "data.batch_size": "128", "execution.loss_block_size": "256"}),
    "rows go to the experts": (MAVERICK, "v5p:2x2x4", 1, 2, {"mesh.fsdp": "1", "mesh.expert": "16", "data.batch_size": "32"}),
    "two slices": (SCOUT, "v5p:2x2x2", 2, 0, {"mesh.dcn_data": "2", "mesh.fsdp": "2", "mesh.expert": "4", "data.batch_size": "64"}),
    "v5p, context": (SCOUT, "v5p:2x2x4", 1, 0, CONTEXT),
    "v6e, context": (SCOUT, "v6e:4x8", 1, 0, CONTEXT | {"mesh.fsdp": "8", "data.batch_size": "16"}),
    "v6e, experts": (SCOUT, "v6e:4x4", 1, 0, EXPERT),
    "tpu7x, context": (SCOUT, "tpu7x:2x2x2", 1, 0, CONTEXT),
    "tpu7x, experts": (SCOUT, "tpu7x:2x2x2", 1, 0, EXPERT),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")
@pytest.mark.parametrize("case", CASES)
def test_a_block_of_layers_does_and_sends_little_more_than_it_must(case):
    """FLOPs: at most four thirds of the model's, for layers that are computed twice. Rows that go to experts: a tenth more than
    the least, which is each row five times (there, back, there again for the recomputation, and both gradients). Between slices:
    each gradient once, in bfloat16."""
    config, topology, slices, layers, settings = CASES[case]
    settings = {"data.prepared": "none", "data.sources": "text", "model.num_layers": "4"} | settings
    found = plans.make(Job(config, topology, slices, settings=settings))
    measured = found.measurement
    assert found.fits and 1 < measured.flops / found.model_flops < 4 / 3
    least = 5 * layers * found.tokens / found.devices * 15 / 16 * 5120 * 2  # bytes; 15 of 16 shards are not a row's own
    assert least <= sum(x.sent for x in measured.exchanges if x.kind == "all-to-all") <= 1.1 * least
    gradients = measured.memory.arguments["parameters"] / 2
    between = sum(x.sent for x in measured.exchanges if x.slow)
    assert between == pytest.approx(gradients * 2 * (slices - 1) / slices, rel=0.01)

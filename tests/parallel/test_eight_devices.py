"""Any mesh gives the numbers of one device, and sends what it should. The work is in eight_devices.py, in a process that has
eight devices; without --run-slow it goes through two meshes only, which between them have every axis but `data`, both
exchanges of the experts, and the zigzag ring."""

import importlib.util
from pathlib import Path

import pytest

from llama4_jax.parallel.expert_parallel import SPARE
from tests.parallel.on_eight_devices import run

SCRIPT = Path(__file__).with_name("eight_devices.py")
QUICK = ("context_expert_tensor_zigzag", "dcn_data_fsdp_expert")


def cases() -> dict:
    spec = importlib.util.spec_from_file_location("eight_devices", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CASES


CASES = cases()
SLOW = tuple(name for name in CASES if name not in QUICK)


def records_of(*arguments):
    return {record["case"]: record for record in run(SCRIPT, *arguments)}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return records_of(tmp_path_factory.mktemp("checkpoints"), *QUICK)


@pytest.fixture(scope="module")
def slow_records():
    return records_of("-", *SLOW)


@pytest.mark.parametrize("case", QUICK)
def test_loss_load_and_every_gradient_equal_one_device(records, case):
    assert records[case]["error"] < 1e-5, records[case]["worst"]


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_loss_load_and_every_gradient_equal_one_device_on_all_meshes(slow_records, case):
    assert slow_records[case]["error"] < 1e-5, slow_records[case]["worst"]


def test_the_meshes_are_each_axis_alone_and_ten_combinations():
    axes = [frozenset(axis for axis, size in sizes.items() if size > 1) for sizes, _ in CASES.values()]
    assert {axis for mesh in axes if len(mesh) == 1 for axis in mesh} == {
        "dcn_data", "data", "fsdp", "context", "expert", "tensor"
    }  # fmt: skip
    assert len({mesh for mesh in axes if len(mesh) > 1}) >= 10


def test_the_batch_is_a_hard_one(records):
    """Packed, padded, with experts that nobody chose and one shard that needs a second round; and without near ties."""
    batch = records["batch"]
    assert batch["margin"] > 1e-4
    assert max(batch["documents"]) > 3 and batch["padding"] > 0.1
    assert min(batch["load"]) == 0
    for shards in (2, 4):
        assert sum(batch["load"][: len(batch["load"]) // shards]) * shards > SPARE * 1.1


def test_attention_within_chunks_sends_nothing_and_a_ring_only_passes_on(records):
    sent = records["collectives"]
    assert sent["local"] == sent["local_zigzag"] == []
    assert sent["ring"] == sent["zigzag"] == ["collective-permute"]
    assert sent["gathered"] == ["all-gather", "reduce-scatter"]
    assert sent["no_promise"] == ["collective-permute"]


def test_only_the_layer_without_rope_sends_in_its_attention(records):
    sent = records["collectives"]
    assert sent["in_the_model"] == sent["in_the_model_zigzag"] == ["layer_1"]
    assert sent["in_the_model_without_the_promise"] == ["layer_0", "layer_1"]


def test_tokens_travel_by_the_exchange_that_was_asked_for(records):
    sent = records["collectives"]
    assert sent["all_to_all"] == ["all-reduce", "all-to-all"]  # the all-reduce agrees on the number of rounds
    assert sent["all_gather"] == ["all-gather", "reduce-scatter"]
    assert sent["gather_weights"] == ["all-gather"]


@pytest.mark.parametrize("case, shares", [("read", [1, 1 / 8]), ("read_zigzag", [1 / 4, 1 / 8])])
def test_prompts_and_their_cache_lie_over_context(records, case, shares):
    """Slots of the layer with RoPE on all shards of `context`, those of the NoPE layer split."""
    assert records[case]["error"] < 1e-5
    assert records[case]["held"] == shares


def test_a_zigzag_that_cuts_chunks_reads_and_decodes_as_well(records):
    """Pieces of four places, chunks of eight: the last chunk lies on two shards."""
    assert records["read_cut_chunks"]["error"] < 1e-5


def test_decoding_over_context_sends_no_keys(records):
    assert records["read"]["collectives"] == ["all-reduce"]


def test_a_projections_weight_is_gathered_and_its_gradient_scattered(records):
    assert records["collectives"]["projection"] == ["all-gather", "reduce-scatter"]


def test_a_step_compiles_once_and_uses_up_its_state(records):
    assert records["train"]["compilations"] == 1 and records["train"]["step"] == 2
    assert records["train"]["donated"]


def test_weights_are_split_and_moments_lie_with_them(records):
    assert records["train"]["split"] > 10
    assert records["train"]["moments_follow"]


def test_a_checkpoint_of_one_mesh_restores_bit_for_bit_on_another(records):
    assert records["restored"] == {"case": "restored", "equal": True, "placed": True}

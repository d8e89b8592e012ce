"""What is read out of compiled programs is what they do: programs for v5e whose FLOPs and bytes are known by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import aot

pytestmark = pytest.mark.skipif(not aot.available(), reason="libtpu is not installed (pip install libtpu)")
LINK = 50e9  # bytes/s of v5e, one direction


def measured(topology: str, slices: int = 1, *programs: str) -> dict:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, str(Path(__file__).with_name("known_programs.py")), topology, str(slices), *programs]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in child.stdout.splitlines() if line.startswith("measured: ")]
    assert lines, child.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("measured: "))


@pytest.fixture(scope="module")
def on_eight():
    return measured("v5e:2x4")


def exchanges(measurement: dict) -> dict[tuple[str, str], tuple[float, float]]:
    """(kind, axes) to (times, bytes sent), waiting or not."""
    found = {}
    for e in measurement["exchanges"]:
        times, sent = found.get((e["kind"], e["axes"]), (0.0, 0.0))
        found[e["kind"], e["axes"]] = times + e["count"], sent + e["sent"]
    return found


def test_a_gathered_weight(on_eight):
    program = on_eight["fsdp"]
    assert program["flops"] == 2 * 1024 * 2048 * 4096
    assert exchanges(program) == {("all-gather", "a"): (1, 3 * 512 * 4096 * 2)}


def test_rows_that_change_places(on_eight):
    program = on_eight["all_to_all"]
    assert exchanges(program) == {("all-to-all", "b"): (1, 1024 * 512 * 2 / 2)}
    (exchange,) = program["exchanges"]
    assert exchange["seconds"] == pytest.approx(1024 * 512 * 2 / 2 / LINK)  # two neighbours share one link
    assert program["flops"] == 0


def test_a_permutation_is_counted_once_between_its_start_and_end(on_eight):
    assert exchanges(on_eight["permute"]) == {("collective-permute", "a"): (1, 1024 * 512 * 2)}


def test_a_sum_that_is_scattered(on_eight):
    assert exchanges(on_eight["scatter"]) == {("reduce-scatter", "a"): (1, 4096 * 512 * 2 * 3 / 4)}


def test_a_sum_over_two_axes_is_one_exchange(on_eight):
    assert exchanges(on_eight["sum_over_two"]) == {("all-reduce", "a+b"): (1, 2 * 1024 * 512 * 2 * 7 / 8)}


def test_what_a_scan_does_counts_once_a_turn(on_eight):
    program = on_eight["scan"]
    assert program["flops"] == 6 * 2 * 1024 * 512 * 512
    assert exchanges(program) == {("all-gather", "a"): (6, 6 * 3 * 128 * 512 * 2)}


def test_gathers_of_sparse_cores_run_beside_work_and_count():
    """tpu7x hands them to another thread of its compiled program."""
    program = measured("tpu7x:2x2x1", 1, "scan", "layers")
    assert exchanges(program["scan"]) == {("all-gather", "a"): (6, 6 * 3 * 128 * 512 * 2)}
    gathers = [e for e in program["layers"]["exchanges"] if e["kind"] == "all-gather"]
    assert sum(e["sent"] for e in gathers) == pytest.approx(4 * 7 / 8 * 2048 * 2048 * 2, rel=0.15)
    assert any(e["overlapped"] for e in gathers)


def test_turns_of_loops_within_loops_multiply(on_eight):
    assert on_eight["nested"]["flops"] == 3 * 7 * 2 * 512**3
    assert not on_eight["nested"]["loops"]


def test_gathers_that_run_beside_products_count_once(on_eight):
    program = on_eight["layers"]
    assert program["flops"] == 4 * 2 * 1024 * 2048 * 2048
    found = exchanges(program)
    assert sum(sent for _, sent in found.values()) == pytest.approx(4 * 7 / 8 * 2048 * 2048 * 2, rel=1e-6)
    assert {axes for _, axes in found} <= {"a", "b", "a+b"}


def test_batch_dimensions_are_not_multiplied_out(on_eight):
    assert on_eight["batched"]["flops"] == 2 * 8 * 256 * 384 * 128
    assert on_eight["grouped"]["flops"] == 2 * 512 * 4 * 256 * 128


def test_eight_bit_products_run_at_their_own_rate(on_eight):
    assert on_eight["eight_bits"]["roofline"]["matmul"] == pytest.approx(2 * 512**3 / 393e12)


def test_a_loop_bound_by_data_is_told(on_eight):
    program = on_eight["as_long_as"]
    assert [loop["turns"] for loop in program["loops"]] == [1]
    assert program["flops"] == 2 * 512**3


def test_of_two_branches_the_costlier_counts(on_eight):
    assert on_eight["either"]["flops"] == 2 * 2 * 512**3


def test_a_kernel_is_what_it_says_of_itself(on_eight):
    assert on_eight["kernel"]["flops"] == on_eight["kernel"]["kernel_flops"] == 123_456


def test_elementwise_work_reads_and_writes_once(on_eight):
    program = on_eight["elementwise"]
    assert program["hbm_bytes"] == 3 * 4096 * 4096 * 4
    assert program["roofline"]["core"] == pytest.approx(3 * 4096 * 4096 * 4 / 819e9)


def test_temporaries_are_those_of_the_peak(on_eight):
    """Three arrays go from turn to turn, beside some of their successors."""
    memory = on_eight["carried"]["memory"]
    array = 4096 * 8192 * 4
    assert sum(memory["arguments"].values()) == array
    assert 2 * array <= memory["temporaries"] <= 5 * array
    assert memory["temporaries"] <= memory["allocated"]


def test_padding_of_tiles_is_moved_and_stored_too(on_eight):
    """1,000 columns lie in 1,024."""
    assert on_eight["padded"]["hbm_bytes"] == 2 * 1000 * 1024 * 4
    memory = on_eight["padded"]["memory"]
    assert sum(memory["arguments"].values()) == 1000 * 1024 * 4


def test_what_crosses_slices_goes_over_the_slow_network():
    """Two slices of four chips: all-reduce inside, a part of it across, and the answer gathered inside."""
    found = measured("v5p:2x2x1", 2, "sum_over_all", "fsdp")
    slow = [e for e in found["sum_over_all"]["exchanges"] if e["slow"]]
    assert sum(e["sent"] for e in slow) == 1024 * 512 * 2 / 4
    assert sum(e["seconds"] for e in slow) == pytest.approx(1024 * 512 * 2 / 4 / 6.25e9)
    assert exchanges(found["fsdp"]) == {("all-gather", "a"): (1, 1024 * 4096 * 2)}
    assert not any(e["slow"] for e in found["fsdp"]["exchanges"])

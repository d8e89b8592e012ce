"""The ring is attention over whole rows, forward and in every gradient, for each kind of mask and both layouts. The work is in
on_devices.py, in a process that has several devices; remote copies are simulated there, and races between them looked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.ring_attention import ring_attention

SCRIPT = Path(__file__).with_name("on_devices.py")
MASKS = ["causal", "documents", "chunks", "both_ways", "alone", "none"]
EVERY = [f"{mask}{layout}" for mask in MASKS for layout in ("", "_zigzag")]


def run(devices: int, *cases: str) -> dict:
    path = os.pathsep.join([str(SCRIPT.parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    command = [sys.executable, SCRIPT, str(devices), *cases]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert output.returncode == 0, output.stderr[-3000:]
    return {record["case"]: record for record in map(json.loads, output.stdout.splitlines())}


def check(records: dict, *cases: str) -> None:
    assert set(records) == set(cases)
    for case, record in records.items():
        assert max(record["errors"]) < 1e-5, (case, record)
        assert not record["races"], case


def test_passing_on_is_attention_over_whole_rows():
    """Four devices, by ppermute around matmuls and around GPU kernels; and the reference."""
    cases = ["reference:both_ways_zigzag", "xla:chunks_zigzag", "xla:none", "gpu:documents_zigzag"]
    check(run(4, *cases), *cases)


def test_remote_copies_beside_the_kernels_are_attention_over_whole_rows_without_races():
    """Two devices, each with two pieces of keys that go on and come to different ends. And `ppermute` around the same kernels."""
    cases = ["tpu:documents_zigzag", "permuted:causal"]
    check(run(2, *cases), *cases)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "gpu", "tpu", "permuted"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_every_mask_and_layout_on_two_four_and_eight_devices(implementation, devices):
    cases = [f"{implementation}:{case}" for case in EVERY]
    check(run(devices, *cases), *cases)


def test_copies_stop_where_nobody_reads_them_any_more():
    """Of each case on eight devices: the hops that a piece of a shard goes."""
    reaches = run(8, "reach:causal", "reach:alone", "reach:chunks", "reach:causal_zigzag")
    assert reaches["reach:causal"]["reach"] == [[7 - i] for i in range(8)]  # never from the last shard to the first
    assert reaches["reach:alone"]["reach"] == [[0]] * 8
    assert reaches["reach:chunks"]["reach"][0] == [2] and reaches["reach:chunks"]["reach"][7] == [0]
    # Piece 0 of shard 0 is read by all; piece 15, the row's last, by its own shard alone; the others by all shards' second pieces
    zigzag = reaches["reach:causal_zigzag"]["reach"]
    assert zigzag[0] == [7, 0] and [first for first, _ in zigzag] == [7] * 8
    assert [second for _, second in zigzag] == [0] + [7] * 7  # shard 0, the last to read them, is last on the way round


def test_what_cannot_be_done_is_refused():
    spans = Intervals(jnp.zeros((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32))
    rows = lambda heads: jnp.zeros((1, 3, heads, 128))  # noqa: E731
    with pytest.raises(ValueError, match="5 query heads are not a multiple of 2"):
        ring_attention(rows(5), rows(2), rows(2), spans, axis="context")
    with pytest.raises(ValueError, match="not 3 places"):
        ring_attention(rows(4), rows(2), rows(2), spans, axis="context", zigzag=True)
    with pytest.raises(NotImplementedError, match="not 64"):
        arrays = [rows(heads)[..., :64] for heads in (4, 2, 2)]
        ring_attention(*arrays, spans, axis="context", implementation="tpu")


needs_libtpu = pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")


def compiles(chip, *options):
    requests = [aot.Request("pallas_kernels.ring_attention.shapes:case", option) for option in options]
    for outcome in aot.compile_for(chip, requests):
        assert outcome.error is None, (outcome.request, outcome.error)


@needs_libtpu
def test_it_compiles_for_four_chips():
    compiles("v5p", {"shape": "scout"})


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
@pytest.mark.parametrize("zigzag", [False, True])
def test_forward_and_gradients_compile_for_four_chips_of_each_kind(chip, zigzag):
    compiles(chip, {"shape": "scout", "zigzag": zigzag}, {"shape": "scout", "zigzag": zigzag, "gradients": True})


@pytest.mark.slow
@needs_libtpu
def test_long_shards_compile():
    """Their keys pass through the backward kernel in parts."""
    compiles("v5p", {"shape": "scout_long", "gradients": True}, {"shape": "scout", "gradients": True, "remote": False})

"""Any mesh gives the numbers of one device. The work is in eight_devices.py, in a process that has eight devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    script = Path(__file__).with_name("eight_devices.py")
    command = [sys.executable, script, tmp_path_factory.mktemp("checkpoints")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr[-3000:]
    return {record["mesh"]: record for record in map(json.loads, output.stdout.splitlines())}


@pytest.mark.parametrize("mesh", ["data8", "fsdp8", "data2_fsdp2_tensor2", "context2_expert2_dcn2"])
def test_loss_load_and_every_gradient_equal_one_device(records, mesh):
    assert records[mesh]["error"] < 1e-5


def test_weights_are_split_and_moments_lie_with_them(records):
    assert records["data8"]["split"] == 0
    assert records["fsdp8"]["split"] > 10
    assert all(record.get("moments_follow", True) for record in records.values())


def test_a_checkpoint_of_one_mesh_restores_bit_for_bit_on_another(records):
    assert records["restored"] == {"mesh": "restored", "equal": True, "placed": True}

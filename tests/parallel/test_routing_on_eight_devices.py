"""Who is dropped, what noise a token gets and how the bias moves do not depend on the mesh."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("routing_on_eight_devices.py")
CASES = ("expert", "context_expert_tensor_zigzag", "data_fsdp")  # the second lays tokens in another order than the row's


@pytest.mark.slow
def test_bias_capacity_and_jitter_give_the_numbers_of_one_device():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
    }
    output = subprocess.run([sys.executable, SCRIPT, *CASES], env=environment, capture_output=True, text=True, timeout=600)
    assert output.returncode == 0, output.stderr[-3000:]
    records = [json.loads(line) for line in output.stdout.splitlines()]
    assert [record["case"] for record in records] == list(CASES)
    for record in records:
        assert record["error"] < 1e-5 and 0.1 < record["dropped"][0] < 0.9, record

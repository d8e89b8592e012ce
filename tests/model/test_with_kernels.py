"""A repeating block of Scout's layers through the TPU kernels, interpreted, gives the loss and gradients of their definitions, on
one device and with experts and rows over a mesh. The work is in with_kernels.py, in processes that have virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one_device", "expert_and_context"])
def test_loss_and_gradients(mesh):
    command = [sys.executable, Path(__file__).with_name("with_kernels.py"), mesh]
    output = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert output.returncode == 0, output.stderr[-3000:]
    record = json.loads(output.stdout)
    assert record["loss"] < 1e-6 and record["gradients"] < 1e-5, record

"""Scripts that need eight devices, in a process that has them: a test's own process has one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

XLA_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # much is compiled, little is run


def run(script: Path, *arguments: Any, timeout: float = 1200) -> list[dict[str, Any]]:
    """What the script prints: a JSON object a line."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": XLA_FLAGS}
    command = [sys.executable, script, *arguments]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert output.returncode == 0, output.stderr[-3000:]
    return [json.loads(line) for line in output.stdout.splitlines()]

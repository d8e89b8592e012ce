"""The trainer under the local starter: a killed process, a signal, and the run still takes every step once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STEPS = 150

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")]


def start(workdir: Path, *more: str) -> subprocess.Popen:
    flags = ["--target=local", "--config=tests/fixtures/tiny_experiment.py", f"--workdir={workdir}"]
    flags += ["--processes=2", "--devices_per_process=2", f"--config.steps={STEPS}", "--config.evaluations.heldout.every=1000"]
    return subprocess.Popen(
        [sys.executable, "-m", "llama4_jax.launch", *flags, *more],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps(workdir: Path) -> list[int]:
    try:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [record["step"] for record in map(json.loads, lines) if "loss" in record]
    except (FileNotFoundError, ValueError):  # a line is being written
        return []


def wait_for_step(workdir: Path, step: int, starter: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while max(steps(workdir), default=0) < step:
        assert time.monotonic() < deadline and starter.poll() is None
        time.sleep(0.1)


def test_a_run_survives_a_killed_process_and_a_signal(tmp_path):
    starter = start(tmp_path, "--max_restarts=1", "--grace_seconds=30")
    wait_for_step(tmp_path, 12, starter)
    first, second = map(int, Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split())
    os.kill(second, signal.SIGKILL)
    while Path(f"/proc/{first}").exists():
        time.sleep(0.1)
    wait_for_step(tmp_path, max(steps(tmp_path)) + 8, starter)
    starter.send_signal(signal.SIGTERM)
    said, _ = starter.communicate(timeout=60)
    assert starter.returncode == 42, said
    assert "process 1 ended with status 137" in said and "starting again (1 of 1)" in said
    assert max(steps(tmp_path)) < STEPS

    starter = start(tmp_path)
    said, _ = starter.communicate(timeout=300)
    assert starter.returncode == 0, said
    assert steps(tmp_path) == list(range(1, STEPS + 1))


def test_bad_input_is_for_good(tmp_path):
    starter = start(tmp_path, "--max_restarts=3", "--config.data.sources=nowhere.txt")
    said, _ = starter.communicate(timeout=120)
    assert starter.returncode == 2 and "nowhere.txt" in said and "starting again" not in said

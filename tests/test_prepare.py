"""The app that prepares data: one command, killed and started again, and a run that trains on what it made."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

FIXTURE = str(Path(__file__).parent / "fixtures/tiny_experiment.py")


def command(*arguments, app="prepare"):
    return [sys.executable, "-m", f"llama4_jax.{app}", *arguments]


def run(*arguments, app="prepare"):
    return subprocess.run(command(*arguments, app=app), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Four megabytes: as many shards."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    generator = np.random.default_rng(0)
    words = [f"word{i}" for i in range(2000)]
    with open(path, "w") as file:
        for _ in range(500):
            file.write(json.dumps({"text": " ".join(words[i] for i in generator.integers(0, 2000, 1000))}) + "\n")
    return path


@pytest.fixture(scope="module")
def arguments(text):
    return [
        f"--config={FIXTURE}", f"--config.data.sources={text}", "--config.data.deduplicate=false", "--shard_mb=1", "--processes=2"
    ]  # fmt: skip


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(process):
    children = Path(f"/proc/{process}/task/{process}/children")
    return [int(child) for child in children.read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_killed_interrupted_and_started_again_it_finishes_the_same_shards_and_leaves_no_process(arguments, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen(command(*arguments, f"--out={out}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    manifest = out / "manifest.json"
    wait_until(lambda: manifest.exists() and len(json.loads(manifest.read_text())["shards"]) >= 1)
    workers = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = json.loads(manifest.read_text())
    assert not kept["finished"] and len(workers) >= 2
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    before = {name: (out / f"{name}.array_record").stat().st_mtime_ns for name in kept["shards"]}

    # Interrupted by Ctrl-C, which every process of a terminal hears, it says so and leaves no traceback.
    process = subprocess.Popen(
        command(*arguments, f"--out={out}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit that it is ignored
    )
    wait_until(lambda: len(json.loads(manifest.read_text())["shards"]) > len(kept["shards"]))
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 42 and output == "", errors
    assert "Traceback" not in errors and errors.endswith("finished shards are kept; run again to go on\n")

    again = run(*arguments, f"--out={out}")
    assert again.returncode == 0, again.stderr
    assert {name: (out / f"{name}.array_record").stat().st_mtime_ns for name in before} == before
    unbroken = run(*arguments, f"--out={tmp_path / 'unbroken'}")
    assert "train with --config.data.prepared=" in unbroken.stdout
    assert contents(out) == contents(tmp_path / "unbroken")

    refused = run(*arguments, "--config.data.text_field=body", f"--out={out}")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.count("\n") == 1 and "text_field was text, now body" in refused.stderr


@pytest.mark.slow
def test_training_reads_what_was_prepared(tmp_path):
    out, workdir = tmp_path / "data", tmp_path / "run"
    assert run(f"--config={FIXTURE}", f"--out={out}", "--processes=1").returncode == 0
    steps = ["--config.steps=2", "--config.log_every=2", "--config.evaluations.heldout.max_batches=1"]
    trained = run(f"--config={FIXTURE}", f"--config.data.prepared={out}", f"--workdir={workdir}", *steps, app="train")
    assert trained.returncode == 0, trained.stderr
    assert "bits a byte of held-out text" in trained.stdout and not (workdir / "corpus").exists()


@pytest.mark.parametrize(
    "arguments, line",
    [
        ("--config={fixture}", "error: --config=FILE and --out=DIR are both needed"),
        ("--config={fixture} --out={new} --config.data.sources=/nowhere", "error: no data at /nowhere"),
        ("--config={fixture} --out={new} --prcesses=2", "error: unknown argument '--prcesses=2'; did you mean --processes?"),
        ("--config={fixture} --out=/proc/data", "error: cannot write the prepared data to /proc/data"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, arguments, line):
    process = run(*arguments.format(fixture=FIXTURE, new=tmp_path / "data").split())
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and process.stdout == ""
    assert process.stderr.startswith(line)

"""One run by several processes on this machine: what it computes, keeps and says is what one process would."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from llama4_jax import exit_codes

FIXTURE = Path(__file__).parents[1] / "fixtures/tiny_experiment.py"
SETTINGS = {"steps": 6, "checkpoint.every": 3, "evaluations.heldout.every": 6, "data.batch_size": 8}
LIMIT = 300  # seconds; a run takes fifteen on two idle cores


def training(workdir, changes=None, **mesh):
    """Arguments of the app."""
    settings = SETTINGS | {f"mesh.{axis}": size for axis, size in mesh.items()} | (changes or {})
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    return [f"--config={FIXTURE}", f"--workdir={workdir}", "--prompt=", *overrides]


def finish(job, status=exit_codes.DONE):
    assert [process.ended(LIMIT) for process in job] == [status] * len(job), [process.output()[-3000:] for process in job]


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(workdir, other):
    """Every step and evaluation once, and the numbers of the other run but for the order of float32 sums."""
    for one, two in zip(records(workdir), records(other), strict=True):
        names = ("loss",) if "loss" in two else ("bits_per_byte",)
        assert (one["step"], one.get("epochs")) == (two["step"], two.get("epochs"))
        for name in names:
            assert one[name] == pytest.approx(two[name], rel=1e-6)


def test_two_processes_train_a_dense_model_as_one(start_job, tmp_path):
    """The quick one. Weights are split within a process, rows over both; the checkpoint is written by both."""
    dense = {"model.num_layers": 1, "model.moe_interval": 0, "model.dense_ffn_size": 32, "steps": 3}
    for count in (1, 2):
        arguments = training(tmp_path / str(count), dense, data=2, fsdp=4)
        finish(start_job(count, "-m", "llama4_jax.train", *arguments, devices=8 // count))
    assert_same_run(tmp_path / "2", tmp_path / "1")
    assert [path.name for path in (tmp_path / "2/checkpoints").iterdir()] == ["3"]


@pytest.fixture(scope="module")
def one_process(start_job, tmp_path_factory):
    """Six steps on eight devices of one process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(start_job(1, "-m", "llama4_jax.train", *training(workdir, data=2, fsdp=2, expert=2), devices=8))
    return workdir


@pytest.fixture(scope="module")
def two_processes(start_job, tmp_path_factory):
    """The same by two processes, and what they printed. Weights are split within a process, rows over both."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    job = start_job(2, "-m", "llama4_jax.train", *training(workdir, data=2, fsdp=2, expert=2))
    finish(job)
    return workdir, [process.output() for process in job]


@pytest.mark.slow
def test_two_processes_train_experts_as_one_and_the_first_alone_speaks(one_process, two_processes):
    workdir, (first, second) = two_processes
    assert_same_run(workdir, one_process)
    assert "step 6/6: loss" in first and "bits a byte" in first
    assert "loss" not in second and "bits a byte" not in second
    assert sorted(path.name for path in workdir.iterdir()) == sorted(path.name for path in one_process.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, mesh", [(1, {"data": 8}), (4, {"fsdp": 4, "data": 2}), (2, {"context": 2, "expert": 4, "data": 1})]
)
def test_another_number_of_processes_goes_on_from_their_checkpoint(start_job, two_processes, tmp_path, count, mesh):
    """On other meshes too: weights split over all processes, and rows of which each process computes a part."""
    workdir = tmp_path / "run"
    shutil.copytree(two_processes[0], workdir)
    shutil.rmtree(workdir / "checkpoints/6")
    job = start_job(count, "-m", "llama4_jax.train", *training(workdir, **mesh), devices=8 // count)
    finish(job)
    assert "it goes on from the checkpoint of step 3" in job[0].output()
    assert_same_run(workdir, two_processes[0])


WITH_BATCHES = """
import time
import jax
from llama4_jax import app
from llama4_jax.train import main
from llama4_jax.data.pipeline import TrainBatches

read_next, read = TrainBatches.__next__, []

def act_and_read(batches):
    read.append(None)
    {act}
    return read_next(batches)

TrainBatches.__next__ = act_and_read
app.run(main)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step(start_job, two_processes, tmp_path):
    """To the one that does not lead. All save the same step and say by their status that they may be started again."""
    workdir = tmp_path / "run"
    slowly = WITH_BATCHES.replace("{act}", "time.sleep(0.3)")  # for the signal to come before the last step
    job = start_job(2, "-c", slowly, *training(workdir, data=2, fsdp=2, expert=2))
    wait_until(lambda: "memory of a device" in job[0].output(), job)  # the first step is about to run
    job[1].process.send_signal(signal.SIGTERM)
    finish(job, exit_codes.PREEMPTED)
    (saved,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"SIGTERM: saved step {saved} and stopped" in job[0].output() and records(workdir)[-1]["step"] == saved
    finish(start_job(2, "-m", "llama4_jax.train", *training(workdir, data=2, fsdp=2, expert=2)))
    assert_same_run(workdir, two_processes[0])


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_at_once_and_is_told_by_all(start_job, tmp_path):
    fault = "if len(read) == 3 and jax.process_index() == 1: raise OSError('the disk is on fire')"
    job = start_job(2, "-c", WITH_BATCHES.replace("{act}", fault), *training(tmp_path / "run", data=2, fsdp=2, expert=2))
    assert job[1].ended(LIMIT) == exit_codes.RETRY, job[1].output()[-3000:]
    assert job[0].ended(10) == exit_codes.RETRY, job[0].output()[-3000:]
    assert "Traceback" in job[1].output() and "process 1 of 2 failed" in job[1].output()
    assert "process 0 of 2 ends, for process 1 failed: OSError: the disk is on fire" in job[0].output()


@pytest.mark.slow
def test_a_run_that_diverges_fails_for_good_on_all(start_job, tmp_path):
    arguments = training(tmp_path / "run", data=2, fsdp=2, expert=2)
    finish(start_job(2, "-m", "llama4_jax.train", *arguments, "--config.optimizer.learning_rate=1e30"), exit_codes.FAILED)


def wait_until(condition, job):
    deadline = time.monotonic() + LIMIT
    while not condition():
        alive = all(process.process.poll() is None for process in job)
        assert alive and time.monotonic() < deadline, [process.output()[-3000:] for process in job]
        time.sleep(0.02)

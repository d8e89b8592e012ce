"""Whole runs, in small. The hard property: interrupted anywhere, a run ends with the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from llama4_jax.app import load_experiment
from llama4_jax.errors import UserError
from llama4_jax.training import trainer
from llama4_jax.training.loop import train

FIXTURE = str(Path(__file__).parents[1] / "fixtures/tiny_experiment.py")
TIMINGS = ("step_seconds", "tokens_per_second", "model_tflops_per_second", "mfu")


def lines_of(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class Watched:
    """Training batches, whose tokens are noted, and which do something before a given one."""

    def __init__(self, batches, seen, before, act):
        self.batches, self.seen, self.before, self.act = batches, seen, before, act

    def __next__(self):
        if len(self.seen) + 1 == self.before:
            self.act()
        batch = next(self.batches)
        self.seen.append(np.array(batch.tokens))
        return batch

    def __getattr__(self, name):
        return getattr(self.batches, name)


def watched_train(workdir, experiment, monkeypatch, before=None, act=None):
    seen, original = [], trainer.train_batches
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_batches", lambda *a, **k: Watched(original(*a, **k), seen, before, act))
        return train(experiment, workdir, progress=False), seen


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps without a break: its folder, result and batches."""
    workdir = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        result, seen = watched_train(workdir, load_experiment(FIXTURE, {}), patch)
    return workdir, result, seen


@pytest.fixture
def experiment():
    return load_experiment(FIXTURE, {})


def test_a_run_leaves_what_it_promises(straight):
    workdir, result, _ = straight
    assert result.status == "finished" and result.step == 10
    steps = [record["step"] for record in lines_of(workdir) if "loss" in record]
    assert steps == list(range(1, 11))
    evaluations = [(r["step"], r["evaluation"]) for r in lines_of(workdir) if "evaluation" in r]
    assert evaluations == [(5, "heldout"), (10, "heldout")]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "5"]
    assert {"loss.png", "expert_load.png", "experiment.json", "sharding.txt", "tensorboard"} <= {
        path.name for path in workdir.iterdir()
    }
    assert result.evaluations["heldout"]["bits_per_byte"] < 9 and set(result.baselines) == {"gzip", "xz"}


KILLED = """
import os, signal, sys, time
from llama4_jax.app import load_experiment
from llama4_jax.training import loop, trainer

class Deadly:
    def __init__(self, batches):
        self.batches, self.read = batches, 0
    def __getattr__(self, name):
        return getattr(self.batches, name)
    def __next__(self):
        self.read += 1
        if self.read == 9:
            while not os.path.isdir(sys.argv[2] + "/checkpoints/5"):  # it is written behind
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return next(self.batches)

original = trainer.train_batches
trainer.train_batches = lambda *a, **k: Deadly(original(*a, **k))
loop.train(load_experiment(sys.argv[1], {}), sys.argv[2], progress=False)
"""


def test_a_killed_run_goes_on_to_the_same_bits(straight, tmp_path, experiment, monkeypatch):
    """kill -9 with eight batches read and step 5 saved: the steps after it are done again, on the same batches."""
    dead = subprocess.run([sys.executable, "-c", KILLED, FIXTURE, tmp_path], capture_output=True, text=True, timeout=300)
    assert dead.returncode == -signal.SIGKILL, dead.stderr[-2000:]
    assert lines_of(tmp_path)[-1]["step"] == 7
    result, seen = watched_train(tmp_path, experiment, monkeypatch)
    workdir, expected, batches = straight
    assert_same_bits(result.state, expected.state)
    assert lines_of(tmp_path) == lines_of(workdir)
    assert_same_bits(seen, batches[5:])


def test_a_signal_saves_between_checkpoints_and_the_run_goes_on(straight, tmp_path, experiment, monkeypatch):
    result, seen = watched_train(tmp_path, experiment, monkeypatch, before=3, act=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert result.status == "stopped" and result.step == 3 and len(seen) == 3
    assert (tmp_path / "checkpoints/3").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result, _ = watched_train(tmp_path, experiment, monkeypatch)
    assert_same_bits(result.state, straight[1].state)
    assert lines_of(tmp_path) == lines_of(straight[0])


def test_a_finished_run_is_left_alone_and_more_steps_go_on(straight, tmp_path, experiment):
    workdir = tmp_path / "copy"
    shutil.copytree(straight[0], workdir)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    result = train(experiment, workdir, progress=False)
    assert result.status == "already finished" and result.evaluations == straight[1].evaluations
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    experiment.steps = 11
    assert train(experiment, workdir, progress=False).step == 11
    assert [r["step"] for r in lines_of(workdir) if "loss" in r] == list(range(1, 12))


def test_lost_checkpoints_are_no_silent_start_from_scratch(straight, tmp_path, experiment):
    workdir = tmp_path / "copy"
    shutil.copytree(straight[0], workdir)
    experiment.steps = 12
    for step in ("5", "10"):
        shutil.rmtree(workdir / "checkpoints" / step / "state/d")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(set aside: 10\.damaged-1, 5\.damaged-1\)"):
        train(experiment, workdir, progress=False)
    assert len(lines_of(workdir)) == 12


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step(tmp_path, experiment):
    experiment.optimizer.learning_rate = 1e30
    experiment.evaluations = {}
    with pytest.raises(UserError, match=r"loss is (nan|inf) .* at step \d; the newest checkpoint is of step 0"):
        train(experiment, tmp_path, progress=False)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_unknown_evaluation_is_told_before_anything_is_made(tmp_path, experiment):
    experiment.evaluations["heldout"].function = "bits_per_bite"
    with pytest.raises(
        UserError, match=r"evaluations\.heldout\.function='bits_per_bite' is unknown; did you mean bits_per_byte"
    ):
        train(experiment, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()

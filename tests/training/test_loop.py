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
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.errors import UserError
from llama4_jax.training import trainer
from llama4_jax.training.goodput import account
from llama4_jax.training.loop import train
from llama4_jax.training.progress import Progress
from llama4_jax.training.recorder import read_events
from llama4_jax.training.sitting import Sitting
from llama4_jax.training.watchdog import Watchdog
from llama4_jax.training.work_directory import WorkDirectory

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
    events = read_events(workdir)
    told = [(event["event"], event.get("step")) for event in events if event["event"] not in ("step", "saved")]
    assert told == [
        *(("start", None), ("restore", None), ("compile", 0), ("evaluate", 5), ("save", 5), ("evaluate", 10), ("save", 10)),
        *(("save", 10), ("finish", 10), ("stop", 10)),  # the second waits for what is written behind
    ]
    assert [event["checkpoint"] for event in events if event["event"] == "saved"] == [5, 10]
    accounted = account(events)
    assert (accounted.step, accounted.redone, accounted.skipped, accounted.faults) == (10, 0, 0, [])
    assert accounted.total == pytest.approx(events[-1]["time"] - events[0]["time"], abs=0.1) and 0 < accounted.share < 1


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


def test_a_finished_run_is_left_alone_and_more_steps_go_on(straight, tmp_path, experiment, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(straight[0], workdir)
    before = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    result = train(experiment, workdir, progress=False)
    assert result.status == "already finished" and result.evaluations == straight[1].evaluations
    assert before == {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    experiment.steps, synced = 11, []
    monkeypatch.setattr(WorkDirectory, "sync_metrics", lambda run: synced.append(lines_of(workdir)[-1]["step"]))
    assert train(experiment, workdir, progress=False).step == 11
    assert [r["step"] for r in lines_of(workdir) if "loss" in r] == list(range(1, 12))
    assert synced == [11]  # of the one checkpoint that was made


def test_lost_checkpoints_are_no_silent_start_from_scratch(straight, tmp_path, experiment):
    workdir = tmp_path / "copy"
    shutil.copytree(straight[0], workdir)
    experiment.steps = 12
    for step in ("5", "10"):
        shutil.rmtree(workdir / "checkpoints" / step / "state/d")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(set aside: 10\.damaged-1, 5\.damaged-1\)"):
        train(experiment, workdir, progress=False)
    assert len(lines_of(workdir)) == 12


def test_a_run_that_diverges_goes_back_once_and_then_ends_with_its_steps(tmp_path, experiment):
    experiment.optimizer.learning_rate = 1e30
    experiment.evaluations = {}
    line = r"going back to step 0, and past the batches of step 2, batch 2 .*, did not help: step 2, batch 7"
    with pytest.raises(UserError, match=line):
        train(experiment, tmp_path, progress=False)
    assert list((tmp_path / "checkpoints").iterdir()) == []


class Poisoned:
    """Training batches of which some are other than they should be, and which break off before one."""

    def __init__(self, batches, poison, numbers, dropped=(), breaks_at=None):
        self.batches, self.poison, self.numbers, self.dropped, self.breaks_at = batches, poison, numbers, dropped, breaks_at

    def __next__(self):
        batch = next(self.batches)
        while self.batches.step in self.dropped:
            batch = next(self.batches)
        if self.batches.step == self.breaks_at:
            raise RuntimeError("broken off")
        return self.poison(batch) if self.batches.step in self.numbers else batch

    def __getattr__(self, name):
        return getattr(self.batches, name)


def not_a_number(batch):
    return batch.replace(loss_weights=np.full_like(batch.loss_weights, np.nan))


def far_too_large(batch):
    """Weights that nearly cancel make the loss, a mean, a thousand times too large, and the gradient with it."""
    weights = np.where(np.arange(batch.loss_weights.size) % 2, 1.0, -0.998).reshape(batch.loss_weights.shape)
    return batch.replace(loss_weights=weights.astype(np.float32))


def poisoned_train(workdir, experiment, monkeypatch, *options, **more):
    original = trainer.train_batches
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_batches", lambda *a, **k: Poisoned(original(*a, **k), *options, **more))
        return train(experiment, workdir, progress=False)


@pytest.mark.parametrize("poison, reason", [(not_a_number, "loss is nan"), (far_too_large, "is a spike: it has been")])
def test_a_bad_batch_is_left_out_counted_and_named(straight, tmp_path, experiment, monkeypatch, poison, reason):
    """The update before it is the last that was made: without it the run would have ended with other bits."""
    experiment.anomalies.window = 3
    result = poisoned_train(tmp_path, experiment, monkeypatch, poison, {6})
    assert result.status == "finished" and result.step == 10
    (line,) = (record for record in lines_of(tmp_path) if "skipped" in record)
    assert line["step"] == 6 and reason in line["skipped"] and "batch 6 of the run (epochs: " in line["skipped"]
    assert [r["step"] for r in lines_of(tmp_path) if "loss" in r] == [1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert lines_of(tmp_path)[-2]["skipped_steps"] == 1 and int(result.state.usual.skipped) == 1
    # The next step starts from the state before it, with the learning rate that the one left out would have had.
    before, after = ({r["step"]: r for r in lines_of(w) if "loss" in r} for w in (straight[0], tmp_path))
    assert after[7]["learning_rate"] == before[6]["learning_rate"] and after[5] == before[5]


def test_several_bad_batches_in_a_row_take_the_run_back_and_past_them(tmp_path, experiment, monkeypatch):
    """To the checkpoint of step 5, and on with batch 11, as if 6 to 10 had not been there; also if it is broken off after that."""
    experiment.steps, bad = 12, {7, 8, 9}
    expected = poisoned_train(tmp_path / "without", experiment, monkeypatch, None, (), dropped=range(6, 11))
    result = poisoned_train(tmp_path / "run", experiment, monkeypatch, not_a_number, bad)
    assert result.step == 12
    assert_same_bits(result.state, expected.state)
    without, run = (
        [{k: v for k, v in record.items() if k != "epochs"} for record in lines_of(tmp_path / name)]
        for name in ("without", "run")
    )
    assert run == without
    with pytest.raises(RuntimeError, match="broken off"):
        poisoned_train(tmp_path / "broken", experiment, monkeypatch, not_a_number, bad, breaks_at=13)
    (goes_back,) = json.loads((tmp_path / "broken/rollbacks.json").read_text())
    assert goes_back["to"] == 5 and [reason.split(",")[0] for reason in goes_back["skipped"]] == ["step 7", "step 8", "step 9"]
    result = poisoned_train(tmp_path / "broken", experiment, monkeypatch, not_a_number, bad)
    assert_same_bits(result.state, expected.state)


@pytest.mark.slow
def test_a_signal_amid_steps_left_out_changes_nothing(tmp_path, experiment, monkeypatch):
    """Two of the three in a row are done: they are done again, and the run goes back to where it would have gone."""
    experiment.steps, experiment.evaluations = 12, {}
    expected = poisoned_train(tmp_path / "straight", experiment, monkeypatch, not_a_number, {7, 8, 9})

    def poison_and_stop(batch):
        signal.raise_signal(signal.SIGTERM)
        return not_a_number(batch)

    result = poisoned_train(tmp_path / "run", experiment, monkeypatch, poison_and_stop, {8})
    assert (result.status, result.step) == ("stopped", 8)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.name.isdigit()] == ["5"]
    result = poisoned_train(tmp_path / "run", experiment, monkeypatch, not_a_number, {7, 8, 9})
    assert_same_bits(result.state, expected.state)


def spoil_first_save(monkeypatch, step):
    """The first checkpoint of `step` holds parameters that the update before it, or the hardware, has spoilt."""
    save, spoilt = Sitting._save, []

    def spoil_and_save(sitting, values=None, *, may_skip=False):
        if sitting.step == step and not spoilt:
            spoilt.append(step)
            sitting.state = sitting.state.replace(params=jax.tree.map(lambda x: x * np.float32("nan"), sitting.state.params))
        save(sitting, values)  # and none is skipped, however slow the disk

    monkeypatch.setattr(Sitting, "_save", spoil_and_save)


def test_a_checkpoint_that_no_step_gets_past_is_set_aside_for_the_one_below(tmp_path, experiment, monkeypatch):
    """It is tried twice, for it may have been the batches; what comes of it is the run without all batches since the older."""
    experiment.steps, experiment.evaluations = 15, {}
    with monkeypatch.context() as patch:
        spoil_first_save(patch, 10)
        result = poisoned_train(tmp_path / "run", experiment, monkeypatch, None, ())
    assert result.status == "finished"
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"10", "10.damaged-1", "15"}
    (rollback,) = json.loads((tmp_path / "run/rollbacks.json").read_text())
    assert (rollback["to"], rollback["sound"]) == (5, 10)
    dropped = range(6, rollback["data"]["step"] + 1)
    expected = poisoned_train(tmp_path / "without", experiment, monkeypatch, None, (), dropped=dropped)
    assert_same_bits(result.state, expected.state)


def test_a_run_that_fails_from_an_older_checkpoint_too_ends_with_that_one_kept(tmp_path, experiment, monkeypatch):
    experiment.steps, experiment.evaluations = 15, {}
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"going back to step 5, and past the batches of .* did not help"),
    ):
        spoil_first_save(patch, 10)
        poisoned_train(tmp_path, experiment, monkeypatch, not_a_number, range(17, 40))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"5", "10.damaged-1"}


def test_parameters_that_are_not_finite_are_never_saved(tmp_path, experiment, monkeypatch):
    """Those that the very last update leaves behind are judged by no later step: the run goes back all the same."""
    experiment.evaluations, settle, spoilt = {}, Sitting._settle, []

    def settle_and_spoil(sitting, done):
        settle(sitting, done)
        if done.step == experiment.steps and not spoilt:
            spoilt.append(done.step)
            sitting.state = sitting.state.replace(params=jax.tree.map(lambda x: x * np.float32("nan"), sitting.state.params))

    with monkeypatch.context() as patch:
        patch.setattr(Sitting, "_settle", settle_and_spoil)
        result = poisoned_train(tmp_path / "run", experiment, monkeypatch, None, ())
    assert (result.status, spoilt) == ("finished", [10])
    (rollback,) = json.loads((tmp_path / "run/rollbacks.json").read_text())
    assert rollback["to"] == 5 and "step 10 left parameters behind that are not finite" in rollback["skipped"][0]
    expected = poisoned_train(tmp_path / "without", experiment, monkeypatch, None, (), dropped=range(6, 11))
    assert_same_bits(result.state, expected.state)


def test_a_signal_at_a_rollback_stops_there(tmp_path, experiment, monkeypatch):
    """While the last of three bad steps is waited for: not five steps later, when the run has come as far again."""
    experiment.steps, experiment.evaluations, bad = 12, {}, {7, 8, 9}
    expected = poisoned_train(tmp_path / "straight", experiment, monkeypatch, not_a_number, bad)

    stop_at_tenth = lambda batch: signal.raise_signal(signal.SIGTERM) or batch  # noqa: E731
    poisons = iter([*[not_a_number] * 3, stop_at_tenth])
    result = poisoned_train(tmp_path / "run", experiment, monkeypatch, lambda batch: next(poisons)(batch), bad | {10})
    assert (tmp_path / "run/rollbacks.json").exists() and (result.status, result.step) == ("stopped", 5)
    result = poisoned_train(tmp_path / "run", experiment, monkeypatch, not_a_number, bad)
    assert_same_bits(result.state, expected.state)


def test_a_signal_at_a_rollback_to_the_beginning_says_that_nothing_is_saved(tmp_path, experiment, monkeypatch):
    experiment.evaluations, told = {}, []
    monkeypatch.setattr(Progress, "say", lambda progress, line: told.append(line))
    poisons = iter([*[not_a_number] * 3, lambda batch: signal.raise_signal(signal.SIGTERM) or batch])
    result = poisoned_train(tmp_path, experiment, monkeypatch, lambda batch: next(poisons)(batch), {2, 3, 4, 5})
    assert (result.status, result.step) == ("stopped", 0)
    assert told[-1] == "SIGTERM: stopped at the beginning, with nothing to save; run again to go on"


def test_a_rollback_waits_for_a_save_as_long_as_a_save_may_take(tmp_path, experiment, monkeypatch):
    """Not as long as a step may: it may take far longer."""
    experiment.evaluations, experiment.watch.checkpoint_seconds = {}, 1234
    limits, waited, expect, wait = [], [], Watchdog._expect, RunCheckpoints.wait
    monkeypatch.setattr(Watchdog, "_expect", lambda dog, *limit: (limits.append(limit), expect(dog, *limit)))
    monkeypatch.setattr(RunCheckpoints, "wait", lambda checkpoints: (waited.append(limits[-1]), wait(checkpoints))[1])
    poisoned_train(tmp_path, experiment, monkeypatch, not_a_number, {7, 8, 9})
    assert (tmp_path / "rollbacks.json").exists() and waited == [("save", 1234)] * 2, "the second at the end"


def test_the_last_steps_of_a_run_are_taken_back_too(tmp_path, experiment, monkeypatch):
    experiment.evaluations = {}
    result = poisoned_train(tmp_path, experiment, monkeypatch, not_a_number, {8, 9, 10})
    assert result.status == "finished" and int(result.state.step) == 10 and int(result.state.usual.skipped) == 0
    (rollback,) = json.loads((tmp_path / "rollbacks.json").read_text())
    assert rollback["to"] == 5


def test_an_unknown_evaluation_is_told_before_anything_is_made(tmp_path, experiment):
    experiment.evaluations["heldout"].function = "bits_per_bite"
    with pytest.raises(
        UserError, match=r"evaluations\.heldout\.function='bits_per_bite' is unknown; did you mean bits_per_byte"
    ):
        train(experiment, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()

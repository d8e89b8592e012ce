"""A step that is done again: the same bits, or the device that gave others."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llama4_jax.app import load_experiment
from llama4_jax.errors import UserError
from llama4_jax.training.loop import train
from llama4_jax.training.replay import replay_step
from llama4_jax.training.trainer import Trainer

FIXTURE = str(Path(__file__).parents[1] / "fixtures/tiny_experiment.py")


@pytest.fixture(scope="module")
def experiment():
    return load_experiment(FIXTURE, {"evaluations.heldout.every": "100", "model.num_layers": "1", "model.nope_interval": "1"})


@pytest.fixture(scope="module")
def run(tmp_path_factory, experiment):
    """Ten steps, with checkpoints of 5 and 10."""
    workdir = tmp_path_factory.mktemp("run")
    train(experiment, workdir, progress=False)
    return workdir


def contents(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "step, start", [(8, 5), pytest.param(3, 0, marks=pytest.mark.slow), pytest.param(5, 0, marks=pytest.mark.slow)]
)
def test_a_step_done_again_has_its_bits_and_leaves_the_run_as_it_is(run, experiment, step, start):
    before = contents(run)
    replay = replay_step(experiment, run, step, progress=False)
    assert replay.agrees and (replay.start, replay.differing, replay.first_difference) == (start, {}, None)
    assert replay.loss[0] == replay.loss[1] == replay.logged
    assert "all bits of the state after them agree" in str(replay)
    assert contents(run) == before


def test_a_run_that_is_saving_and_a_damaged_checkpoint_are_left_as_they_are(run, experiment, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    shutil.copytree(workdir / "checkpoints/5", workdir / "checkpoints/7.saving")
    shutil.copytree(workdir / "checkpoints/5", workdir / "checkpoints/7")  # its manifest is of another step
    before = contents(workdir)
    replay = replay_step(experiment, workdir, 8, progress=False)
    assert replay.start == 5 and replay.agrees
    assert contents(workdir) == before


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_told(run, experiment, tmp_path, monkeypatch):
    """Both times would otherwise begin at different steps, and sound hardware would be blamed."""
    workdir, compile = tmp_path / "run", Trainer.compile
    shutil.copytree(run, workdir)
    monkeypatch.setattr(Trainer, "compile", lambda *args: (compile(*args), shutil.rmtree(workdir / "checkpoints/5"))[0])
    with pytest.raises(UserError, match="the run went on and deleted its checkpoint of step 5 meanwhile; try again"):
        replay_step(experiment, workdir, 8, progress=False)


def test_a_device_that_computes_wrongly_once_is_named(run, experiment, monkeypatch):
    """At the second time, one bit of one parameter after step 7."""
    compile, calls = Trainer.compile, []

    def compile_faulty(trainer, state, batch):
        step = compile(trainer, state, batch)

        def faulty(state, batch):
            state, metrics = step(state, batch)
            calls.append(int(state.step))
            if calls.count(7) == 2 and calls[-1] == 7:
                scale = state.params["final_norm"]["scale"]
                bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
                broken = jax.lax.bitcast_convert_type(bits.at[3].set(bits[3] ^ (1 << 22)), jnp.float32)
                state.params["final_norm"]["scale"] = jax.device_put(broken, scale.sharding)
            return state, metrics

        return faulty

    monkeypatch.setattr(Trainer, "compile", compile_faulty)
    replay = replay_step(experiment, run, 9, progress=False)
    assert not replay.agrees and replay.first_difference == 8
    assert replay.differing["params/final_norm/scale"] == ["device 0 of process 0"] and "step" not in replay.differing
    assert replay.loss[0] == replay.logged != replay.loss[1]
    assert "params/final_norm/scale differs on device 0 of process 0" in str(replay)


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_that_the_run_does_not_have_is_told(run, experiment, step):
    with pytest.raises(UserError, match=rf"--replay_step={step} must lie between 1 and the run's 10 steps"):
        replay_step(experiment, run, step, progress=False)


def test_a_folder_without_a_run_is_told(tmp_path, experiment):
    with pytest.raises(UserError, match="holds no run"):
        replay_step(experiment, tmp_path / "nowhere", 1, progress=False)
    assert not (tmp_path / "nowhere").exists()

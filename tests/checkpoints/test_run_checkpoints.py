import logging
import resource
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import exit_codes
from llama4_jax.checkpoints import run_checkpoints
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.errors import UserError


def state_of(step):
    return {"step": jnp.int32(step), "params": {"a": jnp.arange(6.0).reshape(2, 3) * step, "b": (jnp.ones(2, jnp.bfloat16),)}}


def target_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


TARGET = target_of(state_of(1))


def folder_with(folder, steps, keep=3):
    checkpoints = RunCheckpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, state_of(step), {"read": step}, {"seed": 1})
    checkpoints.wait()
    checkpoints.close()
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_whole_and_old_ones_go(tmp_path):
    folder_with(tmp_path, [1, 2, 3], keep=2)
    assert names(tmp_path) == ["2", "3"]
    restored = RunCheckpoints(tmp_path, keep=2).restore_newest(TARGET)
    assert (restored.step, restored.data, restored.fingerprint) == (3, {"read": 3}, {"seed": 1})
    assert jax.tree.structure(restored.state) == jax.tree.structure(TARGET)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(3)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """The training step overwrites the state while the files are still being written."""
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    overwrite = jax.jit(lambda x: x * 0 - 7.0, donate_argnums=0)
    for step in range(1, 4):
        x = jnp.full((512, 1024), float(step))
        checkpoints.save(step, {"x": x}, {}, {})
        jax.block_until_ready(overwrite(x))
        checkpoints.wait()
        restored = checkpoints.restore_newest(target_of({"x": jnp.zeros((512, 1024))}))
        np.testing.assert_array_equal(restored.state["x"], float(step))


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "new", keep=1)
    assert checkpoints.restore_newest(TARGET) is None and checkpoints.newest_step() is None


def test_what_is_no_checkpoint_is_put_aside_and_leftovers_are_cleared(tmp_path, caplog):
    folder_with(tmp_path, [1, 2])
    (tmp_path / "3").mkdir()
    shutil.copytree(tmp_path / "2", tmp_path / "4", ignore=shutil.ignore_patterns("_CHECKPOINT_METADATA"))  # half copied
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "6").write_text("a file")
    (tmp_path / "notes").mkdir()
    with caplog.at_level(logging.WARNING):
        checkpoints = RunCheckpoints(tmp_path, keep=3)
    assert names(tmp_path) == ["1", "2", "3.incomplete-1", "4.incomplete-1", "6", "notes"]
    assert "checkpoint" in caplog.text and "3.incomplete-1" in caplog.text
    assert checkpoints.restore_newest(TARGET).step == 2
    checkpoints.save(3, state_of(3), {}, {})  # the names are free again
    checkpoints.wait()
    assert checkpoints.restore_newest(TARGET).step == 3


@pytest.mark.parametrize("damage", ["state/_METADATA", "state/manifest.ocdbt", "state/d", "data/metadata"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, caplog, damage):
    folder_with(tmp_path, [1, 2])
    path = tmp_path / "2" / damage
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text("{")
    checkpoints = RunCheckpoints(tmp_path, keep=2)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore_newest(TARGET).step == 1
    assert names(tmp_path) == ["1", "2.damaged-1"]
    assert "2 is damaged and was renamed" in caplog.text


def test_nothing_readable_is_an_error_now_and_at_the_next_start(tmp_path):
    folder_with(tmp_path, [2])
    shutil.rmtree(tmp_path / "2/state")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(set aside: 2\.incomplete-1\)"):
            RunCheckpoints(tmp_path, keep=2).restore_newest(TARGET)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t["params"].update(a=jnp.zeros((3, 2))), r"params/a is float32\[2, 3\] there, float32\[3, 2\] here"),
        (lambda t: t["params"].update(a=jnp.zeros((2, 3), jnp.bfloat16)), r"params/a is float32\[2, 3\] there, bfloat16"),
        (lambda t: t["params"].update(c=jnp.zeros(1)), "it has no params/c"),
        (lambda t: t["params"].pop("a"), "the run has no params/a"),
    ],
)
def test_other_arrays_are_refused_by_name_and_nothing_is_cast(tmp_path, change, message):
    folder_with(tmp_path, [1])
    other = state_of(1)
    change(other)
    with pytest.raises(UserError, match=message):
        RunCheckpoints(tmp_path, keep=1).restore_newest(target_of(other))
    assert names(tmp_path) == ["1"]


def test_a_full_disk_is_noticed_before_the_save(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"no room for the checkpoint of step 1: it needs 32 bytes and .* has 10"):
        checkpoints.save(1, state_of(1), {}, {})


@pytest.fixture
def files_of_at_most_a_megabyte():
    """Writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_in_the_background_is_told(tmp_path, files_of_at_most_a_megabyte):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"x": jax.random.normal(jax.random.key(0), (2**20,))}, {}, {})
    with pytest.raises(UserError, match=r"saving the checkpoint of step 1 to .* failed: "):
        checkpoints.wait()
    assert checkpoints.newest_step() is None


def test_a_save_whose_files_vanish_is_told(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, state_of(1), {}, {})
    checkpoints._manager.wait_until_finished()
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(UserError, match=r"saving the checkpoint of step 1 to .* failed: its files are gone"):
        checkpoints.wait()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file/run: Not a directory"):
        RunCheckpoints(tmp_path / "file/run", keep=1)


# ------------------------------------------------------------------------------------------------------------------------
# Several processes

PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from llama4_jax import app
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import MeshConfig
from llama4_jax.parallel import processes
from llama4_jax.parallel.mesh import make_mesh

def state_of(step, mesh):
    numbers = np.random.default_rng(step)
    def put(shape, dtype, *axes):
        x = numbers.standard_normal(shape).astype(dtype)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*axes)), lambda index: x[index])
    return {"a": put((16, 8), "float32", "fsdp", "tensor"), "b": put((24,), jnp.bfloat16, "fsdp"), "c": put((3,), "float32")}

def main(_):
    processes.start()
    mesh = make_mesh(MeshConfig(data=-1, fsdp=int(fsdp), tensor=2))
    checkpoints = RunCheckpoints(folder, keep=2)
    if action == "save":
        for step in (1, 2, 3):
            checkpoints.save(step, state_of(step, mesh), {"read": step}, {"seed": 7})
        checkpoints.wait()
    else:
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0, mesh))
        restored = checkpoints.restore_newest(target)
        assert (restored.data, restored.fingerprint) == ({"read": restored.step}, {"seed": 7})
        for x, y in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(restored.step, mesh)), strict=True):
            for one, other in zip(x.addressable_shards, y.addressable_shards, strict=True):
                np.testing.assert_array_equal(np.asarray(one.data), np.asarray(other.data))
        print("restored", restored.step)
    checkpoints.close()

action, folder, fsdp = sys.argv[1:]
del sys.argv[1:]  # absl's
app.run(main)
"""


def run_processes(start_job, count, *arguments, status=exit_codes.DONE):
    job = start_job(count, "-c", PROCESSES, *arguments, devices=8 // count)
    assert [process.ended(120) for process in job] == [status] * count, [process.output()[-2000:] for process in job]
    return job


def test_what_two_processes_saved_any_number_restores_bit_for_bit(start_job, tmp_path):
    """On other meshes too. A checkpoint that cannot be read ends all processes, and the next start takes the one before."""
    run_processes(start_job, 2, "save", tmp_path, 4)
    assert names(tmp_path) == ["2", "3"]
    for count, fsdp in ((1, 2), (4, 4)):
        for process in run_processes(start_job, count, "restore", tmp_path, fsdp):
            assert "restored 3" in process.output()
    shutil.rmtree(tmp_path / "3/state/d")
    job = run_processes(start_job, 2, "restore", tmp_path, 4, status=exit_codes.RETRY)
    assert any("cannot be read" in process.output() for process in job)
    assert names(tmp_path) == ["2", "3.damaged-1"]
    for process in run_processes(start_job, 2, "restore", tmp_path, 4):
        assert "restored 2" in process.output()

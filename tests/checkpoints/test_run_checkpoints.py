import contextlib
import errno
import io
import logging
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax import exit_codes
from llama4_jax.checkpoints import manifest, run_checkpoints
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import CheckpointConfig
from llama4_jax.errors import UserError


def state_of(step):
    return {"step": jnp.int32(step), "params": {"a": jnp.arange(6.0).reshape(2, 3) * step, "b": (jnp.ones(2, jnp.bfloat16),)}}


def target_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


TARGET = target_of(state_of(1))


def opened(folder, keep=3, **options):
    return RunCheckpoints(folder, CheckpointConfig(keep=keep, **options))


def folder_with(folder, steps, keep=3, values=None, **options):
    checkpoints = opened(folder, keep, **options)
    for step in steps:
        checkpoints.save(step, state_of(step), {"read": step}, {"seed": 1}, (values or {}).get(step))
    checkpoints.wait()
    checkpoints.close()
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_whole_and_old_ones_go(tmp_path):
    folder_with(tmp_path, [1, 2, 3], keep=2)
    assert names(tmp_path) == ["2", "3"]
    restored = opened(tmp_path, keep=2).restore_newest(TARGET)
    assert (restored.step, restored.data, restored.fingerprint) == (3, {"read": 3}, {"seed": 1})
    assert jax.tree.structure(restored.state) == jax.tree.structure(TARGET)
    for a, b in zip(jax.tree.leaves(restored.state), jax.tree.leaves(state_of(3)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    """The training step overwrites the state while the files are still being written."""
    checkpoints = opened(tmp_path, keep=1)
    overwrite = jax.jit(lambda x: x * 0 - 7.0, donate_argnums=0)
    for step in range(1, 4):
        x = jnp.full((512, 1024), float(step))
        checkpoints.save(step, {"x": x}, {}, {})
        jax.block_until_ready(overwrite(x))
        checkpoints.wait()
        restored = checkpoints.restore_newest(target_of({"x": jnp.zeros((512, 1024))}))
        np.testing.assert_array_equal(restored.state["x"], float(step))


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    checkpoints = opened(tmp_path / "new", keep=1)
    assert checkpoints.restore_newest(TARGET) is None and checkpoints.newest_step() is None


def test_what_is_no_checkpoint_is_put_aside_and_leftovers_are_cleared(tmp_path, caplog):
    folder_with(tmp_path, [1, 2])
    (tmp_path / "3").mkdir()
    shutil.copytree(tmp_path / "2", tmp_path / "4", ignore=shutil.ignore_patterns("manifest.json"))  # half copied
    shutil.copytree(tmp_path / "2", tmp_path / "5")
    (tmp_path / "7.saving.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(tmp_path / "2", tmp_path / "7.saving")  # whole, but the machine stopped before it was made to count
    shutil.copytree(tmp_path / "2", tmp_path / "0.deleted")
    (tmp_path / "6").write_text("a file")
    (tmp_path / "notes").mkdir()
    checkpoints = opened(tmp_path)
    assert names(tmp_path) == ["1", "2", "3", "4", "5", "6", "notes"]
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore_newest(TARGET).step == 2
    assert names(tmp_path) == ["1", "2", "3.damaged-1", "4.damaged-1", "5.damaged-1", "6", "notes"]
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "manifest.json is of step 2",
        "it has no manifest.json: it was copied in part, or is of a version that wrote none",
        "it has no manifest.json: it was copied in part, or is of a version that wrote none",
    ]
    checkpoints.save(3, state_of(3), {}, {})  # the names are free again
    checkpoints.wait()
    assert checkpoints.restore_newest(TARGET).step == 3


def test_read_only_changes_nothing_and_finds_what_is_whole(tmp_path, caplog):
    """A run that is training may be saving there: its 7.saving is no leftover."""
    folder_with(tmp_path, [1, 2])
    shutil.copytree(tmp_path / "2", tmp_path / "3")
    shutil.copytree(tmp_path / "2", tmp_path / "7.saving")
    (tmp_path / "0.deleted").mkdir()
    before = names(tmp_path)
    with caplog.at_level(logging.WARNING):
        checkpoints = RunCheckpoints(tmp_path, CheckpointConfig(), read_only=True)
        assert checkpoints.restore_newest(TARGET).step == 2
        assert checkpoints.restore_newest(TARGET, below=2).step == 1
    assert names(tmp_path) == before and (tmp_path / "7.saving/manifest.json").exists()
    assert f"checkpoint {tmp_path / '3'} is damaged, or was deleted meanwhile, and is passed over" in caplog.text
    with pytest.raises(io.UnsupportedOperation):
        checkpoints.save(8, state_of(8), {}, {})
    assert RunCheckpoints(tmp_path / "none", CheckpointConfig(), read_only=True).newest_step() is None
    assert not (tmp_path / "none").exists()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


DAMAGE = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "flipped": lambda path: flip(path, path.stat().st_size // 2, 3),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_no_file_can_be_damaged_without_the_checkpoint_before_being_taken(tmp_path, caplog, kind):
    """Each file in turn, the manifest too. The log has one line that names the file."""
    folder_with(tmp_path / "good", [1, 2])
    for path in files(tmp_path / "good/2"):
        name = path.relative_to(tmp_path / "good/2")
        shutil.copytree(tmp_path / "good", tmp_path / "copy")
        DAMAGE[kind](tmp_path / "copy/2" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            restored = opened(tmp_path / "copy").restore_newest(TARGET)
        if (kind, path.name) == ("longer", "manifest.json"):  # a blank after the JSON: nothing is wrong
            assert restored.step == 2
        else:
            assert restored.step == 1 and names(tmp_path / "copy") == ["1", "2.damaged-1"]
            (record,) = caplog.records
            assert path.name in record.getMessage()
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("verified", [True, False])
def test_flipped_bits_never_come_back_as_numbers_and_without_verification_they_do(tmp_path, monkeypatch, verified):
    """So this test can fail: what Orbax itself notices is not enough."""
    state = {"x": jax.random.normal(jax.random.key(0), (4096,))}
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state, {}, {})
    checkpoints.wait()
    if not verified:
        monkeypatch.setattr(manifest, "require_whole", lambda *_, **__: None)
    data = max(files(tmp_path / "1/state"), key=lambda path: path.stat().st_size)
    silent = 0
    for place in range(100, 8000, 400):
        flip(data, place)
        with contextlib.suppress(UserError, ValueError):
            silent += not np.array_equal(opened(tmp_path).restore_newest(target_of(state)).state["x"], state["x"])
        for aside in tmp_path.glob("1.damaged-*"):
            aside.rename(tmp_path / "1")
        flip(data, place)
    assert silent == 0 if verified else silent > 10


def test_a_file_that_somebody_added_is_no_damage(tmp_path):
    folder_with(tmp_path, [1])
    (tmp_path / "1/notes.txt").write_text("mine")
    assert opened(tmp_path).restore_newest(TARGET).step == 1


def test_nothing_whole_is_an_error_now_and_at_the_next_start(tmp_path):
    folder_with(tmp_path, [2])
    shutil.rmtree(tmp_path / "2/state")
    for _ in range(2):
        with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(set aside: 2\.damaged-1\)"):
            opened(tmp_path).newest_step()


def test_a_folder_that_is_suddenly_empty_is_no_new_run(tmp_path, caplog):
    """A disk that is not mounted, or a careless cleaner."""
    folder = folder_with(tmp_path / "checkpoints", [1, 2])
    shutil.rmtree(folder / "2")
    with caplog.at_level(logging.WARNING):
        assert opened(folder).newest_step() == 1
    assert "the checkpoint of step 2, which was saved last, is gone from" in caplog.text
    shutil.rmtree(folder)
    with pytest.raises(
        UserError, match=r"no checkpoint is in .*checkpoints, but one was saved; bring one back, or delete .*newest"
    ):
        opened(folder).newest_step()
    (tmp_path / "checkpoints.newest").unlink()
    assert opened(folder).newest_step() is None


def test_a_checkpoint_that_cannot_be_set_aside_is_told(tmp_path, monkeypatch):
    folder_with(tmp_path, [1, 2])
    flip(files(tmp_path / "2/state")[0], 0)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"checkpoint .*2 is damaged \(.*\) and cannot be renamed: Read-only file system"):
        opened(tmp_path).newest_step()


# ------------------------------------------------------------------------------------------------------------------------
# Which stay


def test_every_kth_and_the_best_stay_beside_the_newest(tmp_path):
    values = {step: {"heldout.loss": abs(step - 5.0)} for step in range(1, 10)} | {3: {}}
    folder_with(tmp_path, range(1, 10), keep=2, values=values, keep_every=4, keep_best="heldout.loss")
    assert names(tmp_path) == ["4", "5", "8", "9"]
    folder_with(tmp_path, [10], keep=1, values={10: {"heldout.loss": 0.0}}, keep_best="heldout.loss")
    assert names(tmp_path) == ["10", "5"]  # what stays is decided anew at each save; the older of equals is the best


def test_old_ones_go_only_when_the_new_one_counts(tmp_path, monkeypatch):
    folder_with(tmp_path, [1], keep=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write_manifest", fail)
    checkpoints = opened(tmp_path, keep=1)
    checkpoints.save(2, state_of(2), {}, {})
    with pytest.raises(UserError, match=r"saving the checkpoint of step 2 to .* failed: No space left on device"):
        checkpoints.wait()
    assert opened(tmp_path, keep=1).restore_newest(TARGET).step == 1
    assert names(tmp_path) == ["1"]


def test_what_cannot_be_deleted_is_only_told_and_goes_later(tmp_path, monkeypatch, caplog):
    """The checkpoint that pushed it out is safe: training goes on."""
    folder_with(tmp_path, [1], keep=1)
    checkpoints, original = opened(tmp_path, keep=1), shutil.rmtree
    monkeypatch.setattr(run_checkpoints.shutil, "rmtree", raising(OSError(errno.EBUSY, "Device or resource busy")))
    checkpoints.save(2, state_of(2), {}, {})
    with caplog.at_level(logging.WARNING):
        (saved,) = checkpoints.wait()
    assert saved.step == 2 and names(tmp_path) == ["1.deleted", "2"]
    assert f"cannot delete what is superfluous, {tmp_path / '1.deleted'}: Device or resource busy" in caplog.text
    assert opened(tmp_path, keep=1).newest_step() == 2
    monkeypatch.setattr(run_checkpoints.shutil, "rmtree", original)
    (tmp_path / "mine.deleted").mkdir()
    checkpoints.save(3, state_of(3), {}, {})
    checkpoints.wait()
    assert names(tmp_path) == ["3", "mine.deleted"]


def test_what_a_checkpoint_promises_is_done_before_it_counts(tmp_path):
    """And where it cannot be, none counts."""
    seen = []

    def before_counting():
        seen.append(names(tmp_path))
        if len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error")

    checkpoints = RunCheckpoints(tmp_path, CheckpointConfig(), before_counting=before_counting)
    checkpoints.save(1, state_of(1), {}, {})
    checkpoints.wait()
    checkpoints.save(2, state_of(2), {}, {})
    with pytest.raises(UserError, match=r"step 2 to .* failed: Input/output error"):
        checkpoints.wait()
    assert seen == [["1.saving"], ["1", "2.saving"]] and checkpoints.newest_step() == 1


def test_what_only_looks_newer_pushes_no_checkpoint_out(tmp_path):
    folder_with(tmp_path, [1], keep=1)
    checkpoints = opened(tmp_path, keep=1)
    (tmp_path / "900").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / "901")
    for step in (2, 3):
        checkpoints.save(step, state_of(step), {}, {})
        checkpoints.wait()
    assert names(tmp_path) == ["3", "900", "901"]
    assert checkpoints.restore_newest(TARGET).step == 3


def test_a_value_that_no_evaluation_gives_is_refused(tmp_path):
    checkpoints = opened(tmp_path, keep_best="heldout.lost")
    checkpoints.save(1, state_of(1), {}, {}, {"other.loss": 1.0})
    with pytest.raises(UserError, match=r"CheckpointConfig\.keep_best=heldout\.lost is unknown; there are heldout\.loss"):
        checkpoints.save(2, state_of(2), {}, {}, {"heldout.loss": 1.0})


# ------------------------------------------------------------------------------------------------------------------------
# Fit


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
        opened(tmp_path, keep=1).restore_newest(target_of(other))
    assert names(tmp_path) == ["1"]


def test_a_full_disk_is_noticed_before_the_save(tmp_path, monkeypatch):
    checkpoints = opened(tmp_path, keep=1)
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match=r"no room for the checkpoint of step 1: it needs 32 bytes and .* has 10"):
        checkpoints.save(1, state_of(1), {}, {})


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EIO])
def test_a_folder_that_is_gone_before_a_save_is_a_line(tmp_path, monkeypatch, number):
    checkpoints = opened(tmp_path)
    monkeypatch.setattr(run_checkpoints.shutil, "disk_usage", raising(OSError(number, os.strerror(number))))
    with pytest.raises(UserError, match=rf"saving the checkpoint of step 1 to {tmp_path} failed: .*{os.strerror(number)}"):
        checkpoints.save(1, state_of(1), {}, {})


@pytest.fixture
def files_of_at_most_a_megabyte():
    """Writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_in_the_background_is_told(tmp_path, files_of_at_most_a_megabyte):
    checkpoints = opened(tmp_path, keep=1)
    checkpoints.save(1, {"x": jax.random.normal(jax.random.key(0), (2**20,))}, {}, {})
    with pytest.raises(UserError, match=r"saving the checkpoint of step 1 to .* failed: "):
        checkpoints.wait()
    assert checkpoints.newest_step() is None


def text_of(number):
    return f"FAILED_PRECONDITION: Error writing local file [OS error {number}: {os.strerror(number)}]"


@pytest.mark.parametrize(
    "error",
    [
        *(
            OSError(number, os.strerror(number))
            for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT)
        ),
        ValueError(text_of(errno.ENOSPC)),
        ValueError(text_of(errno.EDQUOT)),
    ],
)
def test_what_a_user_must_mend_is_a_line(tmp_path, monkeypatch, error):
    """As the operating system says it, or TensorStore."""
    checkpoints = opened(tmp_path)
    monkeypatch.setattr(manifest, "sum_files", raising(error))  # called in the background
    checkpoints.save(1, state_of(1), {}, {})
    with pytest.raises(
        UserError, match=r"saving the checkpoint of step 1 to .* failed: .*(space|quota|Read-only|denied|No such)"
    ):
        checkpoints.wait()


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("Timed out while waiting for async_write_complete barrier."),
        jax.errors.JaxRuntimeError("UNAVAILABLE: Task process 1 is dead"),
        OSError(errno.EINTR, os.strerror(errno.EINTR)),
        ValueError("a programming error"),
    ],
)
def test_what_may_pass_by_itself_is_raised_as_it_is(tmp_path, monkeypatch, error):
    """A peer that dies in the last wait: a UserError would end the job with the status that no cluster tries again."""
    checkpoints = opened(tmp_path)
    monkeypatch.setattr(manifest, "sum_files", raising(error))  # called in the background
    checkpoints.save(1, state_of(1), {}, {})
    with pytest.raises(type(error)) as raised:
        checkpoints.wait()
    assert raised.value is error


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_slow_save_has_this_modules_time_and_not_the_twenty_minutes_of_orbax(tmp_path, monkeypatch):
    made, original = [], run_checkpoints.ocp.AsyncCheckpointer
    monkeypatch.setattr(
        run_checkpoints.ocp, "AsyncCheckpointer", lambda *args, **kwargs: made.append(kwargs) or original(*args, **kwargs)
    )
    opened(tmp_path)
    assert made == [{"timeout_secs": run_checkpoints._LIMIT_SECONDS}]


def slow_disk(monkeypatch):
    """An event that the next save waits for before its files are summed up."""
    released, original = threading.Event(), manifest.sum_files

    def sum_files(folder, names):
        assert released.wait(60)
        return original(folder, names)

    monkeypatch.setattr(manifest, "sum_files", sum_files)
    return released


def test_a_save_counts_when_it_is_durable_and_says_what_it_cost(tmp_path, monkeypatch):
    released = slow_disk(monkeypatch)
    checkpoints = opened(tmp_path)
    begin = time.monotonic()
    assert checkpoints.save(1, state_of(1), {}, {})
    called = time.monotonic() - begin
    assert checkpoints.check() == [] and "1" not in names(tmp_path)
    time.sleep(0.2)
    released.set()
    begin_wait = time.monotonic()
    (saved,) = checkpoints.wait()
    stood_still = called + time.monotonic() - begin_wait
    assert saved.step == 1 and saved.bytes == manifest.read_manifest(tmp_path / "1").bytes > 1000
    assert stood_still / 2 < saved.blocked_seconds <= stood_still  # not while training went on
    assert 0.2 <= saved.save_seconds <= time.monotonic() - begin
    assert checkpoints.check() == [] == checkpoints.wait()


def test_a_slow_disk_skips_saves_and_says_so_but_for_those_that_must_be(tmp_path, monkeypatch, caplog):
    released = slow_disk(monkeypatch)
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state_of(1), {}, {}, may_skip=True)
    with caplog.at_level(logging.WARNING):
        assert not checkpoints.save(2, state_of(2), {}, {}, may_skip=True)
    assert "no checkpoint of step 2: that of step 1 is still being written" in caplog.text
    threading.Timer(0.3, released.set).start()
    assert checkpoints.save(3, state_of(3), {}, {})
    first, second = checkpoints.wait()
    assert (first.step, second.step) == (1, 3) and first.blocked_seconds > 0.2
    assert checkpoints.save(4, state_of(4), {}, {}, may_skip=True)
    checkpoints.wait()
    assert names(tmp_path) == ["1", "3", "4"]


def test_a_save_whose_files_vanish_is_told(tmp_path, monkeypatch):
    released = slow_disk(monkeypatch)
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state_of(1), {}, {})
    checkpoints._checkpointer.wait_until_finished()
    shutil.rmtree(tmp_path / "1.saving")
    released.set()
    with pytest.raises(UserError, match=r"saving the checkpoint of step 1 to .* failed: "):
        checkpoints.wait()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file/run: Not a directory"):
        opened(tmp_path / "file/run", keep=1)


# ------------------------------------------------------------------------------------------------------------------------
# Several processes

PROCESSES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from llama4_jax import app
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import CheckpointConfig, MeshConfig
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
    checkpoints = RunCheckpoints(folder, CheckpointConfig(keep=2))
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
    """On other meshes too. All take the same checkpoint: where one file of one process is damaged, the one before it."""
    run_processes(start_job, 2, "save", tmp_path, 4)
    assert names(tmp_path) == ["2", "3"]
    for process in run_processes(start_job, 4, "restore", tmp_path, 4):
        assert "restored 3" in process.output()
    flip(max(files(tmp_path / "3/state/ocdbt.process_1/d"), key=lambda path: path.stat().st_size), 100)
    for process in (job := run_processes(start_job, 2, "restore", tmp_path, 4)):
        assert "restored 2" in process.output()
    assert "state/ocdbt.process_1/d" in job[0].output() and "is not what was written" in job[0].output()
    assert names(tmp_path) == ["2", "3.damaged-1"]
    for process in run_processes(start_job, 1, "restore", tmp_path, 2):
        assert "restored 2" in process.output()

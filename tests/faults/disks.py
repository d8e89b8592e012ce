"""Disks that are full, read-only, slow or gone."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from llama4_jax import exit_codes
from tests.faults.harness import SLOWLY, STEPS, Bench, Fault, Job, Run
from tests.faults.rows import Row

MANIFEST = "llama4_jax.checkpoints.manifest"
CHECKPOINTS = "llama4_jax.checkpoints.run_checkpoints"

APPEND = "llama4_jax.training.work_directory:WorkDirectory.append_metrics"
# A full disk's error, where in a save it comes, and the words of the line that must tell it.
FULL: dict[str, tuple[Fault, str]] = {
    "Orbax's files": (Fault("bound", f"{CHECKPOINTS}:RunCheckpoints.save", call=2, argument=30_000), "File too large"),
    "the manifest": (Fault("full", f"{MANIFEST}:write_manifest", call=2), "failed: No space left on device"),
    "the rename": (Fault("full", f"{CHECKPOINTS}:sync_folder", call=2), "failed: No space left on device"),
    "metrics.jsonl": (Fault("bound", APPEND, call=6, argument=2500), "metrics.jsonl: File too large"),
}


def stopped(run: Run, job: Job, row: Row, *words: str) -> Row:
    """The row of a start that must end for good with one line, which has some of these words."""
    lines = [line for line in job.output().splitlines() if "error: " in line] if job.ended() == [exit_codes.FAILED] else []
    if not any(each in line for line in lines for each in words):
        row.survived = "NO"
        row.wrong.append(f"ended with {job.ended()}: {job.output()[-300:]}")
    return row


def finished(run: Run, row: Row) -> Row:
    """Started again when the fault is mended: it goes on, and ends with the right bits."""
    newest = max(run.whole_steps(), default=0)
    run.finish()
    if (went_on := run.went_on(run.jobs[-1])) is not None:
        row.steps_lost = went_on[0] - went_on[1]
        if went_on[1] != newest:
            row.wrong.append(f"went on from {went_on[1]}, not {newest}")
    row.wrong += run.compare().wrong
    return row


def full_at(bench: Bench, moment: str) -> Row:
    """An error of the operating system at one place of a save."""
    run = bench.run(f"full-{len(bench.runs)}")
    row = Row("disk full", 0, moment, "refused")
    fault, words = FULL[moment]
    return finished(run, stopped(run, run.start([SLOWLY, fault]), row, words))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[bool]:
    """A file system of its own at `folder`; whether this user may make one."""
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


def full_for_real(bench: Bench) -> Iterator[Row]:
    """A file system without room: told before a save, or by the save itself. With room again the run goes on."""
    for moment, left in {"no room for a checkpoint": 100_000, "room for a part of one": 700_000}.items():
        folder = bench.folder / f"disk-{left}"
        with small_disk(folder, "16m") as mounted:
            row = Row("file system full", 0, moment, "refused")
            if not mounted:
                yield Row("file system full", 0, f"{moment}: NOT TRIED, this user may not mount")
                continue
            run = bench.run(f"disk-{left}/run")
            faults = [SLOWLY]
            if left == 700_000:  # past the look at the free space, as when another takes the room meanwhile
                faults.append(Fault("skip", f"{CHECKPOINTS}:RunCheckpoints._require_room"))
            job = run.start(faults)
            assert job.wait_until(lambda run=run: bool(run.whole_steps())), job.outputs()
            ballast = folder / "ballast"
            ballast.write_bytes(bytes(max(0, shutil.disk_usage(folder).free - left)))
            # A save that is under way when the room goes tells it itself.
            looked = ("no room for the checkpoint",) if left < 700_000 else ()
            row = stopped(run, job, row, "No space left on device", *looked)
            ballast.unlink()
            yield finished(run, row)


def read_only(bench: Bench) -> Iterator[Row]:
    """The file system becomes read-only; writable again, the run goes on."""
    folder = bench.folder / "read-only"
    with small_disk(folder, "32m") as mounted:
        if not mounted:
            yield Row("file system read-only", 0, "NOT TRIED: this user may not mount")
            return
        run = bench.run("read-only/run")
        job = run.start([SLOWLY])
        assert job.wait_until(lambda: bool(run.whole_steps())), job.outputs()
        job.kill()
        job.ended()
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        row = stopped(run, run.start([SLOWLY]), Row("file system read-only", 0, "at a start", "refused"), "error: cannot write")
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        yield finished(run, row)


def gone(bench: Bench) -> Iterator[Row]:
    """The folder of checkpoints disappears under a run: the next save says so, and no start begins anew."""
    run = bench.run("gone")
    job = run.start([SLOWLY])
    assert job.wait_until(lambda: len(run.whole_steps()) > 1), job.outputs()
    os.rename(run.checkpoints, run.checkpoints.with_name("elsewhere"))
    row = stopped(
        run, job, Row("folder of checkpoints gone", 0, "between two saves", "refused"), f"to {run.checkpoints} failed"
    )
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    row = stopped(run, run.start([SLOWLY]), row, "error: no checkpoint is in")
    os.rename(run.checkpoints.with_name("elsewhere"), put_away(run.checkpoints))
    yield finished(run, row)


def put_away(folder: Path) -> Path:
    """The empty folder that a refused start has made."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def slow(bench: Bench) -> Iterator[Row]:
    """A save takes longer than the interval: saves are skipped, steps are not, and a kill costs no more than it must."""
    run = bench.run("slow")
    slow_save = Fault("sleep", f"{MANIFEST}:sum_files", argument=0.6)
    job = run.start([SLOWLY, slow_save])
    assert job.wait_until(lambda: run.step() >= STEPS - 4), job.outputs()
    job.kill()
    job.ended()
    row = Row("slow disk", 0, "saves take four intervals; kill -9")
    if "the disk is too slow for checkpoint.every" not in job.output():
        row.wrong.append("said nothing")
    yield finished(run, row)

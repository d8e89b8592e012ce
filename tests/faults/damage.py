"""Checkpoints whose files are cut, emptied, deleted or flipped, and folders that only look like checkpoints."""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from llama4_jax import exit_codes
from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import CheckpointConfig
from tests.faults.harness import SLOWLY, Bench, Run
from tests.faults.rows import Row


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def largest(folder: Path) -> Path:
    """The file that holds the most numbers."""
    return max(files_below(folder / "state"), key=lambda path: path.stat().st_size)


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def _cut(folder: Path) -> None:
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# What is done to the folder of the newest checkpoint.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of its largest file flipped": lambda folder: flip(largest(folder), largest(folder).stat().st_size // 2, 4),
    "its largest file cut": _cut,
    "its largest file emptied": lambda folder: largest(folder).write_bytes(b""),
    "its largest file deleted": lambda folder: largest(folder).unlink(),
    "the data's position flipped": lambda folder: flip(folder / "data/metadata", 10, 1),
    "its manifest deleted": lambda folder: (folder / "manifest.json").unlink(),
    "its manifest cut": lambda folder: (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:100]),
    "all of its files gone": lambda folder: [path.unlink() for path in files_below(folder)],
}
# What appears beside the checkpoints, as if it were newer.
STRAYS: dict[str, Callable[[Path], object]] = {
    "an empty folder 900 beside them": lambda folder: (folder / "900").mkdir(),
    "a copy of the newest as 901": lambda folder: shutil.copytree(newest(folder), folder / "901"),
    "a half-copied 902": lambda folder: shutil.copytree(
        newest(folder), folder / "902", ignore=shutil.ignore_patterns("manifest.json", "d")
    ),
    "a file 903": lambda folder: (folder / "903").write_text("a file"),
    "leftovers 7.saving and 8.deleted": lambda folder: [(folder / name).mkdir() for name in ("7.saving", "8.deleted")],
}


def newest(folder: Path) -> Path:
    return max(
        (path for path in folder.iterdir() if path.name.isdigit() and (path / "state").is_dir()), key=lambda p: int(p.name)
    )


def of_runs(bench: Bench, kinds: Iterable[str]) -> Iterator[Row]:
    """One run, killed once for each kind and damaged then: it goes on from the checkpoint before, or the same one."""
    kinds = list(kinds)
    run = bench.run(f"damaged-{len(bench.runs)}", steps=16 * len(kinds) + 12)
    rows, expected = [], []
    for kind in kinds:
        job, step = run.start([SLOWLY]), run.step() + 9
        assert job.wait_until(lambda step=step: run.step() >= step and len(run.whole_steps()) > 1), job.outputs()
        job.kill()
        job.ended()
        *_, second, first = run.whole_steps()
        if kind in DAMAGE:
            DAMAGE[kind](run.checkpoints / str(first))
        else:
            STRAYS[kind](run.checkpoints)
        expected.append(second if kind in DAMAGE else first)
        rows.append(Row("newest checkpoint damaged" if kind in DAMAGE else "stray folder or file", 0, kind))
    run.finish()
    for row, job, want in zip(rows, run.jobs[1:], expected, strict=True):
        come_to, resumed = run.went_on(job)
        row.steps_lost = come_to - resumed
        if resumed != want:
            row.wrong.append(f"went on from {resumed}, not {want}")
        if row.fault.startswith("newest") and "is damaged and was renamed" not in job.output():
            row.wrong.append("said nothing")
    rows[-1].wrong += run.compare().wrong
    return iter(rows)


def of_all(bench: Bench) -> Iterator[Row]:
    """Every checkpoint damaged, or gone: no start from scratch, now or when it is tried again."""
    for moment, damage in {
        "every checkpoint flipped": lambda run: [flip(largest(p), 50, 1) for p in run.checkpoints.iterdir()],
        "the folder gone": lambda run: shutil.rmtree(run.checkpoints),
    }.items():
        run = bench.run(f"all-{len(bench.runs)}")
        job = run.start([SLOWLY])
        assert job.wait_until(lambda run=run: len(run.whole_steps()) > 1), job.outputs()
        job.kill()
        job.ended()
        damage(run)
        row = Row("every checkpoint damaged", 0, moment, "refused")
        for _ in range(2):
            job = run.start()
            if job.ended() != [exit_codes.FAILED] or "error: no checkpoint" not in job.output():
                row.wrong.append("began anew")
        yield row


def flips(bench: Bench, run: Run, seed: int, *, count: int, among: str = "**/*") -> Iterator[Row]:
    """A random bit of a random file of a finished run's newest checkpoint, so often: is what is restored what was saved?"""
    chance, folder = random.Random(seed), bench.folder / f"flips-{seed}-{len(list(bench.folder.iterdir()))}"
    shutil.copytree(run.checkpoints, folder)
    last = newest(folder)
    target, saved = shapes_of(last), restored(folder, shapes_of(last))
    for _ in range(count):
        files = [path for path in last.glob(among) if path.is_file() and path.stat().st_size]
        path = chance.choice(sorted(files, key=lambda path: path.stat().st_size))  # their names are of chance
        place, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        row = Row("a bit of a checkpoint flipped", seed, f"{path.relative_to(last)}, byte {place}, bit {bit}")
        flip(path, place, bit)
        try:
            step, arrays = restored(folder, target)
            if step == int(last.name) and differ(arrays, saved[1]):
                row.wrong.append("other numbers came back, and nothing said so")
        except Exception as error:  # without verification, anything that Orbax may raise
            row.survived = "NO"
            row.moment += f": {type(error).__name__}"
        for aside in folder.glob(f"{last.name}.damaged-*"):
            aside.rename(last)
        flip(path, place, bit)
        yield row
    shutil.rmtree(folder)


def shapes_of(step: Path):
    """A target to restore to: everything on one device."""
    import jax
    import orbax.checkpoint as ocp

    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        tree = dict(checkpointer.metadata(step / "state").item_metadata.tree)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in tree.items()}


def restored(folder: Path, target) -> tuple[int, dict[str, np.ndarray]]:
    with contextlib.closing(RunCheckpoints(folder, CheckpointConfig())) as checkpoints:
        found = checkpoints.restore_newest(target)
    return found.step, {name: np.asarray(x) for name, x in found.state.items()} | {"data": np.array(repr(found.data))}


def differ(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return any(one[name].tobytes() != other[name].tobytes() for name in other)

"""Checkpoints of a training run: what it takes to go on bit for bit after any interruption.

A checkpoint holds the training state, the data iterator's state and the experiment's fingerprint. It is written behind the
training steps, in this order, so that a folder whose name is a number is whole whenever the machine stops:

    12.saving...    Orbax writes its files here
    12.saving       all of them are there; each process reads back what it wrote and sums it up
    12.saving       + manifest.json, on the disk, and so are the lines of metrics.jsonl that the checkpoint promises
    12              it counts; only now others are deleted: 4 becomes 4.deleted, then nothing

Before a checkpoint is believed, every byte is compared with its manifest. One that is not what was written becomes
12.damaged-1, is told, and the newest whole one before it is taken. The file `checkpoints.newest` beside the folder says which
step was saved last, so that a folder that is suddenly empty, such as a disk that is not mounted, is no new run.
"""

import contextlib
import dataclasses
import errno
import io
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

from llama4_jax.checkpoints import manifest
from llama4_jax.checkpoints.keep import require_known_value, superfluous
from llama4_jax.checkpoints.manifest import Damaged, Manifest
from llama4_jax.checkpoints.partial_folder import sync_folder, write_durably
from llama4_jax.config import CheckpointConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes

PyTree = Any
logger = logging.getLogger(__name__)

_SAVING, _DELETED = ".saving", ".deleted"
_LEFTOVER = re.compile(rf"\d+({_SAVING}|{_DELETED}|\.orbax-checkpoint-tmp).*")
_SET_ASIDE = re.compile(r"\d+\.damaged-\d+")
_LIMIT_SECONDS = 4 * 3600  # that a process waits for the others to write or read their part
# What is wrong with a disk when a user must mend it. Any other error of a save, such as a peer that is gone, may pass by itself.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_DISK_ERRORS += (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG)


@dataclasses.dataclass(frozen=True)
class Restored:
    """One checkpoint.

    Attributes:
        step: updates done when it was saved.
        state: the training state, on the mesh of the target it was restored to.
        data: state of the data iterator.
        fingerprint: what `save` was given to tell one experiment from another.
    """

    step: int
    state: PyTree
    data: dict[str, Any]
    fingerprint: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that has become durable: it is on the disk, and its checksums with it.

    Attributes:
        step: of the run.
        bytes: of all its files.
        blocked_seconds: that training stood still for it.
        save_seconds: from the call of `save` until it was durable.
    """

    step: int
    bytes: int
    blocked_seconds: float
    save_seconds: float


class RunCheckpoints:
    """The checkpoints of one run, in one folder. Of several processes all make the same calls in the same order."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        before_counting: Callable[[], None] = lambda: None,
    ):
        """Opens the folder and clears what an interrupted save or deletion left.

        Args:
            read_only: nothing is cleared, set aside or saved, for the folder may be that of a run that is training.
            before_counting: called on the first process, in the background, when a checkpoint is written and does not count yet.
                An OSError of it is one of the save.

        Raises:
            UserError: the folder cannot be written.
        """
        self.folder, self._config, self._before_counting = Path(folder).absolute(), config, before_counting
        self._read_only = read_only
        self._last = self.folder.with_name(f"{self.folder.name}.newest")
        if not read_only:
            processes.from_first("the folder of checkpoints", self._clear, limit_seconds=_LIMIT_SECONDS)
        self._writing: _Writing | None = None
        self._saved: list[Saved] = []  # not asked for yet
        self._whole: int | None = None  # the step that was verified, until it is restored
        self._checkpointer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.StandardCheckpointHandler(),
                data=ocp.JsonCheckpointHandler(),
                fingerprint=ocp.JsonCheckpointHandler(),
            ),
            timeout_secs=_LIMIT_SECONDS,
        )

    def _clear(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete(_LEFTOVER)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror}") from error

    # --------------------------------------------------------------------------------------------------------------------
    # Saving

    def save(
        self,
        step: int,
        state: PyTree,
        data: dict[str, Any],
        fingerprint: dict[str, Any],
        values: dict[str, float] | None = None,
        *,
        may_skip: bool = False,
    ) -> bool:
        """Copies everything to host memory and returns; files are written behind. The arrays may be donated afterwards.

        Args:
            values: of evaluations at this step, such as heldout.bits_per_byte, by which the best checkpoint is kept.
            may_skip: when the save before is not done yet, say so and save nothing. Otherwise, wait for it.

        Returns whether it is being saved.

        Raises:
            UserError: the disk has no room or refuses, now or in an earlier save, or `values` lack the one that says which is
                best. What else an earlier save met with is raised as it is.
        """
        if self._read_only:
            raise io.UnsupportedOperation("these checkpoints were opened for reading")
        require_known_value(self._config, values or {})
        if may_skip and self._is_busy():
            if processes.is_first():
                logger.warning(
                    "no checkpoint of step %d: that of step %d is still being written after %.0f s; the disk is too slow for "
                    "checkpoint.every",
                    step,
                    self._writing.step,
                    time.perf_counter() - self._writing.begin,
                )
            return False
        self._settle()
        begin = time.perf_counter()
        self._require_room(step, sum(x.nbytes for x in jax.tree.leaves(state)))
        items = {
            "state": ocp.args.StandardSave(_flat(state)),
            "data": ocp.args.JsonSave(data),
            "fingerprint": ocp.args.JsonSave(fingerprint),
        }
        try:
            self._checkpointer.save(self._saving(step), args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            self._fail(step, error)
        self._writing = _Writing(
            step, begin, finish=lambda: self._finish(step, values or {}), tidy=lambda: self._delete_superfluous(step)
        )
        self._writing.blocked_seconds = time.perf_counter() - begin
        return True

    def check(self) -> list[Saved]:
        """The saves that have become durable since it was last asked. Raises what `save` does when one failed."""
        if self._writing is not None and not self._writing.is_alive():
            self._settle()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> list[Saved]:
        """Returns what `check` does when the last save is durable. Raises what `save` does when it failed."""
        self._settle()
        return self.check()

    def _settle(self) -> None:
        if self._writing is None:
            return
        begin = time.perf_counter()
        self._writing.join()
        writing, self._writing = self._writing, None
        if writing.error is not None:
            self._fail(writing.step, writing.error)
        blocked = writing.blocked_seconds + time.perf_counter() - begin
        self._saved.append(Saved(writing.step, writing.bytes, blocked, writing.seconds))

    def close(self) -> None:
        """Ends the writing. What `wait` would raise is only logged: call that first."""
        try:
            self._settle()
        except Exception as error:
            logger.warning("%s", _first_line(error))
        with contextlib.suppress(Exception):  # told above
            self._checkpointer.close()

    def _saving(self, step: int) -> Path:
        return self.folder / f"{step}{_SAVING}"

    def _is_busy(self) -> bool:
        """As process 0 sees it, for all to do the same."""
        return processes.from_first(
            "whether a checkpoint is being written", lambda: bool(self._writing and self._writing.is_alive())
        )

    def _require_room(self, step: int, needed: int) -> None:
        try:
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            self._fail(step, error)
        if free < needed:
            raise UserError(
                f"no room for the checkpoint of step {step}: it needs {needed:,} bytes and {self.folder} has {free:,}"
            )

    def _finish(self, step: int, values: dict[str, float]) -> int:
        """In the background: from Orbax's files to a checkpoint that counts. Returns its bytes."""
        self._checkpointer.wait_until_finished()
        folder = self._saving(step)

        def sum_own() -> dict[str, tuple[int, str]]:
            return manifest.sum_files(folder, manifest.written_by(folder, jax.process_index(), jax.process_count()))

        sums = processes.to_first(f"the checksums of step {step}", sum_own, limit_seconds=_LIMIT_SECONDS)

        def publish() -> int:
            whole = Manifest(step, values, {name: tuple(sum) for part in sums for name, sum in part.items()})
            try:
                manifest.require_nothing_else(folder, whole)
                manifest.write_manifest(folder, whole)
                self._before_counting()
                folder.rename(self.folder / str(step))
                sync_folder(self.folder)
                write_durably(self._last, f"{step}\n".encode())
            except OSError as error:
                if not _is_of_disk(error):
                    raise
                raise UserError(error.strerror or str(error)) from error
            return whole.bytes

        return processes.from_first(f"the checkpoint of step {step}", publish, limit_seconds=_LIMIT_SECONDS)

    def _delete_superfluous(self, saved: int) -> None:
        """Never the one that has just been saved, nor what only looks like a checkpoint: that is not this run's to delete.

        What cannot be deleted stays, and is told: the one that has just been saved is safe.
        """
        with _only_told(self.folder):
            known = {}
            for step in self._steps():
                with contextlib.suppress(Damaged):
                    found = manifest.read_manifest(self.folder / str(step))
                    if found.step == step <= saved:
                        known[step] = found.values
            for step in superfluous(self._config, known):
                with _only_told(folder := self.folder / str(step)):
                    folder.rename(folder.with_name(f"{step}{_DELETED}"))
            self._delete(re.compile(rf"\d+{_DELETED}"))  # and those that could not go before

    def _delete(self, pattern: re.Pattern[str]) -> None:
        for path in list(self.folder.iterdir()):
            if path.is_dir() and pattern.fullmatch(path.name):
                with _only_told(path):
                    shutil.rmtree(path)

    def _fail(self, step: int, error: Exception) -> NoReturn:
        """In one line where a user must mend something; as it is otherwise, for another try may do."""
        if isinstance(error, UserError) or _is_of_disk(error):
            raise UserError(f"saving the checkpoint of step {step} to {self.folder} failed: {_first_line(error)}") from error
        raise error

    # --------------------------------------------------------------------------------------------------------------------
    # Restoring

    def newest_step(self, *, below: int | None = None) -> int | None:
        """The newest step (below that one) whose checkpoint is whole, every byte of it, or None when the folder never held one.

        Newer ones that are not are set aside under another name (not so where they were opened read-only), each with a warning.

        Raises:
            UserError: the folder held checkpoints, but none is whole.
        """
        self._settle()
        steps, last, aside = processes.from_first("the list of checkpoints", self._look)
        if last is not None and last not in steps and last not in aside and steps and processes.is_first():
            logger.warning("the checkpoint of step %d, which was saved last, is gone from %s", last, self.folder)
        for step in steps:
            if below is not None and step >= below:
                continue
            damage = None if step == self._whole else self._damage(step)
            if damage is None:
                self._whole = step
                return step
            self.set_aside(step, damage)
        if below is None and (steps or aside or last is not None):
            processes.from_first("that no checkpoint is whole", self._refuse_to_begin)
        return None

    def restore_newest(self, target: PyTree, *, below: int | None = None) -> Restored | None:
        """The checkpoint of `newest_step(below=below)`, or None when there never was one.

        Args:
            target: a tree of ShapeDtypeStructs with shardings; any mesh will do.

        Raises:
            UserError: as `newest_step`; or the checkpoint holds arrays of other names, shapes or dtypes.
        """
        step = self.newest_step(below=below)
        if step is None:
            return None
        folder = self.folder / str(step)
        saved = self._checkpointer.metadata(folder).item_metadata["state"].tree
        _require_same_arrays(dict(saved), _flat(target), folder)
        items = {
            "state": ocp.args.StandardRestore(_flat(target)),
            "data": ocp.args.JsonRestore(),
            "fingerprint": ocp.args.JsonRestore(),
        }
        items = self._checkpointer.restore(folder, args=ocp.args.Composite(**items))
        self._whole = None
        state = jax.tree.unflatten(jax.tree.structure(target), [items["state"][path] for path in _flat(target)])
        return Restored(step=step, state=state, data=items["data"], fingerprint=items["fingerprint"])

    def set_aside(self, step: int, reason: str) -> None:
        """Renames the checkpoint of `step`, as one that is damaged, and tells why. Raises UserError when it cannot be renamed."""
        processes.from_first("a damaged checkpoint", lambda: self._set_aside(step, reason))

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, each process having read its share of the files; None: it is whole."""
        folder, share = self.folder / str(step), (jax.process_index(), jax.process_count())
        bar = tqdm(desc=f"verifying checkpoint {step}", unit="B", unit_scale=True, delay=5, disable=not processes.is_first())

        def verify() -> str | None:
            with bar:
                try:
                    manifest.require_whole(folder, step=step, share=share, advance=bar.update)
                except Damaged as damage:
                    return str(damage)

        found = processes.to_first(f"verifying checkpoint {step}", verify, limit_seconds=_LIMIT_SECONDS)
        return processes.from_first(
            f"whether checkpoint {step} is whole", lambda: next(filter(None, found), None), limit_seconds=_LIMIT_SECONDS
        )

    def _look(self) -> tuple[list[int], int | None, list[int]]:
        """The steps that there are, newest first; the one that was saved last; those that were set aside."""
        try:
            last = int(self._last.read_text())
        except (FileNotFoundError, ValueError):
            last = None
        aside = [int(path.name.partition(".")[0]) for path in self._aside()]
        return sorted(self._steps(), reverse=True), last, aside

    def _refuse_to_begin(self) -> None:
        aside = ", ".join(path.name for path in self._aside())
        what = (
            f"no checkpoint in {self.folder} can be read (set aside: {aside})"
            if aside
            else f"no checkpoint is in {self.folder}"
        )
        raise UserError(
            f"{what}, but one was saved; bring one back, or delete {self._last} and what was set aside to start anew"
        )

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._paths() if path.is_dir() and re.fullmatch(r"\d+", path.name)]

    def _aside(self) -> list[Path]:
        return sorted(path for path in self._paths() if _SET_ASIDE.fullmatch(path.name))

    def _paths(self) -> list[Path]:
        """What the folder holds; opened read-only there may be none."""
        return [] if self._read_only and not self.folder.exists() else list(self.folder.iterdir())

    def _set_aside(self, step: int, damage: str) -> None:
        source = self.folder / str(step)
        if self._read_only:
            logger.warning("checkpoint %s is damaged, or was deleted meanwhile, and is passed over: %s", source, damage)
            return
        target = next(path for n in range(1, 1_000_000) if not (path := self.folder / f"{step}.damaged-{n}").exists())
        try:
            source.rename(target)
        except OSError as error:
            raise UserError(f"checkpoint {source} is damaged ({damage}) and cannot be renamed: {error.strerror}") from error
        logger.warning("checkpoint %s is damaged and was renamed to %s: %s", source, target.name, damage)


class _Writing(threading.Thread):
    """One save, from its files to the checkpoint that counts."""

    def __init__(self, step: int, begin: float, *, finish: Callable[[], int], tidy: Callable[[], None]):
        """`finish` makes the checkpoint count and returns its bytes; then the first process calls `tidy`."""
        super().__init__(name="checkpoint", daemon=True)  # of one name for all saves: see processes
        self.step, self.begin, self._finish, self._tidy = step, begin, finish, tidy
        self.blocked_seconds = self.seconds = 0.0
        self.bytes = 0
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.bytes = self._finish()
            self.seconds = time.perf_counter() - self.begin
            if processes.is_first():
                self._tidy()
        except Exception as error:
            self.error = error


def _flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as params/embedding: names that outlive the types of the containers around them."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _require_same_arrays(saved: dict[str, Any], target: dict[str, Any], folder: Path) -> None:
    """Orbax would cast another dtype without a word; names, shapes and dtypes must all be the same."""
    for path in sorted(saved.keys() ^ target.keys()):
        raise UserError(f"checkpoint {folder} does not fit: {'it has no' if path in target else 'the run has no'} {path}")
    for path, want in target.items():
        have = saved[path]
        if (tuple(have.shape), have.dtype) != (want.shape, want.dtype):
            raise UserError(
                f"checkpoint {folder} does not fit: {path} is {have.dtype}{list(have.shape)} there, {want.dtype}{list(want.shape)} here"
            )


@contextlib.contextmanager
def _only_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("cannot delete what is superfluous, %s: %s", folder, error.strerror or error)


def _is_of_disk(error: Exception) -> bool:
    """Whether a disk is at fault; TensorStore tells it in the text of another exception."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_ERRORS
    return any(os.strerror(number) in str(error) for number in _DISK_ERRORS)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

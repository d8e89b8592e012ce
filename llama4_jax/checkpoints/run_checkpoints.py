"""Checkpoints of a training run: what it takes to go on bit for bit after any interruption.

A checkpoint holds the training state, the data iterator's state and the experiment's fingerprint. Orbax writes it in
the background and renames it to its step number when it is whole.
"""

import contextlib
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llama4_jax.errors import UserError
from llama4_jax.parallel import processes

PyTree = Any
logger = logging.getLogger(__name__)


@dataclass
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


class RunCheckpoints:
    """The checkpoints of one run, in one folder.

    Opening a folder clears what an interrupted save left behind, and sets damaged steps aside under another name.
    """

    def __init__(self, folder: Path, *, keep: int):
        """Raises UserError when the folder cannot be made or written."""
        self.folder = Path(folder).absolute()
        processes.from_first("the folder of checkpoints", self._clear)
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
                "fingerprint": ocp.JsonCheckpointHandler(),
            },
        )

    def _clear(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder}: {error.strerror}") from error
        for leftover in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for step in self._steps():
            if not _is_complete(self.folder / str(step)):
                self._set_aside(step, "incomplete")

    def save(self, step: int, state: PyTree, data: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Copies everything to host memory and returns; files are written behind. The arrays may be donated afterwards.

        Raises:
            UserError: the disk has no room, or an earlier save failed.
        """
        self.wait()  # a disk slower than the cadence holds training up rather than filling memory
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"no room for the checkpoint of step {step}: it needs {needed:,} bytes and {self.folder} has {free:,}"
            )
        self._saving = step
        items = {
            "state": ocp.args.StandardSave(_flat(state)),
            "data": ocp.args.JsonSave(data),
            "fingerprint": ocp.args.JsonSave(fingerprint),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except (OSError, ValueError) as error:
            raise self._save_error(error) from error

    def check(self) -> None:
        """Raises UserError if a save failed in the background."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._save_error(error) from error

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises UserError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        if self._saving is not None and processes.is_first() and not _is_complete(self.folder / str(self._saving)):
            raise self._save_error(FileNotFoundError("its files are gone"))

    def close(self) -> None:
        self._manager.close()

    def restore_newest(self, target: PyTree) -> Restored | None:
        """The newest checkpoint that can be read, or None when the folder never held one.

        A checkpoint that cannot be read is set aside and the one before it is tried, with a warning. Of several processes, some
        of which may have read their parts, the job ends instead; started again, it tries the one before.

        Args:
            target: a tree of ShapeDtypeStructs with shardings; any mesh will do.

        Raises:
            UserError: the folder held checkpoints but none can be read, or one holds arrays of other names, shapes or dtypes.
        """
        for step in processes.from_first("the list of checkpoints", lambda: sorted(self._steps(), reverse=True)):
            try:
                saved = self._manager.item_metadata(step)["state"]
            except Exception as error:
                self._set_aside(step, "damaged", error)
                continue
            _require_same_arrays(dict(saved), _flat(target), self.folder / str(step))
            items = {
                "state": ocp.args.StandardRestore(_flat(target)),
                "data": ocp.args.JsonRestore(),
                "fingerprint": ocp.args.JsonRestore(),
            }
            try:
                items = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:
                self._set_aside(step, "damaged", error)
                continue
            state = jax.tree.unflatten(jax.tree.structure(target), [items["state"][path] for path in _flat(target)])
            return Restored(step=step, state=state, data=items["data"], fingerprint=items["fingerprint"])
        if aside := sorted(path.name for path in self.folder.iterdir() if _SET_ASIDE.fullmatch(path.name)):
            raise UserError(
                f"no checkpoint in {self.folder} can be read (set aside: {', '.join(aside)}); "
                f"repair one, or delete the folder to start from step 0"
            )
        return None

    def newest_step(self) -> int | None:
        """The newest step on disk."""
        return processes.from_first("the newest checkpoint", lambda: max(self._steps(), default=None))

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self.folder.iterdir() if path.is_dir() and re.fullmatch(r"\d+", path.name)]

    def _set_aside(self, step: int, reason: str, error: Exception | None = None) -> None:
        source = self.folder / str(step)
        numbers = (n for n in range(1, 1_000_000))
        target = next(path for n in numbers if not (path := self.folder / f"{step}.{reason}-{n}").exists())
        with contextlib.suppress(FileNotFoundError):  # another process was first
            source.rename(target)
        because = f": {_first_line(error)}" if error else ""
        logger.warning("checkpoint %s is %s and was renamed to %s%s", source, reason, target.name, because)
        if jax.process_count() > 1 and error:
            raise RuntimeError(f"checkpoint {source} cannot be read{because}") from error
        if hasattr(self, "_manager"):
            self._manager.reload()

    def _save_error(self, error: Exception) -> UserError:
        return UserError(f"saving the checkpoint of step {self._saving} to {self.folder} failed: {_first_line(error)}")


_SET_ASIDE = re.compile(r"\d+\.(incomplete|damaged)-\d+")


def _is_complete(folder: Path) -> bool:
    """Whether a step's folder holds all that Orbax puts there. (Its files' contents are not verified.)"""
    return all(
        (folder / name).exists()
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "data/metadata", "fingerprint/metadata")
    )


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

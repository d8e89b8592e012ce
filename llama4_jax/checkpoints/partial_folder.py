"""A folder that appears whole or not at all, and can be gone on with after an interruption."""

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama4_jax.errors import UserError

CHECKSUMS = "SHA256SUMS"  # in the form of `sha256sum --check`
_TASK = ".task"


class PartialFolder:
    """Files are written to `path`, beside the folder's place, and renamed to it by `publish`.

    Left without publishing, it is removed; but with a `task`, whole files and their checksums are kept for the next attempt at
    the same task.

    Attributes:
        path: where to write.
        whole: files that an earlier attempt finished and whose content is still what it wrote.
    """

    def __init__(self, final: Path, task: str | None = None):
        """
        Args:
            final: must not exist, or be an empty folder.
            task: what is being done, to be taken up by whoever does the same; None: nothing is kept, nor are checksums made.

        Raises:
            UserError: the folder is in use, cannot be made, or holds another unfinished task.
        """
        self.final, self._task, self._sums = final, task, {}
        self.path = final.parent / f".{final.name}.partial{'' if task else f'-{uuid.uuid4().hex[:8]}'}"
        try:
            if final.exists() and (not final.is_dir() or any(final.iterdir())):
                raise UserError(f"{final}: already holds files; choose another folder or remove them")
            self.path.mkdir(parents=True, exist_ok=task is not None)
            if task:
                self._take_up(task)
        except OSError as error:
            raise self.error(error) from None
        self.whole = frozenset(self._sums)

    def _take_up(self, task: str) -> None:
        marker = self.path / _TASK
        if not marker.exists():
            write_durably(marker, task.encode())
        self._lock = marker.open("rb")  # held until this process ends or lets go of the folder
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path}: another process is writing there") from None
        if marker.read_bytes() != task.encode():
            raise UserError(f"{self.path} holds an unfinished conversion of something else; remove it, or choose another place")
        for name, digest in _read_lines(self.path / CHECKSUMS):
            if (path := self.path / name).is_file() and hash_file(path) == digest:
                self._sums[name] = digest
        for path in self.path.rglob("*"):
            if path.is_file() and path.name != _TASK and str(path.relative_to(self.path)) not in self._sums:
                path.unlink()
        self._write_checksums()

    def finish_file(self, name: str) -> None:
        """Called when a file is whole; with a task, it is one that stays."""
        if self._task:
            self._sums[name] = hash_file(self.path / name)
            with open(self.path / CHECKSUMS, "a") as file:
                file.write(_line(name, self._sums[name]))
                file.flush()
                os.fsync(file.fileno())

    def _write_checksums(self) -> None:
        write_durably(self.path / CHECKSUMS, "".join(_line(*item) for item in sorted(self._sums.items())).encode())

    def publish(self) -> None:
        """Moves the folder to its place."""
        try:
            if self._task:
                self._write_checksums()
                (self.path / _TASK).unlink()
            if self.final.is_dir():
                self.final.rmdir()  # empty
            self.path.rename(self.final)
            sync_folder(self.final.parent)
        except OSError as error:
            raise self.error(error) from None

    def error(self, error: OSError) -> UserError:
        return UserError(f"{self.final}: cannot be written: {error.strerror or error}")

    def __enter__(self) -> "PartialFolder":
        return self

    def __exit__(self, *exception) -> None:
        if self._task:
            self._lock.close()
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def hash_file(path: Path) -> str:
    """SHA-256 of what is on disk. Raises UserError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _line(name: str, digest: str) -> str:
    return f"{digest}  {name}\n"


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Names and digests, without a last line that was cut short."""
    for line in path.read_text().split("\n")[:-1] if path.exists() else ():
        digest, _, name = line.partition("  ")
        if not re.fullmatch("[0-9a-f]{64}", digest) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{path}: cannot read the line {line[:200]!r}")
        yield name, digest


def verify(path: Path) -> int:
    """Compares what was written with its checksums: a folder with its SHA256SUMS, a file with the one beside it.

    Returns how many files are what was written.

    Raises:
        UserError: there are no checksums, or a file is missing or not what was written.
    """
    folder, sums = (path, path / CHECKSUMS) if path.is_dir() else (path.parent, path.with_name(f"{path.name}.sha256"))
    if not sums.is_file():
        raise UserError(f"{path}: has no {sums.name} to verify it by")
    count = 0
    for name, digest in _read_lines(sums):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing, but {sums.name} lists it")
        if hash_file(folder / name) != digest:
            raise UserError(f"{folder / name}: is not what was written: its SHA-256 is not that of {sums.name}")
        count += 1
    return count


def write_durably(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also after the machine has stopped."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

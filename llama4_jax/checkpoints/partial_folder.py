"""A folder that appears whole or not at all, and can be gone on with after an interruption."""

import hashlib
import os
import shutil
import uuid
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
        if marker.read_bytes() != task.encode():
            raise UserError(f"{self.path} holds an unfinished conversion of something else; remove it, or choose another place")
        sums = read_checksums(self.path) if (self.path / CHECKSUMS).exists() else {}
        self._sums = {
            name: digest
            for name, digest in sums.items()
            if _is_file(self.path / name) and hash_file(self.path / name) == digest
        }
        for path in self.path.iterdir():
            if path.name not in (*self._sums, _TASK):
                path.unlink() if path.is_file() else shutil.rmtree(path)
        self._write_checksums()

    def finish_file(self, name: str) -> None:
        """Called when a file is whole; with a task, it is one that stays."""
        if self._task:
            self._sums[name] = hash_file(self.path / name)
            self._write_checksums()

    def _write_checksums(self) -> None:
        lines = [f"{digest}  {name}\n" for name, digest in sorted(self._sums.items())]
        write_durably(self.path / CHECKSUMS, "".join(lines).encode())

    def publish(self) -> None:
        """Moves the folder to its place."""
        try:
            (self.path / _TASK).unlink(missing_ok=True)
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
        if not self._task:
            shutil.rmtree(self.path, ignore_errors=True)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def hash_file(path: Path) -> str:
    """SHA-256 of what is on disk."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """The digest of each file that a folder's SHA256SUMS lists. Raises UserError."""
    sums = {}
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{folder}: has no {CHECKSUMS} to verify it by") from None
    for line in lines:
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{folder / CHECKSUMS}: cannot read the line {line!r}")
        sums[name] = digest
    return sums


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

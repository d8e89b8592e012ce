"""What a whole checkpoint consists of: the size and the SHA-256 of each of its files.

Nothing below notices a flipped bit: Orbax's formats carry checksums of their indices, not of numbers. So a checkpoint counts
only when every byte is what was read back after it was written. SHA-256 is fast on hosts that have instructions for it
(1.8 GB/s a thread), and `sha256sum` tells a single file by hand.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llama4_jax.checkpoints.partial_folder import hash_file, sync_folder, write_durably
from llama4_jax.errors import UserError

MANIFEST = "manifest.json"
_THREADS = min(8, os.cpu_count() or 1)  # hashing lets go of Python's lock


class Damaged(Exception):
    """A checkpoint is not what was written. One line says which file, and what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What is known of one checkpoint.

    Attributes:
        step: of the run.
        values: of evaluations at this step, by evaluation and name, such as heldout.bits_per_byte.
        files: by path within the checkpoint's folder, bytes and SHA-256.
    """

    step: int
    values: dict[str, float]
    files: dict[str, tuple[int, str]]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of these files, which are on the disk afterwards. Raises UserError when one cannot be read."""

    def of(name: str) -> tuple[int, str]:
        path = folder / name
        digest = hash_file(path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what TensorStore writes is there already; small files of Orbax are not
            return os.fstat(file.fileno()).st_size, digest

    names = list(names)
    with ThreadPoolExecutor(_THREADS, "hash") as threads:
        return dict(zip(names, threads.map(of, names), strict=True))


def files_of(folder: Path) -> list[str]:
    """All files below a checkpoint's folder but the manifest, by their path within it."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name not in (MANIFEST, f"{MANIFEST}.tmp"))


def written_by(folder: Path, process: int, processes: int) -> list[str]:
    """Those of them that this process of several wrote: Orbax gives each a folder; what is in none is of process 0."""
    own = {f"ocdbt.process_{i}": i for i in range(processes)}
    return [name for name in files_of(folder) if next((own[p] for p in Path(name).parts if p in own), 0) == process]


def require_nothing_else(folder: Path, manifest: Manifest) -> None:
    """Raises UserError when there is a file that no process has summed up, or one of those is gone."""
    for name in sorted(set(files_of(folder)).symmetric_difference(manifest.files)):
        raise UserError(f"its file {name} is {'gone' if name in manifest.files else 'of no process'}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Says that a checkpoint is whole; to be called last."""
    for directory in [path for path in folder.rglob("*") if path.is_dir()]:
        sync_folder(directory)
    content = dataclasses.asdict(manifest)
    text = json.dumps(content | {"sha256": _sum(content)}, indent=1)
    write_durably(folder / MANIFEST, text.encode())


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Raises Damaged when there is none, or it makes no sense."""
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        if content.pop("sha256") != _sum(content):
            raise Damaged(f"the content of {MANIFEST} is not what was written")
        files = {name: (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return Manifest(int(content["step"]), dict(content["values"]), files)
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}: it was copied in part, or is of a version that wrote none") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {type(error).__name__}: {error}") from None


def require_whole(
    folder: Path,
    *,
    step: int | None = None,
    share: tuple[int, int] = (0, 1),
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Returns when every byte of a checkpoint is what was written. (Files that somebody added do not matter: none is read.)

    Args:
        folder: of the checkpoint.
        step: that it must be of; None: any.
        share: (i, n): read the i-th of n parts of the files alone, of about equal size; n processes verify it all.
        advance: hears how many bytes more have been read.

    Raises:
        Damaged: they are not.
    """
    manifest = read_manifest(folder)
    if step not in (None, manifest.step):
        raise Damaged(f"{MANIFEST} is of step {manifest.step}")
    index, count = share
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name][0], name))

    def verify(name: str) -> str | None:
        size, digest = manifest.files[name]
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, not {size:,}"
            if hash_file(folder / name) != digest:
                return f"the content of {name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, UserError) as error:
            return f"{name} cannot be read: {error}"
        advance(size)

    with ThreadPoolExecutor(_THREADS, "verify") as threads:
        for damage in threads.map(verify, by_size[index::count]):
            if damage:
                raise Damaged(damage)

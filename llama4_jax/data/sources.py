"""Documents of a source, one after another: files and folders here or in a bucket, and the Python that runs."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama4_jax.data.bad_records import BadRecord, BadRecords
from llama4_jax.data.python_corpus import python_documents
from llama4_jax.data.records import LINES, READERS, json_records, suffix_of
from llama4_jax.errors import UserError

PYTHON_STDLIB = "python:stdlib"
_INSTALL = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "hf": "huggingface_hub"}


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its name within its source: the path relative to the source, and for a record its line or number."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """The JSON on one line of a file."""

    name: str  # within its source, as a Document's
    place: str  # what messages call it
    folder: str  # of the file: a path or a URL
    value: Any


@dataclasses.dataclass(frozen=True)
class _File:
    name: str  # within its source
    place: str  # what messages call it
    size: int  # bytes
    open: Callable[[], BinaryIO]


def read_source(source: str, text_field: str = "text", bad: BadRecords | None = None) -> list[Document]:
    """All of `iterate_source`."""
    return list(iterate_source(source, text_field, bad))


def iterate_source(
    source: str,
    text_field: str = "text",
    bad: BadRecords | None = None,
    advance: Callable[[int], object] = lambda size: None,
) -> Iterator[Document]:
    """The documents of a source (see DataConfig), in an order that does not depend on the machine.

    `bad` hears of files that are damaged or not UTF-8, and of records that are not or have no text in `text_field`, and says
    whether to go on without them; None: never. `advance` hears how many bytes of files have been read since it last heard; they
    add up to `source_size`.

    Raises UserError for a source that is missing or empty, and for what `bad` does not allow to be left out; the message names
    the file and the line or record.
    """
    holds_text = False
    for document in _documents(source, text_field, bad or BadRecords(), advance):
        holds_text = holds_text or bool(document.text)
        yield document
    if not holds_text:
        raise UserError(f"the data source {source} holds no text")


def iterate_records(source: str, bad: BadRecords) -> Iterator[Record]:
    """The JSON on each line of the .jsonl, .jsonl.gz and .jsonl.zst of a source. Raises UserError as iterate_source does."""
    if source == PYTHON_STDLIB:
        raise UserError(f"{source} holds text, not JSON lines")
    files = [file for file in _files(source) if suffix_of(file.name) in LINES]
    if not files:
        raise UserError(f"the data source {source} holds no file that ends in {', '.join(LINES)}")
    for file in files:
        try:
            with contextlib.closing(file.open()) as content:
                for number, value in json_records(LINES[suffix_of(file.name)](content, file.place), file.place, bad):
                    place, folder = f"{file.place}, line {number}", os.path.dirname(file.place)
                    yield Record(f"{file.name}:{number}", place, folder, value)
        except BadRecord as error:
            bad.leave_out(error)
        except OSError as error:
            raise UserError(f"cannot read {file.place}: {error.strerror or error}") from None


def source_size(source: str) -> int:
    """Bytes of the files of a source, for a progress bar; 0 for `python:stdlib`, which is read too fast to need one."""
    return 0 if source == PYTHON_STDLIB else sum(file.size for file in _files(source))


def _documents(source: str, text_field: str, bad: BadRecords, advance: Callable[[int], object]) -> Iterator[Document]:
    if source == PYTHON_STDLIB:
        yield from (Document(name, text) for name, text in python_documents())
        return
    for file in _files(source):
        suffix, done = suffix_of(file.name), 0
        try:
            with contextlib.closing(file.open()) as content:
                for number, text in READERS[suffix](content, file.place, text_field, bad):
                    yield Document(file.name if number is None else f"{file.name}:{number}", text)
                    if suffix.startswith(".jsonl"):  # the others do not read from start to end
                        done, before = content.tell(), done
                        advance(done - before)
        except BadRecord as error:  # the rest of the file is lost
            bad.leave_out(error)
        except OSError as error:
            raise UserError(f"cannot read {file.place}: {error.strerror or error}") from None
        advance(file.size - done)


def _files(source: str) -> Iterator[_File]:
    return _remote_files(source) if "://" in source else _local_files(source)


def _local_files(source: str) -> Iterator[_File]:
    """The file itself, or all files below the folder whose suffix we read, but for hidden ones."""
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"no data at {source}: give a file, a folder or {PYTHON_STDLIB}")
    if (path / "manifest.json").is_file() and (path / "tokenizer.json").is_file():
        raise UserError(
            f"{source} holds token ids that llama4_jax.prepare made: name it in data.prepared, not among the sources"
        )
    names = [path.name]
    if path.is_dir():
        found = []
        for folder, subfolders, files in os.walk(path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            found += [Path(folder, name).relative_to(path).as_posix() for name in files]
        names = found
    for name in _readable(names, str(path), path.is_dir()):
        file = path / name if path.is_dir() else path
        yield _File(name, str(file), _local_size(file), functools.partial(open, file, "rb"))


def _local_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:  # a link to nowhere
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _remote_files(source: str) -> Iterator[_File]:
    """The same of a URL that fsspec knows, such as gs://bucket/folder."""
    import fsspec

    protocol = source.partition("://")[0]
    try:
        system, root = fsspec.core.url_to_fs(source)
    except ImportError:
        package = _INSTALL.get(protocol, "the package that fsspec asks for")
        raise UserError(f"{source} needs {package}: pip install 'llama4-jax[cloud]'") from None
    except ValueError as error:
        raise UserError(f"cannot read {source}: {error}") from None
    try:
        is_folder = system.isdir(root)
        if not is_folder and not system.exists(root):
            raise UserError(f"no data at {source}")
        names = [os.path.relpath(path, root) for path in system.find(root)] if is_folder else [root.rsplit("/", 1)[-1]]
    except UserError:
        raise
    except Exception as error:  # what a cloud's library raises is its own
        raise UserError(f"cannot list {source}: {' '.join(str(error).split()) or type(error).__name__}") from None
    for name in _readable(names, source, is_folder):
        path = f"{root}/{name}" if is_folder else root
        place = f"{source.rstrip('/')}/{name}" if is_folder else source
        yield _File(name, place, system.size(path) or 0, functools.partial(system.open, path, "rb"))


def _readable(names: list[str], place: str, is_folder: bool) -> list[str]:
    """The names that end in a suffix we read, sorted as paths, but for hidden ones."""
    endings = ", ".join(READERS)
    if not is_folder:
        if suffix_of(names[0]) is None:
            raise UserError(f"cannot tell what {place} holds: its name must end in {endings}")
        return names
    shown = [name for name in names if suffix_of(name) and not any(part.startswith(".") for part in name.split("/"))]
    if not shown:
        raise UserError(f"the folder {place} holds no file that ends in {endings}")
    return sorted(shown)

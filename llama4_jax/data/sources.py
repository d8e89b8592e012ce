"""Documents from files, folders, JSONL records and the Python that runs."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from llama4_jax.data.python_corpus import python_documents
from llama4_jax.errors import UserError

PYTHON_STDLIB = "python:stdlib"
_TEXT_SUFFIXES = (".txt", ".md", ".py")
_SUFFIXES = (*_TEXT_SUFFIXES, ".jsonl")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its name within its source: the path relative to the source, and for a JSONL record its line."""

    name: str
    text: str


def read_source(source: str, text_field: str = "text") -> list[Document]:
    """All documents of a source (see DataConfig), in an order that does not depend on the machine.

    Raises UserError for a source that is missing or empty, a file that is not UTF-8, and a JSONL line that is not a record
    with text in `text_field`; the message names the file and the line.
    """
    if source == PYTHON_STDLIB:
        documents = [Document(name, text) for name, text in python_documents()]
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise UserError(f"no data at {source}: give a file, a folder or {PYTHON_STDLIB}")
        documents = [document for file in _files(path) for document in _read_file(file, path, text_field)]
    if not any(document.text for document in documents):
        raise UserError(f"the data source {source} holds no text")
    return documents


def _files(path: Path) -> list[Path]:
    """The file itself, or all files below the folder whose suffix we read, but for hidden ones."""
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise UserError(f"cannot tell what {path} holds: its name must end in {', '.join(_SUFFIXES)}")
        return [path]
    found = []
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = sorted((file for file in found if file.suffix in _SUFFIXES), key=Path.as_posix)
    if not found:
        raise UserError(f"the folder {path} holds no file that ends in {', '.join(_SUFFIXES)}")
    return found


def _read_file(file: Path, source: Path, text_field: str) -> Iterator[Document]:
    name = file.name if file == source else file.relative_to(source).as_posix()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if file.suffix in _TEXT_SUFFIXES:
        yield Document(name, _decode(content, str(file)))
        return
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            yield Document(f"{name}:{number}", _record_text(_decode(line, place), text_field, place))


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def _record_text(line: str, text_field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        raise UserError(f"{place} has no text in the field {text_field!r} (DataConfig.text_field)")
    text = record[text_field]
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{place}: the field {text_field!r} holds half of a surrogate pair, which no UTF-8 can express")
    return text

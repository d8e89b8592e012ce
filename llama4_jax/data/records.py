"""Texts out of one file, by the suffix of its name: plain text, JSON lines, Parquet, ArrayRecord.

A reader takes the open file, what messages call it, and the name of the text's field; it yields (number, text) of each
record, counted from 1 as a person counts lines, or (None, text) for a file that is one document.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from llama4_jax.data import tf_example
from llama4_jax.errors import UserError

Texts = Iterator[tuple[int | None, str]]

_CHUNK = 1 << 20  # bytes
_RECORDS_AT_ONCE = 1024  # of Parquet and ArrayRecord: bounds memory


def suffix_of(name: str) -> str | None:
    """Which of READERS' suffixes a file's name has, or None."""
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_text(file: BinaryIO, place: str, text_field: str) -> Texts:
    """The whole file is one document."""
    yield None, _decode(file.read(), place)


def read_json_lines(lines: Iterable[bytes], place: str, text_field: str) -> Texts:
    """A field of the JSON object on each line."""
    for number, record in json_records(lines, place):
        text = record.get(text_field) if isinstance(record, dict) else None
        yield number, _require_text(text, text_field, f"{place}, line {number}")


def json_records(lines: Iterable[bytes], place: str) -> Iterator[tuple[int, Any]]:
    """The JSON on each line, with its number; empty lines are skipped but counted."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        here = f"{place}, line {number}"
        content = _decode(line, here)
        try:
            yield number, json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{here} is not JSON: {error}") from None


def _gzip_lines(file: BinaryIO, place: str) -> Iterator[bytes]:
    try:
        with gzip.open(file) as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{place} is damaged: {error}") from None


def _zstd_lines(file: BinaryIO, place: str) -> Iterator[bytes]:
    """Of any number of frames."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{place} needs zstandard: pip install 'llama4-jax[data]'") from None
    try:
        yield from _lines(_zstd_chunks(file, zstandard, place))
    except zstandard.ZstdError as error:
        raise UserError(f"{place} is damaged: {error}") from None


def _zstd_chunks(file: BinaryIO, zstandard, place: str) -> Iterator[bytes]:
    # Not the library's stream reader: that takes a file which was cut short for one that has ended.
    frame = None
    while chunk := file.read(_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            if not frame.eof:
                break
            chunk, frame = frame.unused_data, None
    if frame is not None:
        raise UserError(f"{place} is damaged: it ends in the middle")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    started: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        started.append(first)
        if rest:
            yield b"".join(started)
            yield from rest[:-1]
            started = rest[-1:]
    yield b"".join(started)


def read_parquet(file: BinaryIO, place: str, text_field: str) -> Texts:
    """A row of a string column each."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{place} needs pyarrow: pip install 'llama4-jax[data]'") from None
    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise UserError(f"{place} has no column {text_field!r} (DataConfig.text_field), but {', '.join(columns)}")
        number = 0
        for batch in table.iter_batches(_RECORDS_AT_ONCE, columns=[text_field]):
            for value in batch.column(0):
                number += 1
                here = f"{place}, record {number}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    raise UserError(f"{here} is not UTF-8") from None
                yield number, _require_text(text, text_field, here)
    except pa.ArrowException as error:
        raise UserError(f"{place} is damaged: {' '.join(str(error).split())}") from None


def read_array_record(file: BinaryIO, place: str, text_field: str) -> Texts:
    """A record is either a UTF-8 text or a serialised tf.train.Example with the text in a bytes feature."""
    from array_record.python.array_record_module import ArrayRecordReader

    if "://" in place:
        raise UserError(f"{place}: ArrayRecord files are read from local disks only: copy it to one")
    try:
        reader = ArrayRecordReader(place)
        if not reader.ok():  # it would count no records, and say nothing
            raise UserError(f"{place} is no ArrayRecord file, or was cut short")
        count = reader.num_records()
        for first in range(0, count, _RECORDS_AT_ONCE):
            for i, record in enumerate(reader.read(first, min(first + _RECORDS_AT_ONCE, count)), start=first + 1):
                here = f"{place}, record {i}"
                features = tf_example.parse(record)
                if features is not None:
                    record = features.get(text_field)
                    if not isinstance(record, bytes):
                        raise UserError(_no_text(text_field, here))
                yield i, _decode(record, here)
        reader.close()
    except RuntimeError as error:
        raise UserError(f"{place} is damaged: {' '.join(str(error).split())}") from None


# The lines of a file of JSON lines, by its suffix, from the open file and what messages call it.
LINES: dict[str, Callable[[BinaryIO, str], Iterable[bytes]]] = {
    ".jsonl": lambda file, place: file,
    ".jsonl.gz": _gzip_lines,
    ".jsonl.zst": _zstd_lines,
}


def _json_lines_reader(suffix: str) -> Callable[[BinaryIO, str, str], Texts]:
    return lambda file, place, text_field: read_json_lines(LINES[suffix](file, place), place, text_field)


# A longer suffix before those that it ends in.
READERS: dict[str, Callable[[BinaryIO, str, str], Texts]] = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    **{suffix: _json_lines_reader(suffix) for suffix in LINES},
    ".parquet": read_parquet,
    ".array_record": read_array_record,
}


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def _require_text(text: object, text_field: str, place: str) -> str:
    if not isinstance(text, str):
        raise UserError(_no_text(text_field, place))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: the field {text_field!r} holds half of a surrogate pair, which no UTF-8 can express"
        ) from None
    return text


def _no_text(text_field: str, place: str) -> str:
    return f"{place} has no text in the field {text_field!r} (DataConfig.text_field)"

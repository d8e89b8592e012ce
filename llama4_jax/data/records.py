"""Texts out of one file, by the suffix of its name: plain text, JSON lines, Parquet, ArrayRecord.

A reader takes the open file, what messages call it, the name of the text's field, and who hears of bad records; it yields
(number, text) of each record, counted from 1 as a person counts lines, or (None, text) for a file that is one document. A
record that cannot be read is left out, if that is allowed; BadRecord comes out of a reader when the rest of its file is lost.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

from llama4_jax.data import tf_example
from llama4_jax.data.bad_records import BadRecord, BadRecords
from llama4_jax.errors import UserError

Texts = Iterator[tuple[int | None, str]]

_CHUNK = 1 << 20  # bytes
_RECORDS_AT_ONCE = 1024  # of Parquet and ArrayRecord: bounds memory


def suffix_of(name: str) -> str | None:
    """Which of READERS' suffixes a file's name has, or None."""
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_text(file: BinaryIO, place: str, text_field: str, bad: BadRecords) -> Texts:
    """The whole file is one document."""
    yield None, _decode(file.read(), place)


def read_json_lines(lines: Iterable[bytes], place: str, text_field: str, bad: BadRecords) -> Texts:
    """A field of the JSON object on each line."""

    def text_of(number: int, record: Any) -> str:
        text = record.get(text_field) if isinstance(record, dict) else None
        return _require_text(text, text_field, f"{place}, line {number}")

    return _readable(json_records(lines, place, bad), text_of, bad)


def json_records(lines: Iterable[bytes], place: str, bad: BadRecords) -> Iterator[tuple[int, Any]]:
    """The JSON on each line, with its number; empty lines are skipped but counted."""

    def json_of(number: int, line: bytes) -> Any:
        here = f"{place}, line {number}"
        content = _decode(line, here)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{here} is not JSON: {error}") from None

    return _readable(((number, line) for number, line in enumerate(lines, start=1) if line.strip()), json_of, bad)


def _readable(
    numbered: Iterable[tuple[int, Any]], read: Callable[[int, Any], Any], bad: BadRecords
) -> Iterator[tuple[int, Any]]:
    """Number and `read(number, content)` of each, but for those that raise BadRecord."""
    for number, content in numbered:
        try:
            record = read(number, content)
        except BadRecord as error:
            bad.leave_out(error)
        else:
            yield number, record


def _gzip_lines(file: BinaryIO, place: str) -> Iterator[bytes]:
    try:
        with gzip.open(file) as lines:
            yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadRecord(f"{place} is damaged: {error}") from None


def _zstd_lines(file: BinaryIO, place: str) -> Iterator[bytes]:
    """Of any number of frames."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{place} needs zstandard: pip install 'llama4-jax[data]'") from None
    try:
        yield from _lines(_zstd_chunks(file, zstandard, place))
    except zstandard.ZstdError as error:
        raise BadRecord(f"{place} is damaged: {error}") from None


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
        raise BadRecord(f"{place} is damaged: it ends in the middle")


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


def read_parquet(file: BinaryIO, place: str, text_field: str, bad: BadRecords) -> Texts:
    """A row of a string column each."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{place} needs pyarrow: pip install 'llama4-jax[data]'") from None

    def text_of(number: int, value: Any) -> str:
        here = f"{place}, record {number}"
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            raise BadRecord(f"{here} is not UTF-8") from None
        return _require_text(text, text_field, here)

    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if text_field not in columns:
            raise UserError(f"{place} has no column {text_field!r} (DataConfig.text_field), but {', '.join(columns)}")
        batches = table.iter_batches(_RECORDS_AT_ONCE, columns=[text_field])
        values = (value for batch in batches for value in batch.column(0))
        yield from _readable(enumerate(values, start=1), text_of, bad)
    except pa.ArrowException as error:
        raise BadRecord(f"{place} is damaged: {' '.join(str(error).split())}") from None


def read_array_record(file: BinaryIO, place: str, text_field: str, bad: BadRecords) -> Texts:
    """A record is either a UTF-8 text or a serialised tf.train.Example with the text in a bytes feature."""
    from array_record.python.array_record_module import ArrayRecordReader

    if "://" in place:
        raise UserError(f"{place}: ArrayRecord files are read from local disks only: copy it to one")

    def text_of(number: int, record: bytes) -> str:
        here = f"{place}, record {number}"
        features = tf_example.parse(record)
        if features is not None:
            record = features.get(text_field)
            if not isinstance(record, bytes):
                raise BadRecord(_no_text(text_field, here))
        return _decode(record, here)

    try:
        reader = ArrayRecordReader(place)
        if not reader.ok():  # it would count no records, and say nothing
            raise BadRecord(f"{place} is no ArrayRecord file, or was cut short")
        count = reader.num_records()
        for first in range(0, count, _RECORDS_AT_ONCE):
            records = reader.read(first, min(first + _RECORDS_AT_ONCE, count))
            yield from _readable(enumerate(records, start=first + 1), text_of, bad)
        reader.close()
    except RuntimeError as error:
        raise BadRecord(f"{place} is damaged: {' '.join(str(error).split())}") from None


# The lines of a file of JSON lines, by its suffix, from the open file and what messages call it.
LINES: dict[str, Callable[[BinaryIO, str], Iterable[bytes]]] = {
    ".jsonl": lambda file, place: file,
    ".jsonl.gz": _gzip_lines,
    ".jsonl.zst": _zstd_lines,
}


def _json_lines_reader(suffix: str) -> Callable[[BinaryIO, str, str, BadRecords], Texts]:
    return lambda file, place, text_field, bad: read_json_lines(LINES[suffix](file, place), place, text_field, bad)


# A longer suffix before those that it ends in.
READERS: dict[str, Callable[[BinaryIO, str, str, BadRecords], Texts]] = {
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
        raise BadRecord(f"{place} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None


def _require_text(text: object, text_field: str, place: str) -> str:
    if not isinstance(text, str):
        raise BadRecord(_no_text(text_field, place))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecord(
            f"{place}: the field {text_field!r} holds half of a surrogate pair, which no UTF-8 can express"
        ) from None
    return text


def _no_text(text_field: str, place: str) -> str:
    return f"{place} has no text in the field {text_field!r} (DataConfig.text_field)"

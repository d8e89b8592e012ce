import gzip
import json
import struct
import sys

import fsspec
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.data import records, tf_example
from llama4_jax.data.sources import Document, iterate_source, read_source, source_size
from llama4_jax.errors import UserError

TEXTS = ["one\n", "größe 中文 🦙", "", "x\u2028y\x00"]


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def array_record(path, contents):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def field(number, content):
    """A length-delimited protocol buffer field."""
    size, length = len(content), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def example(features):
    """A serialised tf.train.Example: bytes and lists of floats."""
    entries = b""
    for name, value in features.items():
        feature = field(1, field(1, value)) if isinstance(value, bytes) else field(2, field(1, struct.pack("<2f", *value)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def write_parquet(path, column, name="text"):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"id": list(range(len(column))), name: column}), path, row_group_size=2)


def write_zstd(path, content, frames=1):
    zstandard = pytest.importorskip("zstandard")
    pieces = np.array_split(np.frombuffer(content, np.uint8), frames)
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(piece.tobytes()) for piece in pieces))


def write(kind, path, texts):
    match kind:
        case "jsonl":
            path.write_bytes(json_lines(texts))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(json_lines(texts)))
        case "jsonl.zst":
            write_zstd(path, json_lines(texts), frames=3)
        case "parquet":
            write_parquet(path, texts)
        case "array_record":
            array_record(path, [text.encode() for text in texts])


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "array_record"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_documents(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(records, "_RECORDS_AT_ONCE", 3)
    monkeypatch.setattr(records, "_CHUNK", 7)
    write(kind, tmp_path / f"r.{kind}", TEXTS)
    assert read_source(str(tmp_path)) == [Document(f"r.{kind}:{i}", text) for i, text in enumerate(TEXTS, start=1)]
    assert read_source(str(tmp_path / f"r.{kind}")) == read_source(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_file_that_was_cut_short_is_refused_however_little_is_missing(tmp_path, kind):
    path = tmp_path / f"r.{kind}"
    write(kind, path, [f"{i} {np.random.default_rng(i).random()}" for i in range(200)])
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"is damaged|is no ArrayRecord file, or was cut short") as error:
            read_source(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_in_a_folder_without_any_text_is_not_hidden_by_the_others(tmp_path):
    write("jsonl.gz", tmp_path / "a.jsonl.gz", TEXTS)
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is damaged"):
        read_source(str(tmp_path))


def test_bad_lines_under_compression_are_named(tmp_path):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(json_lines(["a"]) + b'\n{"text": "\xe9"}\n'))
    with pytest.raises(UserError, match=r"r\.jsonl\.gz, line 3 is not UTF-8"):
        read_source(str(tmp_path))


def test_a_parquet_file_without_the_text_is_named(tmp_path):
    write_parquet(tmp_path / "r.parquet", ["a"], name="body")
    with pytest.raises(UserError, match=r"r\.parquet has no column 'text' \(DataConfig\.text_field\), but id, body"):
        read_source(str(tmp_path))
    assert read_source(str(tmp_path), "body") == [Document("r.parquet:1", "a")]
    write_parquet(tmp_path / "r.parquet", ["a", "b", None])
    with pytest.raises(UserError, match=r"r\.parquet, record 3 has no text in the field 'text'"):
        read_source(str(tmp_path))
    with pytest.raises(UserError, match=r"r\.parquet, record 1 has no text in the field 'id'"):
        read_source(str(tmp_path), "id")


def test_parquet_bytes_that_are_no_utf8_are_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    offsets, content = np.array([0, 1, 2], np.int32).tobytes(), b"a\xff"
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(content)])
    write_parquet(tmp_path / "r.parquet", column)
    with pytest.raises(UserError, match=r"r\.parquet, record 2 is not UTF-8"):
        read_source(str(tmp_path))


def test_array_records_may_be_examples(tmp_path):
    features = {"text": "größe".encode(), "id": b"x" * 300, "score": (1.0, 2.0)}
    array_record(tmp_path / "r.array_record", [example(features), example(dict(reversed(features.items())))])
    assert [document.text for document in read_source(str(tmp_path))] == ["größe", "größe"]
    for missing in ("body", "score"):
        with pytest.raises(UserError, match=rf"r\.array_record, record 1 has no text in the field '{missing}'"):
            read_source(str(tmp_path), missing)
    array_record(tmp_path / "r.array_record", [b"fine", b"caf\xe9"])
    with pytest.raises(UserError, match=r"r\.array_record, record 2 is not UTF-8: byte 3 is 0xe9"):
        read_source(str(tmp_path))


@given(st.dictionaries(st.text(max_size=5), st.binary(max_size=300), min_size=1, max_size=4))
def test_examples_come_back_and_no_part_of_one_is_taken_for_one(features):
    serialised = example(features)
    assert tf_example.parse(serialised) == features
    assert tf_example.parse(serialised[:-1]) is None


@given(st.text() | st.text().map("\n".__add__))
def test_no_text_is_taken_for_an_example(text):
    assert tf_example.parse(text.encode()) is None


@pytest.mark.parametrize("module, kind", [("zstandard", "jsonl.zst"), ("pyarrow", "parquet")])
def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch, module, kind):
    (tmp_path / f"r.{kind}").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"r\.{kind} needs {module}: pip install 'llama4-jax\[data\]'"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_adds_up_to_the_size_of_the_files(tmp_path, kind):
    for name in ("a", "b"):
        write(kind, tmp_path / f"{name}.{kind}", [f"{i} {np.random.default_rng(i).random()}" for i in range(3000)])
    steps = []
    list(iterate_source(str(tmp_path), advance=steps.append))
    assert sum(steps) == source_size(str(tmp_path)) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert min(steps) >= 0


# ------------------------------------------------------------------------------------------------------------------------
# Behind a URL


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_a_url_gives_what_a_folder_would(bucket, tmp_path):
    files = {
        "a/r.jsonl": json_lines(TEXTS), "b.txt": b"b", "c.jsonl.gz": gzip.compress(json_lines(["c"])), ".x/h.txt": b"hidden",
        "d.png": b"\xff",
    }  # fmt: skip
    for name, content in files.items():
        bucket.pipe(f"/bucket/folder/{name}", content)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write("jsonl.zst", tmp_path / "e.jsonl.zst", ["e"])
    bucket.pipe("/bucket/folder/e.jsonl.zst", (tmp_path / "e.jsonl.zst").read_bytes())
    assert source_size("memory://bucket/folder") == source_size(str(tmp_path))
    assert read_source("memory://bucket/folder") == read_source("memory://bucket/folder/") == read_source(str(tmp_path))
    assert read_source("memory://bucket/folder/b.txt") == [Document("b.txt", "b")]


def test_parquet_behind_a_url(bucket, tmp_path):
    write_parquet(tmp_path / "r.parquet", TEXTS)
    bucket.pipe("/bucket/r.parquet", (tmp_path / "r.parquet").read_bytes())
    assert read_source("memory://bucket/") == read_source(str(tmp_path))


@pytest.mark.parametrize(
    "source, message",
    [
        ("memory://bucket/none", "no data at memory://bucket/none"),
        ("memory://bucket/empty", "holds no file that ends in"),
        ("memory://bucket/bad.jsonl", r"memory://bucket/bad\.jsonl, line 1 is not JSON"),
        ("memory://bucket/r.array_record", "ArrayRecord files are read from local disks only"),
        ("nowhere://bucket", "cannot read nowhere://bucket: Protocol not known"),
    ],
)
def test_a_bad_url_is_one_line(bucket, source, message):
    bucket.pipe({"/bucket/empty/x.png": b"", "/bucket/bad.jsonl": b"{", "/bucket/r.array_record": b"x"})
    with pytest.raises(UserError, match=message) as error:
        read_source(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol, package", [("gs", "gcsfs"), ("s3", "s3fs"), ("hf", "huggingface_hub")])
def test_a_missing_cloud_library_is_named_with_what_installs_it(monkeypatch, protocol, package):
    def missing(source):
        raise ImportError("install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=rf"{protocol}://bucket/x needs {package}: pip install 'llama4-jax\[cloud\]'"):
        read_source(f"{protocol}://bucket/x")

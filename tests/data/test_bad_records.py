"""Records that cannot be read: each is named, so many may be left out, and what is read beside them is what it would be."""

import gzip
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from llama4_jax.config import DataConfig
from llama4_jax.data.bad_records import BadRecords
from llama4_jax.data.pipeline import prepare_corpus
from llama4_jax.data.shard_writer import prepare_shards
from llama4_jax.data.sources import read_source
from llama4_jax.errors import UserError

GOOD = [json.dumps({"text": f"document {i}"}).encode() for i in range(6)]
BAD = {
    "is not JSON": b'{"text": "cut',
    "is not UTF-8": b'{"text": "\xe9"}',
    "has no text in the field 'text'": b'{"body": "x"}',
    "holds half of a surrogate pair": b'{"text": "\\ud800"}',
}


def write_lines(path, lines):
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
@pytest.mark.parametrize("message", BAD)
def test_a_bad_line_is_left_out_and_the_others_stay(tmp_path, caplog, name, message):
    write_lines(tmp_path / name, [*GOOD[:3], BAD[message], *GOOD[3:]])
    bad = BadRecords(1)
    with caplog.at_level(logging.WARNING):
        texts = [document.text for document in read_source(str(tmp_path), bad=bad)]
    assert texts == [f"document {i}" for i in range(6)]
    assert len(bad.found) == 1 and f"{name}, line 4" in bad.found[0] and message in bad.found[0]
    assert bad.found[0] in caplog.text and "left out, the 1. of at most 1" in caplog.text


def test_more_than_the_budget_stops_with_the_place_and_the_count(tmp_path):
    write_lines(tmp_path / "r.jsonl", [*GOOD, *BAD.values()])
    with pytest.raises(UserError, match=r"line 9 has no text .*cannot be read: 3; allowed by DataConfig.max_bad_records: 2\)"):
        read_source(str(tmp_path), bad=BadRecords(2))


def write_array_record(path, texts):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text)
    writer.close()


def test_other_kinds_of_files_lose_their_bad_records_alone(tmp_path):
    write_array_record(tmp_path / "a.array_record", [b"first", b"\xff\xff", b"third"])
    strings = pa.array([b"first", b"\xff\xff", b"third"], pa.binary()).cast(pa.string(), safe=False)
    parquet.write_table(pa.table({"text": pa.StringArray.from_buffers(3, *strings.buffers()[1:])}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    bad = BadRecords(3)
    assert [document.text for document in read_source(str(tmp_path), bad=bad)] == ["first", "third"] * 2
    assert len(bad.found) == 3


def test_of_a_file_that_is_cut_short_what_comes_before_stays_and_it_counts_once(tmp_path):
    write_lines(tmp_path / "a.jsonl.gz", GOOD * 400)
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) - 30])
    write_lines(tmp_path / "b.jsonl", GOOD)
    bad = BadRecords(1)
    read = [document.text for document in read_source(str(tmp_path), bad=bad)]
    assert read[-6:] == [f"document {i}" for i in range(6)] and len(bad.found) == 1
    assert "a.jsonl.gz is damaged" in bad.found[0]


def test_what_is_wrong_with_the_settings_is_no_bad_record(tmp_path):
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="has no column 'text'"):
        read_source(str(tmp_path), bad=BadRecords(100))


def test_a_corpus_and_prepared_shards_count_what_was_left_out(tmp_path):
    numbers = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(map(str, numbers.integers(0, 999, 30)))}).encode() for _ in range(40)]
    (tmp_path / "data").mkdir()
    write_lines(tmp_path / "data/r.jsonl", [*lines[:20], b"{", *lines[20:]])
    config = DataConfig(sources=(str(tmp_path / "data"),), sequence_length=32, batch_size=2, heldout_fraction=0.3)
    options = {"vocab_size": 300, "document_window": None, "progress": False}
    with pytest.raises(UserError, match="line 21 is not JSON"):
        prepare_corpus(config, cache_dir=tmp_path / "run", **options)
    config.max_bad_records = 1
    corpus = prepare_corpus(config, cache_dir=tmp_path / "run", **options)
    assert (corpus.counts.skipped, corpus.counts.documents) == (1, 40)
    assert prepare_shards(config, tmp_path / "shards", vocab_size=300, progress=False)["counts"]["skipped"] == 1
    config.prepared = str(tmp_path / "shards")
    assert prepare_corpus(config, cache_dir=tmp_path / "none", **options).counts.skipped == 1

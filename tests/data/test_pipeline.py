import base64
import dataclasses
import json
import shutil

import numpy as np
import pytest

from llama4_jax.config import DataConfig
from llama4_jax.data.compression import compression_baselines
from llama4_jax.data.deduplicate import SIMILARITY, shingles, similarity
from llama4_jax.data.pipeline import heldout_batches, prepare_corpus, train_batches
from llama4_jax.data.sources import read_source
from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import Tokenizer

VOCAB = 300
CONFIG = DataConfig(sequence_length=32, batch_size=4, heldout_fraction=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty documents of many lengths, and near twins of ten."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    for i in range(40):
        words = [f"word{n}" for n in generator.integers(0, 5000, 5 + 3 * i)]
        (folder / f"{i:02}.txt").write_text(" ".join(words) + f" ünïcode {i}")
        if i >= 30:
            (folder / f"twin{i}.txt").write_text(" ".join([*words, "at", "last"]))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return dataclasses.replace(CONFIG, sources=(str(folder),))


def prepare(config, cache, **kwargs):
    return prepare_corpus(config, cache_dir=cache, progress=False, **{"vocab_size": VOCAB, "document_window": 8, **kwargs})


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return prepare(config, tmp_path_factory.mktemp("cache") / "data")


def texts_of(corpus, rows):
    """The documents behind packed rows."""
    documents = rows.documents
    return [
        corpus.tokenizer.decode(documents.ids[begin + 1 : end - 1])
        for begin, end in zip(documents.starts[:-1], documents.starts[1:], strict=True)
    ]


def assert_batches_equal(a, b):
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


# ------------------------------------------------------------------------------------------------------------------------
# prepare_corpus


def test_each_document_is_dropped_held_out_or_trained_on(corpus, folder):
    train, heldout = texts_of(corpus, corpus.train), texts_of(corpus, corpus.heldout)
    every = [document.text for document in read_source(str(folder))]
    assert set(train) | set(heldout) <= set(every)
    assert not set(train) & set(heldout)
    counts = corpus.counts
    assert (counts.documents, counts.dropped_duplicates) == (50, 10)
    assert (counts.train_documents, counts.heldout_documents) == (len(train), len(heldout))
    assert counts.train_documents + counts.heldout_documents == 40
    assert corpus.heldout_bytes == len("".join(heldout).encode()) == len(corpus.heldout_text())
    assert corpus.heldout_text().decode() == "".join(heldout)
    assert counts.train_bytes == len("".join(train).encode())


def test_no_held_out_document_has_a_near_twin_in_training(corpus):
    train = [shingles(text) for text in texts_of(corpus, corpus.train)]
    for text in texts_of(corpus, corpus.heldout):
        assert max(similarity(shingles(text), other) for other in train) < SIMILARITY


def test_without_deduplication_twins_stay(config, tmp_path):
    assert prepare(dataclasses.replace(config, deduplicate=False), tmp_path / "data").counts.dropped_duplicates == 0


def test_the_tokenizer_sees_training_documents_only(tmp_path):
    (tmp_path / "train.txt").write_text("abcdefgh " * 200)
    (tmp_path / "heldout.txt").write_text("zyxwvuts " * 200)
    config = dataclasses.replace(
        CONFIG, sources=(str(tmp_path / "train.txt"),), heldout_sources=(str(tmp_path / "heldout.txt"),)
    )
    corpus = prepare(config, tmp_path / "data")
    assert len(corpus.tokenizer.encode("abcdefgh")) < 8
    assert len(corpus.tokenizer.encode("zyxwvuts")) == 8
    assert set(corpus.train.documents.sources) == {0}
    assert set(corpus.heldout.documents.sources) == {1}


def test_a_twin_of_an_explicitly_held_out_document_leaves_training(config, folder, tmp_path):
    corpus = prepare(dataclasses.replace(config, heldout_sources=(str(folder / "35.txt"),)), tmp_path / "data")
    assert texts_of(corpus, corpus.heldout) == [(folder / "35.txt").read_text()]
    assert corpus.counts.dropped_duplicates == 11
    assert corpus.counts.train_documents == 39


def test_prepared_data_are_loaded_not_made_again(config, tmp_path, monkeypatch):
    first = prepare(config, tmp_path / "data")
    monkeypatch.setattr(Tokenizer, "train_bpe", None)
    second = prepare(config, tmp_path / "data")
    assert second.fingerprint == first.fingerprint
    assert second.counts == first.counts
    assert_batches_equal(first.train.batch(range(len(first.train))), second.train.batch(range(len(second.train))))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_same_input_gives_the_same_corpus_wherever_it_lies(config, corpus, folder, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    other = prepare(dataclasses.replace(config, sources=(str(moved),)), tmp_path / "data")
    assert other.fingerprint == corpus.fingerprint


@pytest.mark.parametrize(
    "change, kwargs, message",
    [
        ({"sequence_length": 64}, {}, "sequence_length was 32, now 64"),
        ({"deduplicate": False}, {}, "deduplicate was True, now False"),
        ({"heldout_fraction": 0.2}, {}, "heldout_fraction was 0.3, now 0.2"),
        ({}, {"vocab_size": 310}, "vocab_size was 300, now 310"),
        ({}, {"document_window": 16}, "document_window was 8, now 16"),
    ],
)
def test_prepared_data_of_another_configuration_are_refused(config, corpus, change, kwargs, message):
    with pytest.raises(UserError, match=message) as error:
        prepare(dataclasses.replace(config, **change), corpus.directory, **kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["edit", "add", "remove", "rename"])
def test_prepared_data_of_changed_sources_are_refused(config, folder, tmp_path, change):
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in folder.iterdir():
        (texts / path.name).write_bytes(path.read_bytes())
    config = dataclasses.replace(config, sources=(str(texts),))
    prepare(config, tmp_path / "data")
    match change:
        case "edit":
            (texts / "05.txt").write_bytes((texts / "05.txt").read_bytes().replace(b"word1", b"word2"))
        case "add":
            (texts / "new.txt").write_text("new")
        case "remove":
            (texts / "05.txt").unlink()
        case "rename":
            (texts / "05.txt").rename(texts / "o5.txt")
    with pytest.raises(UserError, match=r"made from other input: sources held .*texts \(50 documents, .*now .*texts"):
        prepare(config, tmp_path / "data")


def test_settings_that_do_not_touch_the_rows_may_change(config, corpus):
    prepare(dataclasses.replace(config, batch_size=2, shuffle_seed=5), corpus.directory)


@pytest.mark.parametrize("name", ["train_ids.npy", "heldout_plan.npy", "heldout.txt", "tokenizer.json"])
def test_damaged_prepared_data_are_refused(config, tmp_path, name):
    prepare(config, tmp_path / "data")
    path = tmp_path / "data" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        prepare(config, tmp_path / "data")
    path.unlink()
    with pytest.raises(UserError, match=name):
        prepare(config, tmp_path / "data")


@pytest.mark.parametrize("manifest", ["", "{}", "[]", "{"])
def test_a_damaged_manifest_is_refused(config, tmp_path, manifest):
    prepare(config, tmp_path / "data")
    (tmp_path / "data/corpus.json").write_text(manifest)
    with pytest.raises(UserError, match="are damaged"):
        prepare(config, tmp_path / "data")


def test_an_interrupted_preparation_leaves_nothing(config, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the prepared data to .*file/data"):
        prepare(config, tmp_path / "file/data")


def test_a_folder_with_other_things_in_it_is_left_alone(config, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious").write_text("mine")
    with pytest.raises(UserError, match="cannot write the prepared data"):
        prepare(config, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["precious"]


def test_bad_input_is_one_line(config, folder, tmp_path):
    (tmp_path / "one.txt").write_text("a single document")
    cases = {
        "sources is empty": {"sources": ()},
        "no data at": {"sources": ("nowhere",)},
        "none is": {"sources": (str(tmp_path / "one.txt"),)},
        "cannot read missing.json": {"tokenizer": "missing.json"},
    }
    for message, change in cases.items():
        with pytest.raises(UserError, match=message) as error:
            prepare(dataclasses.replace(config, **change), tmp_path / "data")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_a_given_tokenizer_must_fit_the_model_and_be_lossless(config, corpus, tmp_path):
    given = tmp_path / "tokenizer.json"
    corpus.tokenizer.save(given)
    config = dataclasses.replace(config, tokenizer=str(given))
    again = prepare(config, tmp_path / "data")
    np.testing.assert_array_equal(again.train.documents.ids, corpus.train.documents.ids)
    with pytest.raises(UserError, match=f"has {VOCAB} tokens, more than the model's 280"):
        prepare(config, tmp_path / "small", vocab_size=280)
    lossy = json.loads(given.read_text())
    lossy["normalizer"] = {"type": "Replace", "pattern": {"String": "ü"}, "content": "u"}
    given.write_text(json.dumps(lossy))
    with pytest.raises(UserError, match=r"does not give back the document \d\d\.txt"):
        prepare(config, tmp_path / "lossy")
    with pytest.raises(UserError, match=r"tokenizer was .*, now"):
        prepare(config, tmp_path / "data")


def test_a_file_of_ranks_may_be_cut_for_a_small_model(config, tmp_path):
    given = tmp_path / "tokenizer.model"
    tokens = [bytes([byte]) for byte in range(256)] + [b"wo", b"rd", b"word", b" word"]
    given.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    config = dataclasses.replace(config, tokenizer=str(given), tokenizer_ranks=258)
    corpus = prepare(config, tmp_path / "data")
    assert corpus.tokenizer.vocab_size == 258 + 21
    assert corpus.train.documents.ids[:3].tolist() == [258, tokens.index(b"wo"), tokens.index(b"rd")]
    with pytest.raises(UserError, match=r"tokenizer was \w+ cut to 258, now \w+ cut to 259"):
        prepare(dataclasses.replace(config, tokenizer_ranks=259), tmp_path / "data")
    with pytest.raises(UserError, match="has 2308 tokens, more than the model's 300"):
        prepare(dataclasses.replace(config, tokenizer_ranks=None), tmp_path / "whole")
    with pytest.raises(UserError, match=r"tokenizer_ranks cuts a tokenizer\.model, not bpe"):
        prepare(dataclasses.replace(config, tokenizer="bpe"), tmp_path / "bpe")


# ------------------------------------------------------------------------------------------------------------------------
# Batches


def take(batches, count):
    return [next(batches) for _ in range(count)]


def rows_of(batches):
    return [
        row.tobytes() for batch in batches for row in np.concatenate([batch.tokens, batch.targets, batch.segment_ids], axis=1)
    ]


def test_each_epoch_holds_every_row_once_in_another_order(corpus, config):
    config = dataclasses.replace(config, batch_size=1)
    size = len(corpus.train)
    batches = train_batches(corpus, config)
    first, second = rows_of(take(batches, size)), rows_of(take(batches, size))
    assert sorted(first) == sorted(second) == sorted(rows_of([corpus.train.batch(range(size))]))
    assert first != second
    assert batches.epochs == {config.sources[0]: 2}
    assert first != rows_of(take(train_batches(corpus, dataclasses.replace(config, shuffle_seed=1)), size))


def test_a_batch_larger_than_the_corpus_repeats_it(corpus, config):
    size = len(corpus.train)
    batch = next(train_batches(corpus, dataclasses.replace(config, batch_size=2 * size)))
    assert len(set(rows_of([batch]))) == size


def test_training_batches_keep_their_form_and_promise(corpus, config):
    for batch in take(train_batches(corpus, config), 20):
        assert batch.document_window == 8
        assert {array.shape for array in (batch.tokens, batch.targets, batch.loss_weights, batch.source_ids)} == {(4, 32)}
        assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == batch.segment_ids.dtype == np.int32
        assert batch.loss_weights.dtype == np.float32
        assert batch.tokens.max() < corpus.tokenizer.vocab_size


@pytest.mark.parametrize("steps", [0, 1, 7, 30])
def test_a_resumed_iterator_goes_on_with_the_exact_next_batch(corpus, config, steps):
    unbroken = train_batches(corpus, config)
    take(unbroken, steps)
    state = json.loads(json.dumps(unbroken.get_state()))
    assert state["step"] == steps  # of the batch handed out, not of the prefetcher
    resumed = train_batches(corpus, config)
    next(resumed)
    resumed.set_state(state)
    for expected, actual in zip(take(unbroken, 10), take(resumed, 10), strict=True):
        assert_batches_equal(expected, actual)
    assert resumed.step == steps + 10


@pytest.mark.parametrize("weights", [(), (1.0,)])  # all rows packed at once, and by windows
@pytest.mark.parametrize("counts", [(2, 4), (4, 2), (2, 1), (1, 4, 2)])
def test_processes_share_each_global_batch_and_may_change_in_number(corpus, config, counts, weights):
    """At each change any one process's state, as JSON, serves all."""
    config = dataclasses.replace(config, weights=weights)

    def parts(count):
        return [train_batches(corpus, config, places=part) for part in np.split(np.arange(config.batch_size), count)]

    def global_rows(iterators, steps):
        return [rows_of(next(iterator) for iterator in iterators) for _ in range(steps)]

    expected, state = global_rows(parts(1), 5 * len(counts)), None
    for turn, count in enumerate(counts):
        iterators = parts(count)
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        assert global_rows(iterators, 5) == expected[5 * turn : 5 * turn + 5]
        state = json.loads(json.dumps(iterators[turn % count].get_state()))


@pytest.mark.parametrize(
    "change, message", [({"shuffle_seed": 3}, "shuffle_seed was 0, now 3"), ({"batch_size": 8}, "batch_size was 4, now 8")]
)
def test_the_state_of_another_stream_is_refused(corpus, config, change, message):
    state = train_batches(corpus, config).get_state()
    with pytest.raises(UserError, match=message):
        train_batches(corpus, dataclasses.replace(config, **change)).set_state(state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heldout_fraction": 0.2}, "heldout_fraction was 0.3, now 0.2"),
        ({"sequence_length": 64}, "sequence_length was 32, now 64"),
        ({"deduplicate": False}, "deduplicate was True, now False"),
        ({"weights": (1.0,)}, r"weights was None, now \[1.0\]"),
    ],
)
def test_the_state_of_another_corpus_is_refused_by_name(corpus, config, tmp_path, change, message):
    """Also where the prepared data are gone, which would have said so first."""
    changed = dataclasses.replace(config, **change)
    other = prepare(changed, tmp_path / "data")
    with pytest.raises(UserError, match=message):
        train_batches(other, changed).set_state(train_batches(corpus, config).get_state())


def test_a_changed_text_is_refused_by_name_and_taken_from_its_beginning_when_that_is_said(config, folder, tmp_path, caplog):
    texts = tmp_path / "texts"
    shutil.copytree(folder, texts)
    config = dataclasses.replace(config, sources=(str(texts),))
    before = train_batches(prepare(config, tmp_path / "data"), config)
    take(before, 3)
    (texts / "05.txt").unlink()
    with pytest.raises(
        UserError, match=r"sources held .*texts \(50 documents.*now .*texts \(49 documents.*when_changed=start_over"
    ):
        prepare(config, tmp_path / "data")
    accepting = dataclasses.replace(config, when_changed="start_over")
    corpus = prepare(accepting, tmp_path / "data")
    assert corpus.counts.documents == 49
    after = train_batches(corpus, accepting)
    take(after, 3)  # as a run has that goes back to a checkpoint of the data before
    after.set_state(before.get_state())
    assert "are read from their beginning: " in caplog.text and "sources was" in caplog.text
    for expected, actual in zip(take(train_batches(corpus, config), 2), take(after, 2), strict=True):
        assert_batches_equal(expected, actual)
    again = train_batches(prepare(accepting, tmp_path / "data"), accepting)  # the change is made: now it goes on
    again.set_state(after.get_state())
    assert again.step == 2
    with pytest.raises(UserError, match="sources was"):
        train_batches(corpus, config).set_state(before.get_state())


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_held_out_batches_predict_every_token_once_in_one_shape(corpus, config, batch_size):
    batches = list(heldout_batches(corpus, dataclasses.replace(config, batch_size=batch_size)))
    assert {batch.tokens.shape for batch in batches} == {(batch_size, 32)}
    predictions = sum(batch.loss_weights.sum() for batch in batches)
    assert predictions == corpus.counts.heldout_tokens - corpus.counts.heldout_documents
    rows = [row for batch in batches for row in batch.segment_ids if row.any()]
    assert len(rows) == len(corpus.heldout)


def test_processes_share_held_out_batches(corpus, config):
    whole = list(heldout_batches(corpus, config))
    for places in ([0, 3], [1, 2], [2]):
        for batch, part in zip(whole, heldout_batches(corpus, config, places=places), strict=True):
            np.testing.assert_array_equal(batch.tokens[places], part.tokens)


def test_compressors_are_measured_in_bits_per_byte():
    noise = np.random.default_rng(0).bytes(10_000)
    assert 8 <= compression_baselines(noise)["gzip"] < 8.1
    assert 8 <= compression_baselines(noise)["xz"] < 8.2
    assert compression_baselines(b"a" * 100_000)["gzip"] < 0.02

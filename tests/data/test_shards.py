import dataclasses
import json
import shutil

import numpy as np
import pytest

from llama4_jax.config import DataConfig
from llama4_jax.data import shard_writer, shards
from llama4_jax.data.deduplicate import SIMILARITY, shingles, similarity
from llama4_jax.data.digest import sealed_json, unsealed_json
from llama4_jax.data.packing import check_windows
from llama4_jax.data.pipeline import heldout_batches, prepare_corpus, train_batches
from llama4_jax.data.row_streams import StreamedRows
from llama4_jax.data.shard_writer import prepare_shards
from llama4_jax.errors import UserError

VOCAB = 300
SHARD = dict(vocab_size=VOCAB, shard_bytes=2000, progress=False)


def texts(seed, count):
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{n}" for n in generator.integers(0, 900, 4 + 3 * i)) + f" é{seed}" for i in range(count)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sources, the first with near twins; documents of many lengths."""
    folder = tmp_path_factory.mktemp("texts")
    first = texts(1, 40)
    records = [*first, *(text + " at last" for text in first[30:])]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
    (folder / "b").mkdir()
    for i, text in enumerate(texts(2, 25)):
        (folder / f"b/{i:02}.txt").write_text(text)
    return DataConfig(
        sources=(str(folder / "a.jsonl"), str(folder / "b")), heldout_fraction=0.3, sequence_length=32, batch_size=4
    )


@pytest.fixture(scope="module")
def prepared(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prepared") / "shards"
    return directory, prepare_shards(config, directory, **SHARD)


@pytest.fixture(scope="module")
def corpus(config, prepared):
    return load(config, prepared[0])


def load(config, directory, **kwargs):
    config = dataclasses.replace(config, prepared=str(directory))
    return prepare_corpus(config, cache_dir=None, **{"vocab_size": VOCAB, "document_window": 8, **kwargs})


def texts_of(corpus, documents):
    return [corpus.tokenizer.decode(ids[1:-1]) for ids in documents.read(np.arange(len(documents.lengths)))]


def copy(directory, to):
    to.mkdir()
    for path in directory.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ------------------------------------------------------------------------------------------------------------------------
# What a folder holds


def test_the_split_is_that_of_the_corpus_in_memory(config, corpus, tmp_path):
    memory = prepare_corpus(config, vocab_size=VOCAB, document_window=8, cache_dir=tmp_path / "corpus", progress=False)
    assert corpus.tokenizer.encode("w12 w345") == memory.tokenizer.encode("w12 w345")
    for part in ("train", "heldout"):
        there, here = getattr(corpus, part).documents, getattr(memory, part).documents
        assert sorted(texts_of(corpus, there)) == sorted(texts_of(memory, here))
        np.testing.assert_array_equal(np.bincount(there.sources), np.bincount(here.sources))
    assert sorted(corpus.heldout_text()) == sorted(memory.heldout_text())
    ours, theirs = dataclasses.asdict(corpus.counts), dataclasses.asdict(memory.counts)
    assert {k: v for k, v in ours.items() if "padding" not in k} == {k: v for k, v in theirs.items() if "padding" not in k}


def test_the_manifest_counts_what_is_there(config, prepared, corpus):
    directory, manifest = prepared
    assert unsealed_json((directory / "manifest.json").read_text()) == manifest
    train = texts_of(corpus, corpus.train.documents)
    assert len(manifest["shards"]) > 6
    assert [source["source"] for source in manifest["sources"]] == list(config.sources)
    first, second = manifest["sources"]
    assert (first["documents"], first["dropped_duplicates"], second["documents"]) == (50, 10, 25)
    assert sum(s["train"]["bytes"] for s in manifest["sources"]) == len("".join(train).encode())
    assert sum(s["train"]["tokens"] for s in manifest["sources"]) == corpus.train.documents.lengths.sum()
    for name, shard in manifest["shards"].items():
        assert shard["size"] == (directory / f"{name}.array_record").stat().st_size
        assert shard["bytes"] <= 2000 or shard["documents"] == 1
    for text in texts_of(corpus, corpus.heldout.documents):
        assert max(similarity(shingles(text), shingles(other)) for other in train) < SIMILARITY


def test_held_out_sources_stay_whole_and_out_of_training(config, tmp_path):
    split = dataclasses.replace(config, sources=config.sources[:1], heldout_sources=config.sources[1:])
    prepare_shards(split, tmp_path / "shards", **SHARD)
    corpus = load(split, tmp_path / "shards")
    assert len(corpus.heldout.documents.lengths) == 25 and len(corpus.train.documents.lengths) == 40
    assert corpus.sources == split.sources and set(corpus.heldout.documents.sources) == {1}


def test_long_documents_are_read_whole(config, corpus, prepared, monkeypatch):
    monkeypatch.setattr(shards, "_LONG_DOCUMENT", 40)
    again = load(config, prepared[0])
    order = np.random.default_rng(0).integers(0, len(corpus.train.documents.lengths), 200)
    pairs = zip(again.train.documents.read(order), corpus.train.documents.read(order), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


# ------------------------------------------------------------------------------------------------------------------------
# Interruption, damage, other settings


def test_an_interrupted_preparation_goes_on_with_what_is_missing(config, prepared, tmp_path, monkeypatch):
    """Killed after some shards, with a half-written one about: the result is that of an unbroken run, byte for byte."""
    directory, written, write = tmp_path / "shards", [], shard_writer._write_shard

    def interrupt_after_three(directory, task, lossless):
        if len(written) == 3:
            (directory / f"{task.name}.unfinished").write_bytes(b"half")
            (directory / f"{task.name}.array_record").write_bytes(b"whole, but not noted")
            raise KeyboardInterrupt
        written.append(task.name)
        return write(directory, task, lossless)

    monkeypatch.setattr(shard_writer, "_write_shard", interrupt_after_three)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(config, directory, **SHARD)
    assert set(json.loads((directory / "manifest.json").read_text())["shards"]) == set(written)
    with pytest.raises(UserError, match=r"is unfinished: run python -m llama4_jax.prepare again"):
        load(config, directory)

    again = []
    monkeypatch.setattr(
        shard_writer, "_write_shard", lambda d, task, lossless: again.append(task.name) or write(d, task, lossless)
    )
    prepare_shards(config, directory, **SHARD)
    assert not set(again) & set(written) and len(again) + len(written) == len(prepared[1]["shards"])
    assert contents(directory) == contents(prepared[0])


def test_two_processes_write_what_one_does(config, prepared, tmp_path):
    prepare_shards(config, tmp_path / "shards", processes=2, **SHARD)
    assert contents(tmp_path / "shards") == contents(prepared[0])


def test_text_that_changed_during_an_interruption_is_noticed(config, tmp_path, monkeypatch):
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(3, 40)))
    config = dataclasses.replace(config, sources=(str(source),))
    write = shard_writer._write_shard
    monkeypatch.setattr(
        shard_writer, "_write_shard", lambda d, task, lossless: write(d, task, lossless) if task.number < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        prepare_shards(config, tmp_path / "shards", **SHARD)
    lines = source.read_text().splitlines(keepends=True)
    for changed in (lines[:5], [*lines[:5], *lines[6:]], [line.replace("w1", "w2") for line in lines]):
        source.write_text("".join(changed))
        with pytest.raises(UserError, match="was begun from other text than the sources hold now") as error:
            prepare_shards(config, tmp_path / "shards", **SHARD)
        assert "\n" not in str(error.value)


def test_a_start_that_failed_before_the_first_shard_leaves_no_settings_behind(config, prepared, tmp_path):
    with pytest.raises(UserError, match="no data at nowhere"):
        prepare_shards(dataclasses.replace(config, sources=("nowhere",)), tmp_path / "shards", **SHARD)
    prepare_shards(config, tmp_path / "shards", **SHARD)
    assert contents(tmp_path / "shards") == contents(prepared[0])


def test_a_folder_made_anew_with_another_tokenizer_uses_that_one(config, tmp_path):
    for vocab_size in (300, 280):
        prepare_shards(config, tmp_path / "shards", **{**SHARD, "vocab_size": vocab_size})
        documents = load(config, tmp_path / "shards").train.documents
        assert max(ids.max() for ids in documents.read(np.arange(len(documents.lengths)))) == vocab_size - 1
        shutil.rmtree(tmp_path / "shards")


def test_a_finished_shard_that_went_missing_is_written_again(config, prepared, tmp_path):
    directory = copy(prepared[0], tmp_path / "shards")
    manifest = unsealed_json((directory / "manifest.json").read_text()) | {"finished": False}
    (directory / "manifest.json").write_text(sealed_json(manifest))
    (directory / "train-00-00001.array_record").unlink()
    prepare_shards(config, directory, **SHARD)
    assert contents(directory) == contents(prepared[0])


@pytest.mark.parametrize(
    "change, kwargs, message",
    [
        ({"heldout_fraction": 0.2}, {}, "heldout_fraction was 0.3, now 0.2"),
        ({"deduplicate": False}, {}, "deduplicate was True, now False"),
        ({"text_field": "body"}, {}, "text_field was text, now body"),
        ({}, {"vocab_size": 310}, "vocab_size was 300, now 310"),
        ({}, {"shard_bytes": 3000}, "shard_bytes was 2000, now 3000"),
    ],
)
def test_a_folder_of_other_settings_is_refused(config, prepared, change, kwargs, message):
    before = contents(prepared[0])
    with pytest.raises(UserError, match=message) as error:
        prepare_shards(dataclasses.replace(config, **change), prepared[0], **{**SHARD, **kwargs})
    assert "\n" not in str(error.value)
    assert contents(prepared[0]) == before
    if change:
        with pytest.raises(UserError, match=message):
            load(dataclasses.replace(config, **change), prepared[0])


def test_a_folder_may_be_read_without_naming_its_sources(config, prepared, corpus):
    assert load(dataclasses.replace(config, sources=()), prepared[0]).fingerprint == corpus.fingerprint


@pytest.mark.parametrize("name", ["train-00-00000.array_record", "train-00-00000.lengths.npy", "tokenizer.json", "heldout.txt"])
def test_damage_is_found(config, prepared, tmp_path, name):
    """A flipped bit by verifying, and by loading or reading; a file cut short or missing by both."""
    path = copy(prepared[0], tmp_path / "shards") / name
    whole = path.read_bytes()

    def read_all():
        corpus = load(config, tmp_path / "shards")
        corpus.train.documents.read(np.arange(len(corpus.train.documents.lengths)))

    flipped = bytearray(whole)
    flipped[1000 if name.endswith("array_record") else -1] ^= 1
    for content in (bytes(flipped), whole[:-1], None):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        for use in (lambda: prepare_shards(config, tmp_path / "shards", **SHARD), read_all):
            with pytest.raises(UserError, match=name) as error:
                use()
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"format": 99}'])
def test_a_damaged_or_foreign_manifest_is_refused(config, prepared, tmp_path, manifest):
    (copy(prepared[0], tmp_path / "shards") / "manifest.json").write_text(manifest)
    for use in (lambda: prepare_shards(config, tmp_path / "shards", **SHARD), lambda: load(config, tmp_path / "shards")):
        with pytest.raises(UserError, match=r"manifest\.json is (damaged|of format 99)"):
            use()


def test_other_bad_folders_are_one_line(config, prepared, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and has no manifest"):
        prepare_shards(config, tmp_path / "mine", **SHARD)
    with pytest.raises(UserError, match=r"cannot write the prepared data to .*precious/x"):
        prepare_shards(config, tmp_path / "mine/precious/x", **SHARD)
    with pytest.raises(UserError, match=r"holds no prepared data: python -m llama4_jax.prepare --out="):
        load(config, tmp_path / "mine")
    with pytest.raises(UserError, match=r"name it in data\.prepared, not among the sources"):
        prepare_shards(dataclasses.replace(config, sources=(str(prepared[0]),)), tmp_path / "new", **SHARD)
    with pytest.raises(UserError, match="sources is empty"):
        prepare_shards(dataclasses.replace(config, sources=()), tmp_path / "newer", **SHARD)


def test_a_bad_record_stops_the_preparation_and_names_its_line(config, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"body": "no"}\n')
    config = dataclasses.replace(config, sources=(*config.sources, str(tmp_path / "bad.jsonl")))
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2 has no text in the field 'text'"):
        prepare_shards(config, tmp_path / "shards", **SHARD)


def test_a_vocabulary_too_large_for_the_model_is_refused(config, prepared):
    with pytest.raises(UserError, match="has 300 tokens, more than the model's 280"):
        load(config, prepared[0], vocab_size=280)


# ------------------------------------------------------------------------------------------------------------------------
# Batches


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_batches_equal(a, b):
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.fixture(params=[(), (3.0, 1.0)], ids=["unweighted", "weighted"])
def weighted(config, request):
    return dataclasses.replace(config, weights=request.param)


def test_batches_keep_their_form_and_promise(corpus, weighted):
    assert isinstance(corpus.train, StreamedRows)
    for batch in take(train_batches(corpus, weighted), 20):
        assert batch.document_window == 8
        check_windows(batch.segment_ids, 8)
        assert {array.shape for array in (batch.tokens, batch.targets, batch.loss_weights, batch.source_ids)} == {(4, 32)}
        assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == np.int32


@pytest.mark.parametrize("steps", [0, 1, 9, 60])
def test_a_resumed_stream_goes_on_with_the_exact_next_batch(corpus, weighted, steps):
    unbroken = train_batches(corpus, weighted)
    take(unbroken, steps)
    state = json.loads(json.dumps(unbroken.get_state()))
    assert state["step"] == steps and len(json.dumps(state)) < 1000
    resumed = train_batches(corpus, weighted)
    next(resumed)
    resumed.set_state(state)
    for expected, actual in zip(take(unbroken, 8), take(resumed, 8), strict=True):
        assert_batches_equal(expected, actual)
    assert resumed.epochs == unbroken.epochs


def test_processes_share_each_global_batch_and_may_change_in_number(corpus, weighted):
    def parts(count):
        return [train_batches(corpus, weighted, places=part) for part in np.split(np.arange(weighted.batch_size), count)]

    def global_tokens(iterators, steps):
        return [np.concatenate([next(iterator).tokens for iterator in iterators]) for _ in range(steps)]

    expected = global_tokens(parts(1), 12)
    two = parts(2)
    np.testing.assert_array_equal(global_tokens(two, 5), expected[:5])
    four = parts(4)
    for iterator in four:
        iterator.set_state(two[1].get_state())
    np.testing.assert_array_equal(global_tokens(four, 7), expected[5:])


def test_weights_are_exact_row_by_row_and_epochs_are_counted_by_source(corpus, config):
    config = dataclasses.replace(config, weights=(1.0, 2.0), batch_size=1)
    batches = train_batches(corpus, config)
    from_first = 0
    for step in range(1, 400):
        sources = set(next(batches).source_ids[0].tolist())  # padding is 0 too
        assert sources in ({0}, {1}, {0, 1})
        from_first += sources == {0}
        assert abs(from_first - step / 3) < 1
    small, large = (corpus.train.documents.lengths[corpus.train.documents.sources == i].sum() for i in (0, 1))
    epochs = batches.epochs
    assert list(epochs) == list(config.sources)
    assert epochs[config.sources[1]] / epochs[config.sources[0]] == pytest.approx(2 * small / large, rel=0.1)


def test_weights_work_on_a_corpus_in_memory(config, tmp_path):
    config = dataclasses.replace(config, weights=(1.0, 1.0), batch_size=2)
    memory = prepare_corpus(config, vocab_size=VOCAB, document_window=8, cache_dir=tmp_path / "corpus", progress=False)
    for batch in take(train_batches(memory, config), 50):
        assert sorted(row.max() for row in batch.source_ids) == [0, 1]


def test_weights_that_do_not_fit_are_refused(config, corpus):
    with pytest.raises(UserError, match="weights has 3 values for 2 sources"):
        dataclasses.replace(config, weights=(1.0, 2.0, 3.0))
    with pytest.raises(UserError, match="weights has 3 values for 2 sources"):
        train_batches(corpus, dataclasses.replace(config, sources=(), weights=(1.0, 2.0, 3.0)))
    with pytest.raises(UserError, match=r"weights must be positive, got 1.0, 0.0"):
        dataclasses.replace(config, weights=(1.0, 0.0))
    with pytest.raises(UserError, match=r"weights was \[3.0, 1.0\], now None"):
        state = train_batches(corpus, dataclasses.replace(config, weights=(3.0, 1.0))).get_state()
        train_batches(corpus, config).set_state(state)


def test_held_out_rows_come_once(corpus, config):
    batches = list(heldout_batches(corpus, config))
    predictions = sum(batch.loss_weights.sum() for batch in batches)
    assert predictions == corpus.counts.heldout_tokens - corpus.counts.heldout_documents
    assert len(corpus.heldout_text()) == corpus.heldout_bytes

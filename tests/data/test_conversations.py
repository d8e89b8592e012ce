import dataclasses
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama4_jax.config import DataConfig, ModelConfig, VisionConfig
from llama4_jax.data.packing import check_windows, plan_rows
from llama4_jax.data.pipeline import heldout_batches, prepare_corpus, train_batches
from llama4_jax.errors import UserError
from llama4_jax.processing.image_tokens import check_patch_places
from llama4_jax.processing.images import cut_tiles, read_image
from llama4_jax.processing.ranks import named_special_tokens

NAMED = named_special_tokens()
VISION = VisionConfig(
    hidden_size=16, num_layers=1, num_heads=2, mlp_size=64, image_size=8, patch_size=2, adapter_size=16,
    patch_token_id=NAMED.index("<|patch|>"),
    image_start_token_id=NAMED.index("<|image_start|>"),
    image_end_token_id=NAMED.index("<|image_end|>"),
)  # fmt: skip
MODEL = ModelConfig(vocab_size=400, vision=VISION)
WORDS = ["zero", "one", "two", "three", "four", "five", "six"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty conversations of zero to three pictures; every picture's shade is the number that the answer names."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "pictures").mkdir()
    lines, generator = [], np.random.default_rng(0)
    for i in range(40):
        shades = generator.integers(0, 7, i % 4)
        content = []
        for j, shade in enumerate(shades):
            path = f"pictures/{i}_{j}.png"
            Image.new("RGB", (8, 8) if j < 2 else (16, 8), (int(shade) * 40, i, j)).save(folder / path)
            content.append({"type": "image", "path": path})
        content.append({"type": "text", "text": "Which? " + "well " * int(generator.integers(0, 12)) + str(i)})
        answer = " ".join(WORDS[shade] for shade in shades) or "none"
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        lines.append({"messages": messages})
    (folder / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return DataConfig(
        sources=(str(folder),), format="chat", heldout_fraction=0.3, sequence_length=128, batch_size=4, image_slots=6
    )


def prepare(config, cache, model=MODEL, **kwargs):
    options = {"vocab_size": model.vocab_size, "document_window": 64} | kwargs
    return prepare_corpus(config, model=model, cache_dir=cache, progress=False, **options)


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return prepare(config, tmp_path_factory.mktemp("cache") / "data")


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_equal(a, b):
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), field.name)


def segments_of(corpus, batch):
    """Of each conversation of a batch: its text, what of it counts, and its tiles."""
    patch, per_tile = VISION.patch_token_id, 4
    for row in range(len(batch.tokens)):
        slot = 0
        for segment in range(1, batch.segment_ids[row].max(initial=0) + 1):
            here = batch.segment_ids[row] == segment
            tokens, targets = batch.tokens[row][here], batch.targets[row][here]
            np.testing.assert_array_equal(tokens[1:], targets[:-1])
            np.testing.assert_array_equal(batch.positions[row][here], np.arange(here.sum()))
            tiles = int((tokens == patch).sum()) // per_tile
            counted = corpus.processor.decode(targets[batch.loss_weights[row][here] > 0], keep_special=True)
            yield corpus.processor.decode(tokens), counted, batch.images[row, slot : slot + tiles]
            slot += tiles


def test_each_conversation_is_whole_with_its_own_pictures_in_order_and_counts_its_answer_alone(corpus, config):
    seen = []
    for batch in heldout_batches(corpus, config):
        assert batch.images.shape == (4, 6, 8, 8, 3)
        assert batch.images.dtype == np.uint8
        check_windows(batch.segment_ids, 64)
        check_patch_places(batch.tokens, batch.images, VISION)
        for text, counted, tiles in segments_of(corpus, batch):
            number = int(text.split("assistant")[0].split()[-1])
            seen.append(number)
            firsts = [tile for tile in tiles if tile[0, 0, 1] == number]  # padding of tiles and the next one's are other
            assert len(firsts) == len(tiles)
            assert sorted({int(t[0, 0, 2]) for t in tiles}) == list(range(number % 4))
            shades = [next(t for t in tiles if t[0, 0, 2] == j)[0, 0, 0] // 40 for j in range(number % 4)]
            assert counted == (" ".join(WORDS[shade] for shade in shades) or "none") + "<|eot|>"
    assert len(seen) == len(set(seen)) == corpus.counts.heldout_documents


def test_an_epoch_shows_each_training_conversation_once_and_no_row_has_more_tiles_than_slots(corpus, config):
    texts = []
    rows = corpus.train
    for row in range(len(rows)):
        batch = rows.batch([row])
        assert rows.documents.extras.tiles[rows.row(row).document].sum() <= config.image_slots
        texts += [text for text, _, _ in segments_of(corpus, batch)]
    assert len(texts) == len(set(texts)) == corpus.counts.train_documents
    assert corpus.counts.train_documents + corpus.counts.heldout_documents == 40


def test_a_resumed_stream_goes_on_with_the_next_batch_and_processes_read_their_parts(corpus, config):
    unbroken = train_batches(corpus, config)
    first = take(unbroken, 3)
    state = json.loads(json.dumps(unbroken.get_state()))
    resumed = train_batches(corpus, config)
    resumed.set_state(state)
    for a, b in zip(take(unbroken, 4), take(resumed, 4), strict=True):
        assert_equal(a, b)
    halves = [take(train_batches(corpus, config, places=half), 3) for half in np.split(np.arange(config.batch_size), 2)]
    for whole, left, right in zip(first, *halves, strict=True):
        np.testing.assert_array_equal(whole.images, np.concatenate([left.images, right.images]))
        np.testing.assert_array_equal(whole.tokens, np.concatenate([left.tokens, right.tokens]))


def test_a_run_that_goes_on_keeps_its_tokenizer_and_refuses_other_input(config, folder, tmp_path):
    first = prepare(config, tmp_path / "cache")
    again = prepare(config, tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert_equal(next(train_batches(again, config)), next(train_batches(first, config)))
    with pytest.raises(UserError, match="loss_on was assistant, now all"):
        prepare(dataclasses.replace(config, loss_on="all"), tmp_path / "cache")
    picture = folder / "pictures" / "1_0.png"
    before = picture.read_bytes()
    try:
        Image.new("RGB", (16, 16)).save(picture)
        with pytest.raises(UserError, match="have changed"):
            prepare(config, tmp_path / "cache")
    finally:
        picture.write_bytes(before)


def test_the_loss_can_count_everything_but_pictures_and_the_first_token(config, tmp_path):
    corpus = prepare(dataclasses.replace(config, loss_on="all"), tmp_path / "cache")
    batch = heldout_batches(corpus, config)[0]
    counted = batch.targets[batch.loss_weights > 0]
    assert not set(counted) & {NAMED.index(f"<|{n}|>") for n in ("patch", "image", "image_start", "image_end")}
    assert NAMED.index("<|header_start|>") in counted
    assert set(np.unique(batch.loss_weights)) == {0, 1}


def write(path, *records):
    path.mkdir(exist_ok=True)
    (path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def exchange(text="Hi", answer="Hello", **extra):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}], **extra}


def some(number=12):
    return [exchange(f"Hi {i}") for i in range(number)]


def test_what_does_not_fit_a_row_is_left_out_counted_and_named(config, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "large.png")
    pictured = exchange([{"type": "image"}, {"type": "text", "text": "?"}], images=["../large.png"])
    source = write(tmp_path / "data", *some(), exchange("long " * 300), pictured)
    given = dataclasses.replace(config, sources=(str(source),))
    with pytest.warns(UserWarning, match=r"2 of 14 conversations are left out.*a\.jsonl, line 13: \d+ tokens do not fit"):
        corpus = prepare(given, tmp_path / "cache")
    assert corpus.counts.skipped == 2
    assert corpus.counts.train_documents + corpus.counts.heldout_documents == 12
    reasons = (tmp_path / "cache" / "skipped.txt").read_text().splitlines()
    assert "line 14: 17 image tiles do not fit DataConfig.image_slots=6" in reasons[1]


def test_equal_conversations_count_once_and_prompts_with_responses_are_read(config, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    plain = [{"prompt": f"Say {i}", "response": "yes", "images": ["../x.png"]} for i in range(12)]
    source = write(tmp_path / "data", *plain, *plain[:3])
    corpus = prepare(dataclasses.replace(config, sources=(str(source),)), tmp_path / "cache")
    assert corpus.counts.dropped_duplicates == 3
    batch = corpus.train.batch([0])
    assert (batch.tokens == VISION.patch_token_id).sum() == 4 * batch.segment_ids.max() > 0


def test_text_alone_needs_no_vision_tower_and_rows_have_no_images(config, tmp_path):
    source = write(tmp_path / "data", *some())
    blind = dataclasses.replace(MODEL, vision=None)
    given = dataclasses.replace(config, sources=(str(source),), image_slots=0)
    corpus = prepare(given, tmp_path / "cache", model=blind)
    assert next(train_batches(corpus, given)).images is None
    with pytest.raises(UserError, match="needs a model that sees"):
        prepare(config, tmp_path / "other", model=blind)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "no conversation"}, r"a\.jsonl, line 13 must hold `messages`"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, r"line 13: message 1 has the role 'wizard'"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"line 13: .*nothing counts"),
        (exchange([{"type": "image", "path": "none.png"}]), r"line 13: no image at .*none\.png"),
        (exchange([{"type": "image"}]), r"line 13: message 1 has an image more than were given"),
        (exchange("x", images=["../x.png"]), r"line 13: 1 of 1 images given have no place"),
        (exchange("x", images=3), r"line 13: images must be a list, got 3"),
        (exchange("x", tools={"a": 1}), r"line 13: tools must be a list of JSON schemas"),
        (exchange("\ud800"), r"line 13: a text holds half of a surrogate pair"),
    ],
)
def test_a_conversation_that_cannot_be_read_is_named(config, tmp_path, record, message):
    source = write(tmp_path / "data", *some(), record)
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(config, sources=(str(source),)), tmp_path / "cache")


@pytest.mark.parametrize("place", [0, 7])
def test_a_conversation_that_cannot_be_read_teaches_the_tokenizer_nothing(config, tmp_path, place):
    """Wherever it stands: first, before any other is read, too."""
    records = [*some(6), exchange("rare " * 9), *some(12)[6:]]
    held = (str(write(tmp_path / "held", exchange("held"))),)
    without = dataclasses.replace(config, sources=(str(write(tmp_path / "whole", *records)),), heldout_sources=held)
    prepare(without, tmp_path / "cache")
    records.insert(place, {"text": "no conversation"})
    given = dataclasses.replace(without, sources=(str(write(tmp_path / "bad", *records)),), max_bad_records=1)
    corpus = prepare(given, tmp_path / "other")
    assert corpus.counts.skipped == 1
    learned = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("cache", "other")]
    assert learned[0] == learned[1]


def test_an_unreadable_picture_fails_before_training_or_leaves_its_conversation_out(config, tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    record = exchange([{"type": "image", "path": "../bad.png"}])
    given = dataclasses.replace(config, sources=(str(write(tmp_path / "data", *some(), record)),))
    with pytest.raises(UserError, match=r"line 13: .*bad\.png.*max_bad_records: 0"):
        prepare(given, tmp_path / "cache")
    corpus = prepare(dataclasses.replace(given, max_bad_records=1), tmp_path / "cache")
    assert corpus.counts.skipped == 1 and "bad.png" in caplog.text
    assert "line 13: " in (tmp_path / "cache" / "skipped.txt").read_text()


def test_a_picture_cut_short_behind_its_header_stops_training_or_does_not_count(config, tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-2000])
    small = dataclasses.replace(config, image_tiles=1, batch_size=1, heldout_fraction=0.2)
    records = [exchange([{"type": "image", "path": "../cut.jpg"}, {"type": "text", "text": str(i)}]) for i in range(20)]
    given = dataclasses.replace(small, sources=(str(write(tmp_path / "data", *records)),))
    corpus = prepare(given, tmp_path / "cache")
    with pytest.raises(UserError, match=r"cannot decode the image .*cut\.jpg"):
        next(train_batches(corpus, given))
    corpus = prepare(dataclasses.replace(given, max_bad_records=1), tmp_path / "skip")
    batch = corpus.train.batch([0])
    assert "cut.jpg" in caplog.text
    assert not batch.loss_weights.any()
    assert (batch.segment_ids > 0).any()


def test_sources_may_have_weights_and_held_out_files_of_their_own(config, tmp_path):
    sources = [str(write(tmp_path / name, *[exchange(f"{name} {i}") for i in range(12)])) for name in ("red", "blue", "held")]
    given = dataclasses.replace(config, sources=tuple(sources[:2]), heldout_sources=tuple(sources[2:]), weights=(3.0, 1.0))
    corpus = prepare(given, tmp_path / "cache")
    batches = take(train_batches(corpus, given), 4)
    rows = [{"red" in corpus.processor.decode(row[row > 0]) for row in batch.tokens} for batch in batches]
    assert rows == [{True, False}] * 4
    assert corpus.counts.heldout_documents == 12
    assert all("held" in text for batch in heldout_batches(corpus, given) for text, _, _ in segments_of_text(corpus, batch))


def segments_of_text(corpus, batch):
    for row in range(len(batch.tokens)):
        for segment in range(1, batch.segment_ids[row].max(initial=0) + 1):
            yield corpus.processor.decode(batch.tokens[row][batch.segment_ids[row] == segment]), None, None


@dataclasses.dataclass
class Sized:
    lengths: np.ndarray
    sources: np.ndarray
    extras: object


@dataclasses.dataclass
class Slots:
    tiles: np.ndarray
    image_slots: int


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 33), st.integers(0, 3)), max_size=40), st.integers(3, 7))
def test_packing_with_tiles_places_everything_once_within_tokens_and_slots(documents, slots):
    lengths, tiles = (np.array([d[i] for d in documents], int) for i in range(2))
    sized = Sized(lengths, np.zeros(len(lengths), int), Slots(tiles, slots))
    plan = plan_rows(sized, np.arange(len(lengths)), 32, 16)
    assert sorted(plan.document) == list(range(len(lengths)))
    assert (plan.length == lengths[plan.document] - 1).all()
    assert (np.diff(plan.row) >= 0).all() and set(plan.row) == set(range(plan.row.max(initial=-1) + 1))
    for row in set(plan.row):
        here = plan.row == row
        assert tiles[plan.document[here]].sum() <= slots
        taken = np.zeros(32, int)
        for offset, length in zip(plan.offset[here], plan.length[here], strict=True):
            taken[offset : offset + length] += 1
        assert (taken <= 1).all()


def test_tiles_in_a_batch_are_those_that_the_picture_is_cut_into(corpus, folder):
    rows = corpus.train
    for row in range(len(rows)):
        plan = rows.row(row)
        images = rows.batch([row]).images[0]
        shown = [s for document in plan.document for s in rows.documents.extras._shown[document]]
        expected = [cut_tiles(read_image(s.picture), 8, 16).tiles for s in shown]
        expected = np.concatenate([np.zeros((0, 8, 8, 3), np.uint8), *expected])
        np.testing.assert_array_equal(images[: len(expected)], expected)
        assert not images[len(expected) :].any()


def test_no_warning_where_nothing_is_left_out(config, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(config, tmp_path / "cache")

import json
import os
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import BEGIN, END, PAD, Tokenizer

DOCUMENTS = [
    'def area(width, height):\n    """The area."""\n    if width < 0:\n        raise ValueError("width")\n    return width * height\n',
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind. " * 3,
    "\n\n\tclass Point:\n\t\tpass\r\n\r\n" * 3,
    "Größe, 中文, हिन्दी, 🦙",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(DOCUMENTS, 400)


@given(st.text())
def test_every_text_survives_encoding_and_decoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\r\n\r\n",
        "a\u0301 \u00e1 \ufb01",
        "\x00\x01",
        "\ufeffbom",
        "\u2028",
        "  \n   x",
        "\U0010ffff",
        *DOCUMENTS,
    ],
)
def test_nothing_is_normalised(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_merges_shorten_text_and_a_line_end_with_its_indentation_is_one_token():
    code = "if x:\n    if y:\n        x = y\n        return\n" * 50
    tokenizer = Tokenizer.train_bpe([code], 300)
    assert len(tokenizer.encode(code)) < len(code) / 3
    assert [tokenizer.decode([token]) for token in tokenizer.encode("\n        return")] == ["\n        ", "return"]


@pytest.mark.parametrize("name", [BEGIN, END, PAD])
def test_the_name_of_a_control_token_in_a_text_is_text(tokenizer, tmp_path, name):
    tokenizer.save(tmp_path / "tokenizer.json")
    controls = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        text = f"before {name} after{name}{name}"
        for ids in (each.encode(text), each.encode_batch([text])[0]):
            assert not controls & set(ids)
            assert each.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id]) == END


def test_a_document_that_holds_control_names_trains_no_token_of_that_name():
    trained = Tokenizer.train_bpe([f"x{BEGIN}y " * 50], 300)
    assert trained.bos_id not in trained.encode(BEGIN)


def test_batches_encode_as_single_texts_do(tokenizer):
    assert tokenizer.encode_batch([*DOCUMENTS, ""]) == [tokenizer.encode(text) for text in [*DOCUMENTS, ""]]
    assert tokenizer.encode_batch([]) == []


def test_training_is_deterministic_across_processes():
    script = (
        "import hashlib, sys; from llama4_jax.processing.tokenizer import Tokenizer\n"
        "words = [f'{i * 7919 % 1009} value_{i % 97} = f({i})' for i in range(3000)]\n"
        "t = Tokenizer.train_bpe(words, 700)\n"
        "print(hashlib.sha256(t._backend.to_str().encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert [loaded.encode(text) for text in DOCUMENTS] == [tokenizer.encode(text) for text in DOCUMENTS]
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (
        tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size,
    )  # fmt: skip


def test_a_foreign_tokenizer_adds_cuts_and_pads_nothing(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "t.json"))
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.encode("a b a b a") == [2, 3, 2, 3, 2]
    assert loaded.encode_batch(["a", "a b a"]) == [[2], [2, 3, 2]]
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 1)


def test_vocabulary_counts_the_largest_id_even_above_holes(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 9}, unk_token="<s>"))
    backend.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(tmp_path / "t.json").vocab_size == 10


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer):
    tokenizer.require_fits(tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"{tokenizer.vocab_size} tokens, more than the model's 100"):
        tokenizer.require_fits(100)


def test_training_never_exceeds_the_vocabulary_and_refuses_one_too_small():
    assert Tokenizer.train_bpe(DOCUMENTS, 300).vocab_size == 300
    assert Tokenizer.train_bpe(["aa"], 1000).vocab_size < 1000
    with pytest.raises(UserError, match="at least 259"):
        Tokenizer.train_bpe(DOCUMENTS, 258)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no tokenizer at"),
        (b"", "is not a tokenizer.json"),
        (b'{"model": 3}', "is not a tokenizer.json"),
        (b"\xff\xfe", "cannot read the tokenizer"),
        (
            json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}).encode(),
            "no token that begins a text",
        ),
    ],
)
def test_a_missing_or_corrupt_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)


def test_special_names_become_their_tokens_when_asked(tokenizer):
    text = f"x{END}y"
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == [*tokenizer.encode("x"), tokenizer.eos_id, *tokenizer.encode("y")]
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, keep_special=False) == "xy"
    assert tokenizer.eos_id not in tokenizer.encode(text)  # asking once changes nothing


def test_tokens_made_special_are_so_in_the_copy_alone(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.add_tokens(["<tool>"])
    loose = Tokenizer.from_json(backend.to_str(), "loose")
    tool = loose.token_to_id("<tool>")
    strict = loose.with_special(["<tool>"])
    assert loose.encode("a<tool>").count(tool) == 1 and tool not in strict.encode("a<tool>")
    assert strict.encode("a<tool>", allow_special=True).count(tool) == 1
    assert "<tool>" in strict.special_tokens and "<tool>" in loose.added_tokens.keys() - loose.special_tokens.keys()
    assert strict.decode(strict.encode("a<tool>")) == "a<tool>"
    assert loose.with_special([BEGIN]) is loose


def test_what_a_file_puts_before_a_text_is_known(tokenizer, tmp_path):
    assert tokenizer.prefix == [tokenizer.bos_id]  # without a rule, as documents begin
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    tokens = [(BEGIN, tokenizer.bos_id), (END, tokenizer.eos_id)]
    for form, expected in ((f"{BEGIN} $A {END}", [tokenizer.bos_id]), (f"$A {END}", []), ("$A", [])):
        backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=tokens)
        assert Tokenizer.from_json(backend.to_str(), "x").prefix == expected


def test_the_given_special_tokens_are_the_first_ids():
    names = [BEGIN, END, PAD, "<|eot|>", "<|patch|>"]
    trained = Tokenizer.train_bpe(DOCUMENTS, 300, names)
    assert list(trained.special_tokens) == names and list(trained.special_tokens.values()) == [0, 1, 2, 3, 4]

"""Llama 4's tokenizer: on a small file of ranks made here always, on Meta's where llama-models is installed."""

import base64
import functools
import importlib.util
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.errors import UserError
from llama4_jax.processing import ranks
from llama4_jax.processing.tokenizer import Tokenizer

WORDS = "the then there thaw lower low lowest new newer newest width 中文 größe ABC Abc 1234 aaaa"
HARD = [
    "", " ", "\n", "\r\n \r\n", "  x\t\n\n y", "don't DON'T we'LL x'\u017f", "1234567", "HTTPServerError fooBarBAZ", "a/b//c\n/d",
    "\u0085\u2028\u3000\ufeff\x00", "e\u0301 é ﬁ ǅ ʰ", "aaaaaaaa", "🦙👩‍👩‍👧", "<|begin_of_text|>x<|eot|>", "\U0010ffff",
]  # fmt: skip


def small_ranks():
    """All bytes, backwards, then merges as training would find them: of the most frequent pair, again and again."""
    tokens = [bytes([byte]) for byte in reversed(range(256))]
    parts = [[bytes([byte]) for byte in word.encode()] for word in (WORDS + " " + WORDS.replace(" ", "  ")).split(" ")]
    parts = [[b" ", *part] for part in parts]
    for _ in range(150):
        pairs = {}
        for part in parts:
            for pair in itertools.pairwise(part):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        tokens.append(best[0] + best[1])
        parts = [merged(part, tokens[-1]) for part in parts]
    return list(dict.fromkeys(tokens))


def merged(parts, token):
    done = []
    for part in parts:
        if done and done[-1] + part == token:
            done[-1] = token
        else:
            done.append(part)
    return done


def write_ranks(path, tokens):
    path.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def tokens():
    return small_ranks()


@pytest.fixture(scope="module")
def path(tokens, tmp_path_factory):
    return write_ranks(tmp_path_factory.mktemp("ranks") / "tokenizer.model", tokens)


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path)


def by_definition(piece, tokens):
    """Merges, again and again, the neighbours that make the token of the lowest rank, the leftmost first."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    if piece in rank_of:
        return [rank_of[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        candidates = [(rank_of[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in rank_of]
        if not candidates:
            return [rank_of[part] for part in parts]
        i = min(candidates)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


letters = st.text(alphabet=st.sampled_from("thenlowrsaA中ü"), min_size=1, max_size=15)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="then low Abc'S123\n/.\t中ü"))
def test_every_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < tokenizer.bos_id for token in ids)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["th", "low", "N", ""]), letters)
def test_a_word_is_merged_by_rank(tokenizer, tokens, start, rest):
    """Lower-case words are one piece of the split rule, so the definition applies to them whole."""
    word = " " + (start + rest).lower()
    assert tokenizer.encode(word) == by_definition(word.encode(), tokens)


def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(tokenizer, tokens):
    for text in HARD:
        assert b"".join(tokens[token] for token in tokenizer.encode(text)) == text.encode()


def test_special_tokens_follow_the_ranks_in_their_published_order(tokenizer, tokens):
    size = len(tokens)
    assert tokenizer.vocab_size == size + 2048
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (size, size + 1, size + 18)
    names = {
        0: "begin_of_text",
        5: "header_start",
        8: "eot",
        80: "image_start",
        90: "image",
        92: "patch",
        1143: "reasoning_thinking_end",
    }
    for offset, name in names.items():
        assert tokenizer.decode([size + offset]) == f"<|{name}|>"
    assert len(set(ranks.special_tokens())) == 2048


def test_a_cut_tokenizer_keeps_the_first_ranks_and_the_named_special_tokens(path, tokens):
    cut = Tokenizer.load(path, ranks=300)
    assert cut.vocab_size == 300 + 21 and (cut.bos_id, cut.eos_id) == (300, 301)
    assert cut.decode([300 + i for i in range(21)]) == "".join(n for n in ranks.special_tokens() if "reserved" not in n)
    for text in HARD:
        ids = cut.encode(text)
        assert cut.decode(ids) == text and all(token < 300 for token in ids)
    assert cut.encode(" newest") == by_definition(b" newest", tokens[:300])


def test_a_saved_one_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert [loaded.encode(text) for text in (*HARD, WORDS)] == [tokenizer.encode(text) for text in (*HARD, WORDS)]
    assert (loaded.bos_id, loaded.vocab_size) == (tokenizer.bos_id, tokenizer.vocab_size)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no tokenizer at"),
        (b"YQ== 0\nYg==\n", "line 2 is not a token in base64 and 1"),
        (b"YQ== 0\nYg== 2\n", "line 2 is not a token"),
        (b"Y!== 0\n", "line 1 is not a token"),
        (b"YQ== 0\nYQ== 1\n", "a token is there twice"),
        (b"YQ== 0\n", "lack 255 of the 256 bytes"),
        (b"\xff\xfe\x00", "line 1 is not a token"),
    ],
)
def test_a_missing_or_corrupt_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_impossible_cuts_are_refused(path, tokens, tmp_path):
    for keep, message in ((0, "must be 1 to"), (len(tokens) + 1, "must be 1 to"), (255, "lack 1 of the 256 bytes")):
        with pytest.raises(UserError, match=message):
            Tokenizer.load(path, ranks=keep)
    with pytest.raises(UserError, match=r"tokenizer_ranks cuts a tokenizer\.model, not .*json"):
        Tokenizer.load(tmp_path / "tokenizer.json", ranks=300)


def test_llama_3s_file_of_the_same_name_is_refused(path, tokens, monkeypatch):
    monkeypatch.setattr(ranks, "_LLAMA3_RANKS", len(tokens))
    with pytest.raises(UserError, match="is Llama 3's tokenizer"):
        Tokenizer.load(path)


def test_without_llama_models_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'llama4-jax\[llama-tokenizer\]'") as error:
        Tokenizer.load("llama4")
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------------------
# The published one


@functools.cache
def published():
    if importlib.util.find_spec("llama_models") is None:
        pytest.skip("llama-models is not installed")
    return Tokenizer.load("llama4")


def test_the_published_tokenizer_has_the_published_ids():
    tokenizer = published()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (202_048, 200_000, 200_001, 200_018)


@functools.cache
def metas():
    """Meta's own code around tiktoken."""
    published()
    pytest.importorskip("tiktoken")
    from llama_models.llama4.tokenizer import Tokenizer as Reference

    return Reference.get_instance()


@pytest.mark.parametrize("text", [*HARD, WORDS])
def test_the_published_tokenizer_encodes_hard_texts_as_metas_code_does(text):
    assert published().encode(text) == metas().encode(text, bos=False, eos=False)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="abcXYZ'sStTlL 0123\n\r\t/.,é\u017f中ไ🦙\u0301\u00a0\u200d"))
def test_the_published_tokenizer_encodes_any_text_as_metas_code_does(text):
    ids = published().encode(text)
    assert ids == metas().encode(text, bos=False, eos=False)
    assert published().decode(ids) == text

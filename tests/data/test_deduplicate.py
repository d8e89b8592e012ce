import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.data.deduplicate import SIMILARITY, Distinct, is_held_out, shingles, similarity


def distinct(texts):
    """Indices of the texts that are kept."""
    seen = Distinct()
    return [i for i, text in enumerate(texts) if seen.keep(text)]


def sentence(seed, words=200):
    generator = random.Random(seed)
    return " ".join(
        generator.choice(["alpha", "beta", "gamma", "delta", "je", "x1", "été", "中"]) + str(generator.random())[:6]
        for _ in range(words)
    )


def with_changed_words(text, count, seed=0):
    words = text.split()
    for place in random.Random(seed).sample(range(len(words)), count):
        words[place] = f"changed{place}"
    return " ".join(words)


def test_exact_and_near_duplicates_go_and_the_first_stays():
    a, b = sentence(1), sentence(2)
    texts = [a, b, a, with_changed_words(b, 2), a.upper(), a.replace(" ", ",\n"), sentence(3)]
    assert distinct(texts) == [0, 1, 6]


@pytest.mark.parametrize("texts", [["", ""], ["x", "x"], ["!?", "!?"], ["a b c d", "a b c d"]])
def test_texts_shorter_than_a_shingle_are_compared_whole(texts):
    assert distinct(texts) == [0]
    assert distinct([texts[0], texts[0] + "z"]) == [0, 1]


def test_texts_without_spaces_are_compared_by_character():
    chinese = "".join(chr(0x4E00 + random.Random(i).randrange(3000)) for i in range(300))
    assert distinct([chinese, chinese[:150] + "错" + chinese[151:]]) == [0]
    assert distinct([chinese, chinese[::-1]]) == [0, 1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=12))
def test_no_two_kept_texts_are_near_duplicates_and_each_dropped_one_has_a_kept_twin(recipe):
    texts = [with_changed_words(sentence(seed, 80), changed, seed=changed) for seed, changed in recipe]
    kept = distinct(texts)
    sets = [shingles(text) for text in texts]
    for i in kept:
        assert all(similarity(sets[i], sets[j]) < SIMILARITY for j in kept if j != i)
    for i in set(range(len(texts))) - set(kept):
        assert any(similarity(sets[i], sets[j]) >= SIMILARITY for j in kept if j < i)


def test_similarity_is_the_jaccard_index():
    a, b = np.array([1, 2, 3, 4], np.uint64), np.array([3, 4, 5], np.uint64)
    assert similarity(a, b) == 2 / 5
    assert similarity(a, a) == 1


def test_the_split_depends_on_nothing_but_the_name_and_takes_about_its_share():
    names = [f"folder/file_{i}.py" for i in range(20_000)]
    held = [is_held_out(name, 0.05) for name in names]
    assert abs(np.mean(held) - 0.05) < 0.01
    assert all(is_held_out(name, 0.1) for name, was in zip(names, held, strict=True) if was)  # a larger share only adds
    assert isinstance(is_held_out(os.fsdecode(b"caf\xe9.txt"), 0.05), bool)  # a file's name need not be UTF-8

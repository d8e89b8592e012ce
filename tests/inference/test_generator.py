"""Text generation gives what whole forward passes would, whatever the batch, the padding, the pieces and the streaming."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.config import AttentionTemperature, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.inference import decoding, generator
from llama4_jax.inference.generator import Generator, Limits
from llama4_jax.inference.sampling import Sampling
from llama4_jax.model.llama4 import Llama4, init_params
from llama4_jax.processing.processor import Processor, Prompt
from llama4_jax.processing.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    expert_ffn_size=16,
    nope_interval=2,
    attention_chunk_size=8,
    temperature=AttentionTemperature(floor=4, scale=0.5),
    initializer_range=0.3,
    max_position_embeddings=128,
)
PROMPTS = [Prompt([5, 9, 200]), Prompt([7] * 6 + [11, 13, 17, 19, 23])]
NEW = 12  # from inside the first chunk and from inside the second, over the next edge


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_bpe(["the cat sat on the mat " * 20], 300)


@pytest.fixture(scope="module")
def tiny(tokenizer):
    model = Llama4(CONFIG)
    return Generator(model, init_params(model, jax.random.key(0)), Processor(tokenizer, CONFIG, stop_ids=[]))


@pytest.fixture(scope="module")
def greedy(tiny):
    return [completion.tokens for completion in tiny.complete(PROMPTS, limits=Limits(NEW))]


def test_greedy_decoding_of_ragged_prompts_is_the_argmax_of_whole_passes(tiny, greedy):
    """One pass over prompt and continuation must choose, at each place, the token that decoding chose."""
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        row = np.zeros((1, 11 + NEW), np.int32)
        row[0, : len(prompt.tokens) + NEW] = [*prompt.tokens, *new]
        logits = np.asarray(jax.jit(tiny.model.apply)({"params": tiny.params}, row).logits[0])
        places = slice(len(prompt.tokens) - 1, len(prompt.tokens) + NEW - 1)
        top = np.sort(logits[places], axis=-1)
        assert (top[:, -1] - top[:, -2] > 1e-4).all()  # no near tie: the comparison is of decoding, not of rounding
        np.testing.assert_array_equal(logits[places].argmax(-1), new)


def test_a_prompt_in_pieces_is_the_prompt_at_once(tiny, monkeypatch):
    """Pieces of 16: a row of 3 tokens lies wholly in the last, one of 40 in three of them, over five chunk edges."""
    prompts = [Prompt([5, 9, 200]), Prompt(np.random.default_rng(0).integers(3, 300, 40).tolist())]
    want = [c.tokens for c in tiny.complete(prompts, limits=Limits(NEW))]
    monkeypatch.setattr(generator, "PREFILL_PIECE", 16)
    assert [c.tokens for c in tiny.complete(prompts, limits=Limits(NEW))] == want


def test_a_row_draws_the_same_in_any_batch_and_repeats_by_its_seed(tiny):
    sampled = {"sampling": Sampling(1.0, top_k=50), "limits": Limits(NEW)}
    together = [c.tokens for c in tiny.complete(PROMPTS, **sampled, seed=1)]
    assert tiny.complete(PROMPTS[:1], **sampled, seed=1)[0].tokens == together[0]
    assert tiny.complete([PROMPTS[0], Prompt([8] * 20)], **sampled, seed=1)[0].tokens == together[0]
    assert [c.tokens for c in tiny.complete(PROMPTS, **sampled, seed=2)] != together


def test_one_compilation_serves_every_length_of_a_bucket(tiny):
    tiny.complete([Prompt([4] * 9)], limits=Limits(5))
    before = decoding.prefill._cache_size(), decoding.decode._cache_size()
    for length in (1, 2, 7, 16):
        tiny.complete([Prompt([4] * length)], limits=Limits(16 - length or 1))
    after = decoding.prefill._cache_size(), decoding.decode._cache_size()
    assert after[0] - before[0] <= 1 and after[1] - before[1] <= 1  # the bucket of 16 + 1 is another


@given(st.integers(1, 11_000_000))
def test_a_long_cache_has_an_eighth_to_spare_at_most(size):
    slots = decoding.slots_for(size)
    assert size <= slots <= max(decoding.bucket(size) if size <= 8192 else 1.125 * size, 16)
    assert slots % min(decoding.bucket(size), 512) == 0  # whole blocks of the kernel
    assert decoding.slots_for(slots) == slots
    assert decoding.slots_for(10_485_760) == 10_485_760  # all of Scout's positions, and no more


def test_a_stop_token_ends_a_row_and_not_its_neighbours(tiny, tokenizer, greedy):
    length = next(i for i, token in enumerate(greedy[0]) if token != greedy[0][0]) + 1  # more than one, and not all
    stop = greedy[0][length - 1]
    assert length < NEW
    processor = Processor(tokenizer, CONFIG, stop_ids=[stop])
    first, second = Generator(tiny.model, tiny.params, processor).complete(PROMPTS, limits=Limits(NEW))
    assert first.tokens == greedy[0][:length] and first.finish_reason == "stop"
    until = greedy[1].index(stop) + 1 if stop in greedy[1] else NEW
    assert second.tokens == greedy[1][:until] and second.finish_reason == ("stop" if stop in greedy[1] else "length")


class Scripted:
    """A generator whose model says what it is told: everything but the forward pass is as it is."""

    def __init__(self, tokenizer, text, monkeypatch, at_once=1):
        self.ids = tokenizer.encode(text)
        self.generator = Generator(Llama4(CONFIG), {}, Processor(tokenizer, CONFIG, stop_ids=[]))

        def drawn(prompts, sampling, limits, seed, _, done):
            for start in range(0, min(len(self.ids), limits.max_new_tokens), at_once):
                yield [self.ids[start : min(start + at_once, limits.max_new_tokens)]]
                if done():
                    return

        monkeypatch.setattr(self.generator, "_drawn", drawn)


@pytest.mark.parametrize("at_once", [1, 3, 50])
@pytest.mark.parametrize(
    "text, stop, want, reason",
    [
        ("the cat sat", (), "the cat sat", "length"),
        ("the cat sat", ("cat",), "the ", "stop"),
        ("the cat sat", ("sat on", "mat"), "the cat sat", "length"),  # begins, and never ends
        ("a\n\nb", ("\n\n", "b"), "a", "stop"),
        ("abcabd", ("abd",), "abc", "stop"),
        ("xaab", ("aab", "ab"), "x", "stop"),  # of two that end together the one that begins first
        ("naïve 猫 é", ("é",), "naïve 猫 ", "stop"),  # characters of several tokens each
    ],
)
def test_stop_strings_cut_the_text_wherever_tokens_end(tokenizer, monkeypatch, text, stop, want, reason, at_once):
    """Streamed or not, and never a character more than what stays."""
    scripted = Scripted(tokenizer, text, monkeypatch, at_once)
    limits = Limits(200, stop)
    (completion,) = scripted.generator.complete(["x"], limits=limits)
    assert (completion.text, completion.finish_reason) == (want, reason)
    assert "".join(scripted.generator.stream("x", limits=limits)) == want


def test_streaming_gives_the_text_of_completing(tiny):
    for prompt in PROMPTS:
        pieces = list(tiny.stream(prompt, limits=Limits(40)))
        assert "".join(pieces) == tiny.complete([prompt], limits=Limits(40))[0].text
        assert len(pieces) > 1


def test_a_router_bias_reaches_decoding(tokenizer):
    model = Llama4(dataclasses.replace(CONFIG, router_bias=True))
    params = init_params(model, jax.random.key(0))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))["router_bias"]
    texts = []
    for size in (0.0, 100.0):
        bias = jax.tree.map(lambda x: jnp.arange(x.shape[-1]) * jnp.full(x.shape, size), shapes)  # noqa: B023
        generator_ = Generator(model, params, Processor(tokenizer, CONFIG, stop_ids=[]), model_state={"router_bias": bias})
        texts.append(generator_.complete(PROMPTS, limits=Limits(NEW)))
    assert texts[0] != texts[1]


def test_bad_input_is_named(tiny):
    with pytest.raises(UserError, match="at least one token"):
        tiny.complete([Prompt([1]), Prompt([])], limits=Limits(2))
    with pytest.raises(UserError, match="a prompt of 120 tokens and max_new_tokens=9 exceed the model's 128 positions"):
        tiny.complete([Prompt([1] * 120)], limits=Limits(9))
    with pytest.raises(UserError, match="max_new_tokens must be 1 or more, got 0"):
        Limits(0)
    with pytest.raises(UserError, match=r"stop strings must not be empty, got \('a', ''\)"):
        Limits(stop=("a", ""))


def test_prompts_over_context_continue_as_on_one_device():
    """Of ragged prompts, one of several chunks, on meshes whose shards hold parts of a row."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"}
    script = str(Path(__file__).with_name("over_context.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    alone, *on_meshes = json.loads(done.stdout)
    assert len(alone[1]) == 12 and on_meshes == [alone] * 2

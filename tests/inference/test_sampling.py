"""Decoding with a cache gives what the whole forward pass would, whatever the padding, and sampling obeys its settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import AttentionTemperature, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.inference.sampling import Sampling, generate, generate_text, left_padded
from llama4_jax.model.llama4 import Llama4, init_params
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
)
PROMPTS = [[5, 9, 200], [7] * 6 + [11, 13, 17, 19, 23]]
NEW = 12  # from inside the first chunk and from inside the second, over the next edge


@pytest.fixture(scope="module")
def model_and_params():
    model = Llama4(CONFIG)
    return model, init_params(model, jax.random.key(0))


@pytest.fixture(scope="module")
def greedy(model_and_params):
    tokens, segments = left_padded(PROMPTS)
    return np.asarray(generate(*model_and_params, tokens, segments, jax.random.key(0), max_new_tokens=NEW))


def test_greedy_decoding_of_ragged_prompts_is_the_argmax_of_whole_passes(model_and_params, greedy):
    """One pass over prompt and continuation must choose, at each place, the token that decoding chose."""
    model, params = model_and_params
    for prompt, new in zip(PROMPTS, greedy, strict=True):
        row = np.zeros((1, 11 + NEW), np.int32)
        row[0, : len(prompt) + NEW] = [*prompt, *new]
        logits = np.asarray(jax.jit(model.apply)({"params": params}, row).logits[0])
        places = slice(len(prompt) - 1, len(prompt) + NEW - 1)
        top = np.sort(logits[places], axis=-1)
        assert (top[:, -1] - top[:, -2] > 1e-4).all()  # no near tie: the comparison is of decoding, not of rounding
        np.testing.assert_array_equal(logits[places].argmax(-1), new)


def test_sampling_repeats_with_its_key_and_differs_without(model_and_params):
    tokens, segments = left_padded(PROMPTS)

    def sample(seed):
        key = jax.random.key(seed)
        return np.asarray(generate(*model_and_params, tokens, segments, key, max_new_tokens=NEW, sampling=Sampling(1.0)))

    np.testing.assert_array_equal(sample(1), sample(1))
    assert (sample(1) != sample(2)).any()


def test_temperature_draws_from_the_scaled_distribution():
    """Frequencies of 20,000 draws lie within five standard errors of softmax(logits / 2)."""
    logits = jnp.array([2.0, 0.0, -1.0, 4.0])
    draws = np.asarray(Sampling(2.0).draw(jnp.tile(logits, (20_000, 1)), jax.random.key(0)))
    p = np.asarray(jax.nn.softmax(logits / 2))
    got = np.bincount(draws, minlength=4) / 20_000
    assert (np.abs(got - p) < 5 * np.sqrt(p * (1 - p) / 20_000)).all()


def test_text_goes_in_and_comes_out_and_ends_at_the_end_token(model_and_params):
    tokenizer = Tokenizer.train_bpe(["the cat sat on the mat " * 20], 300)
    model, params = model_and_params
    text = generate_text(model, params, tokenizer, "the cat", max_new_tokens=4)
    prompt = left_padded([[tokenizer.bos_id, *tokenizer.encode("the cat")]])
    ids = generate(model, params, *prompt, jax.random.key(0), max_new_tokens=4, sampling=Sampling(0.0))
    assert text == tokenizer.decode(np.asarray(ids)[0].tolist())
    always_end = jax.tree.map(jnp.zeros_like, params)
    always_end["final_norm"]["scale"] += 1
    bias = jnp.zeros((CONFIG.hidden_size, CONFIG.vocab_size)).at[:, tokenizer.eos_id].set(1.0)
    always_end["embed"]["embedding"] += 1.0
    always_end["lm_head"]["kernel"] = bias
    assert generate_text(model, always_end, tokenizer, "the cat", max_new_tokens=4) == ""


def test_bad_input_is_named():
    with pytest.raises(UserError, match="at least one token"):
        left_padded([[1], []])
    with pytest.raises(UserError, match=r"temperature must be 0 or more, got -1.0"):
        Sampling(-1.0)


def test_a_model_of_another_config_compiles_by_itself(model_and_params):
    """The jit cache is keyed by the model's config: equal ones share a program, others do not."""
    assert Llama4(CONFIG) == Llama4(dataclasses.replace(CONFIG))
    assert Llama4(CONFIG) != Llama4(dataclasses.replace(CONFIG, rope_theta=1.0))

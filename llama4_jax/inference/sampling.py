"""Text out: one prefill, then one token at a time from the cache."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama4_jax.errors import UserError
from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Llama4
from llama4_jax.processing.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Attributes:
    temperature: of the softmax; 0 takes the likeliest token.
    """

    temperature: float = 0.0

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"Sampling.temperature must be 0 or more, got {self.temperature}")

    def draw(self, logits: Float[Array, "B V"], key: jax.Array) -> Int[Array, " B"]:
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / self.temperature).astype(jnp.int32)


def left_padded(prompts: list[list[int]]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Prompts of different lengths as tokens and segment ids (0 is padding), ending together."""
    if not prompts or not all(prompts):
        raise UserError("every prompt needs at least one token")
    length = max(map(len, prompts))
    tokens = np.array([[0] * (length - len(p)) + p for p in prompts], np.int32)
    valid = np.array([[0] * (length - len(p)) + [1] * len(p) for p in prompts], np.int32)
    return tokens, valid


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def generate(
    model: Llama4,
    params: dict,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    model_state: dict | None = None,
) -> Int[Array, "B t"]:
    """The `max_new_tokens` tokens that follow left-padded prompts, whatever they are: cut at end tokens afterwards.

    `model_state` is TrainState's: what a model with a router bias needs beside its parameters.
    """
    variables = {"params": params} | (model_state or {})
    B, T = tokens.shape
    cache = Cache.create(model.config, B, T + max_new_tokens, model.execution.compute_dtype)
    prefill = model.apply(variables, tokens, segment_ids=segment_ids, cache=cache)
    keys = jax.random.split(key, max_new_tokens)
    first = sampling.draw(prefill.logits[:, -1], keys[0])

    def step(carry, key):
        token, cache = carry
        output = model.apply(variables, token[:, None], cache=cache)
        token = sampling.draw(output.logits[:, -1], key)
        return (token, output.cache), token

    _, rest = jax.lax.scan(step, (first, prefill.cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def generate_text(
    model: Llama4,
    params: dict,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    model_state: dict | None = None,
) -> str:
    """The continuation of one prompt, up to the first end-of-text token. `model_state` as in `generate`."""
    tokens, segment_ids = left_padded([[tokenizer.bos_id, *tokenizer.encode(prompt)]])
    sampling = Sampling(temperature)
    key = jax.random.key(seed)
    new = generate(
        model, params, tokens, segment_ids, key, max_new_tokens=max_new_tokens, sampling=sampling, model_state=model_state
    )
    ids = np.asarray(new)[0].tolist()
    return tokenizer.decode(ids[: ids.index(tokenizer.eos_id)] if tokenizer.eos_id in ids else ids)

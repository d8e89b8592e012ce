"""The two compiled programs of text generation: reading a piece of the prompts, and drawing some tokens.

Prompts of different lengths end together: shorter ones are padded on the left. All shapes come from a few sizes (`bucket`), so that
a program is compiled once for a size and not for each prompt. Prompts that lie over `context` are read at once, begin together, and are
as long as the cache (parallel/cache_parallel.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llama4_jax.errors import UserError
from llama4_jax.inference.sampling import Sampling
from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.vision import Pixels
from llama4_jax.parallel.cache_parallel import cache_shardings
from llama4_jax.parallel.mesh import current_mesh

NOTHING = -1  # in place of a token, after the last one of a row
_SMALLEST = 16
_MANY = 8192


@struct.dataclass
class State:
    """Where decoding stands.

    Attributes:
        cache: all tokens but the last.
        logits: of the token after the last.
        keys: of each row; its n-th token is drawn by the key folded with n, whatever else the batch holds.
        drawn: tokens so far.
        finished: rows that drew a stop token.
    """

    cache: Cache
    logits: Float[Array, "B V"]
    keys: Key[Array, " B"]
    drawn: Int[Array, ""]
    finished: Bool[Array, " B"]


def bucket(size: int, smallest: int = _SMALLEST) -> int:
    """The power of two that holds `size`."""
    return max(smallest, 1 << (size - 1).bit_length())


def slots_for(size: int) -> int:
    """Slots of a cache for rows of `size` tokens: a power of two, or where that would be much an eighth of one at a time. So a
    program serves many lengths, and of a long cache at most an eighth stays empty."""
    whole = bucket(size)
    step = whole // 16 if whole > _MANY else whole
    return -(-size // step) * step


def padded(
    prompts: list[list[int]], length: int, *, on_the_left: bool
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Prompts as tokens and segment ids (0 is padding), which end together, or else begin together."""
    if not all(prompts):
        raise UserError("every prompt needs at least one token")
    tokens, segment_ids = np.zeros((2, len(prompts), length), np.int32)
    for i, prompt in enumerate(prompts):
        place = slice(length - len(prompt), length) if on_the_left else slice(0, len(prompt))
        tokens[i, place], segment_ids[i, place] = prompt, 1
    return tokens, segment_ids


@partial(jax.jit, static_argnames=("model", "batch_size", "capacity"))
def empty_cache(model: Llama4, batch_size: int, capacity: int) -> Cache:
    """Compiled, so that on a mesh no device ever holds all of it."""
    cache = Cache.create(model.config, batch_size, capacity, model.execution.compute_dtype)
    mesh = current_mesh()
    return cache if mesh is None else jax.lax.with_sharding_constraint(cache, cache_shardings(cache, model.config, mesh))


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    model: Llama4,
    variables: dict,
    cache: Cache,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    images: Pixels | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Logits after the last token of each row, and the cache with a piece of the prompts in it."""
    output = model.apply(variables, tokens, segment_ids=segment_ids, images=images, cache=cache, last_logits_only=True)
    return output.logits[:, 0], output.cache


@partial(jax.jit, static_argnames=("model", "sampling", "room"), donate_argnames="state")
def decode(
    model: Llama4,
    variables: dict,
    state: State,
    stop_ids: Int[Array, " stops"],
    steps: Int[Array, ""],
    *,
    sampling: Sampling,
    room: int,
) -> tuple[State, Int[Array, "B room"]]:
    """Draws up to `steps` <= `room` tokens a row, fewer when all rows have finished. A stop token is the last of its row."""
    B = len(state.finished)

    def unfinished(carry):
        state, _, i = carry
        return (i < steps) & ~jnp.all(state.finished)

    def step(carry):
        state, tokens, i = carry
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys, state.drawn)
        token = sampling.draw(state.logits, keys)
        tokens = tokens.at[:, i].set(jnp.where(state.finished, NOTHING, token))
        finished = state.finished | jnp.isin(token, stop_ids)
        output = model.apply(variables, token[:, None], cache=state.cache)
        state = state.replace(cache=output.cache, logits=output.logits[:, 0], drawn=state.drawn + 1, finished=finished)
        return state, tokens, i + 1

    state, tokens, _ = jax.lax.while_loop(unfinished, step, (state, jnp.full((B, room), NOTHING, jnp.int32), 0))
    return state, tokens

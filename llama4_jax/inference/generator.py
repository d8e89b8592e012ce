"""Prompts in, text out: batches, stop strings and streaming around the compiled programs of decoding.py."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama4_jax.checkpoints.load import load_params
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.config import ExecutionConfig
from llama4_jax.errors import UserError
from llama4_jax.inference import decoding
from llama4_jax.inference.sampling import Sampling
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel.rules import use_mesh
from llama4_jax.processing.processor import Processor, Prompt

PREFILL_PIECE = 1024  # tokens of a row that are read at one time; bounds the memory of a long prompt
DECODE_ROOM = 32  # tokens between two looks at what was drawn; streaming looks sooner
STREAMED = 8


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a text ends, beside the model's own stop tokens.

    Attributes:
        max_new_tokens: at most so many.
        stop: strings that end it; they are not part of it.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not all(self.stop):
            raise UserError(f"stop strings must not be empty, got {self.stop!r}")


@dataclasses.dataclass(frozen=True)
class Completion:
    """Attributes:
    text: without the stop token or stop string.
    tokens: as drawn, a stop token included.
    finish_reason: stop: a stop token or stop string came; length: max_new_tokens were drawn.
    """

    text: str
    tokens: list[int]
    finish_reason: Literal["stop", "length"]


class Generator:
    """A model with its words: `Generator(model, params, processor).complete(["Once upon a time"])`."""

    def __init__(
        self, model: Llama4, params: dict, processor: Processor, *, model_state: dict | None = None, mesh: Mesh | None = None
    ):
        """`model_state` is TrainState's, for a model with a router bias; `mesh` the one that the parameters lie on."""
        self.model = model
        self.processor = processor
        self.params = params
        self._variables = {"params": params} | (model_state or {})
        self._mesh = mesh

    def complete(
        self, prompts: Sequence[str | Prompt], sampling: Sampling = Sampling(), limits: Limits = Limits(), *, seed: int = 0
    ) -> list[Completion]:
        """What follows each prompt; all are decoded together.

        Row i draws by the seed and i alone: neither the other rows nor padding change it.

        Raises:
            UserError: a prompt is empty or does not fit the model.
        """
        rows = [_Row(self.processor, limits) for _ in prompts]
        for tokens in self._drawn(prompts, sampling, limits, seed, DECODE_ROOM, lambda: all(row.done for row in rows)):
            for row, new in zip(rows, tokens, strict=True):
                row.add(new)
        return [row.completion() for row in rows]

    def stream(
        self, prompt: str | Prompt, sampling: Sampling = Sampling(), limits: Limits = Limits(), *, seed: int = 0
    ) -> Iterator[str]:
        """The text that `complete` gives, piece by piece."""
        row, shown = _Row(self.processor, limits), 0
        for (tokens,) in self._drawn([prompt], sampling, limits, seed, STREAMED, lambda: row.done):
            row.add(tokens)
            text = row.certain_text()
            if len(text) > shown:
                yield text[shown:]
                shown = len(text)
        if rest := row.completion().text[shown:]:
            yield rest

    def _drawn(self, prompts, sampling, limits, seed, at_once, done) -> Iterator[list[list[int]]]:
        """New tokens of all rows, some at a time, until each has its stop token, `done()`, or max_new_tokens."""
        prompts = [self.processor.prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        stop_ids = jnp.asarray(self.processor.stop_ids or (decoding.NOTHING,), jnp.int32)
        with self._on_mesh():
            state = self._read(prompts, limits.max_new_tokens, seed)
        left = limits.max_new_tokens
        while left > 0:
            steps = min(at_once, left)
            with self._on_mesh():  # not over a yield: whoever reads the stream is not on the mesh
                state, tokens = decoding.decode(
                    self.model, self._variables, state, stop_ids, jnp.int32(steps), sampling=sampling, room=DECODE_ROOM
                )
            yield [[token for token in row if token != decoding.NOTHING] for row in np.asarray(tokens).tolist()]
            left -= steps
            if done() or bool(state.finished.all()):
                return

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else use_mesh(self._mesh)

    def _read(self, prompts: list[Prompt], max_new_tokens: int, seed: int) -> decoding.State:
        """The state after all prompts."""
        longest = max((len(prompt.tokens) for prompt in prompts), default=0)
        context = self.model.config.max_position_embeddings
        if longest + max_new_tokens > context:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's {context} positions"
            )
        if not prompts:
            raise UserError("there are no prompts")
        images = self._images(prompts)
        if whole_rows := self._length_over_context(longest + max_new_tokens):
            piece = length = capacity = whole_rows
        else:
            piece, capacity = decoding.bucket(longest), decoding.slots_for(longest + max_new_tokens)
            if images is None:  # patches are counted from the row's start, so a row with pictures is read whole
                piece = min(piece, PREFILL_PIECE)
            length, capacity = -(-longest // piece) * piece, max(piece, capacity)
        tokens, valid = decoding.padded([prompt.tokens for prompt in prompts], length, on_the_left=not whole_rows)
        cache = decoding.empty_cache(self.model, len(prompts), capacity)
        for start in range(0, length, piece):
            here = slice(start, start + piece)
            logits, cache = decoding.prefill(self.model, self._variables, cache, tokens[:, here], valid[:, here], images)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
        return decoding.State(cache, logits, keys, jnp.int32(0), jnp.zeros(len(prompts), bool))

    def _length_over_context(self, needed: int) -> int | None:
        """Of rows that lie over `context`: whole chunks in each piece of its shards. None without it."""
        shards = 1 if self._mesh is None else self._mesh.shape["context"]
        unit = 2 * shards * (self.model.config.attention_chunk_size or decoding.bucket(1))  # 2: as zigzag needs
        return -(-needed // unit) * unit if shards > 1 else None

    def _images(self, prompts: list[Prompt]) -> np.ndarray | None:
        """The prompts' tiles as [B, I, h, w, 3], in slots of a number that is a power of two."""
        counts = [0 if prompt.tiles is None else len(prompt.tiles) for prompt in prompts]
        if not any(counts):
            return None
        size = self.model.config.vision.image_size
        images = np.zeros((len(prompts), decoding.bucket(max(counts), 1), size, size, 3), np.uint8)
        for row, prompt in zip(images, prompts, strict=True):
            if prompt.tiles is not None:
                row[: len(prompt.tiles)] = prompt.tiles
        return images


def load_generator(path: str, *, execution: ExecutionConfig | None = None) -> Generator:
    """The model of a checkpoint of any format (see open_checkpoint), with its words, on the default device.

    Without an `execution`, matmuls and parameters are bfloat16 on an accelerator and float32 on a CPU. Raises UserError for a
    checkpoint that cannot be read, or that comes without a tokenizer.
    """
    if execution is None:
        execution = ExecutionConfig(compute_dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    with open_checkpoint(path) as reader:
        processor = Processor.from_files(reader.beside, reader.config, str(path))
        params = load_params(reader, dtype=execution.compute_dtype, source=str(path))
    return Generator(Llama4(reader.config, execution), params, processor)


class _Row:
    """One text as it grows."""

    def __init__(self, processor: Processor, limits: Limits):
        self._processor = processor
        self._stop = limits.stop
        self._text = processor.stream()
        self._decoded = ""
        self._end: int | None = None  # of the text, once a stop string or stop token was found
        self.tokens: list[int] = []

    @property
    def done(self) -> bool:
        return self._end is not None

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            if self.done:
                return
            self.tokens.append(token)
            if token in self._processor.stop_ids:
                self._decoded += self._text.finish()
                self._look_for_stop(len(self._decoded))
                self._end = len(self._decoded) if self._end is None else self._end
                return
            new = self._text.push(token)
            self._decoded += new
            self._look_for_stop(len(new))

    def _look_for_stop(self, new: int) -> None:
        """Stop strings that end within the last `new` characters."""
        starts = [self._decoded.find(stop, max(0, len(self._decoded) - new - len(stop))) for stop in self._stop]
        if found := [start for start in starts if start >= 0]:
            self._end = min(found)

    def certain_text(self) -> str:
        """What no later token can take back: without a tail that may become a stop string."""
        if self.done:
            return self._decoded[: self._end]
        tails = (n for stop in self._stop for n in range(len(stop) - 1, 0, -1) if self._decoded.endswith(stop[:n]))
        return self._decoded[: len(self._decoded) - max(tails, default=0)]

    def completion(self) -> Completion:
        if not self.done:
            rest = self._text.finish()
            self._decoded += rest
            self._look_for_stop(len(rest))
        return Completion(self._decoded[: self._end], self.tokens, "stop" if self.done else "length")

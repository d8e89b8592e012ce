"""Weights from and to Hugging Face safetensors folders.

Reading needs the memory of the result and of one tensor beside it; writing, of one file. The layouts of the two sides are
related in one table, `_tensors`: linear layers are stored [out, in] there and [in, ..., out, ...] here, gate and up apart
there and stacked here, layers one by one there and stacked over the blocks of the scan here. Experts are stored
[E, in, out] on both sides, gate before up. Rotary pairs are interleaved on both sides, except in a plain Llama, whose query
and key rows are put in order on reading.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from llama4_jax.checkpoints.huggingface_config import config_from_hf, config_to_hf
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params
from llama4_jax.model.vision import VisionTower

MAX_SHARD_BYTES = 5 * 10**9  # a larger checkpoint is split, as transformers does
PROGRESS_BYTES = 2**30  # from here on a bar is shown

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # safetensors' names
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # computed, not learned; old files store it
_VISION = ("vision_model.", "multi_modal_projector.")
_WHOLE = slice(None)


# ------------------------------------------------------------------------------------------------------------------------
# The layouts


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of a checkpoint, and the part of a stacked parameter that it is.

    Attributes:
        name, shape: in the checkpoint.
        path: of the parameter.
        index: the tensor's part of the parameter.
        split: the shape with some axes split in two.
        order: the split axes in the parameter's order.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int | slice, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    def read_into(self, parameter: np.ndarray, stored: np.ndarray) -> None:
        part = parameter[self.index]
        part[...] = stored.reshape(self.split).transpose(self.order).reshape(part.shape)

    def stored_form(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of read_into."""
        split = tuple(self.split[axis] for axis in self.order)
        part = parameter[self.index].reshape(split).transpose(np.argsort(self.order))
        return np.ascontiguousarray(part.reshape(self.shape))


def _tensors(config: ModelConfig, plain_llama: bool = False) -> Iterator[_Tensor]:
    """Every tensor of a text model's checkpoint, in the order of the forward pass."""
    V, D = config.vocab_size, config.hidden_size
    yield _tensor("model.embed_tokens.weight", (V, D), ("embed", "embedding"), ())
    for layer, kind in enumerate(config.layer_kinds):
        block, j = divmod(layer, len(config.block_kinds))
        name, path = f"model.layers.{layer}.", ("layers", f"layer_{j}")
        yield _tensor(f"{name}input_layernorm.weight", (D,), (*path, "attention_norm", "scale"), (block,))
        yield from _attention(config, f"{name}self_attn.", (*path, "attention"), block, plain_llama)
        yield _tensor(f"{name}post_attention_layernorm.weight", (D,), (*path, "ffn_norm", "scale"), (block,))
        name, path = f"{name}{'mlp' if plain_llama else 'feed_forward'}.", (*path, "feed_forward")
        if kind.is_moe:
            yield from _moe(config, name, path, block)
        else:
            yield from _dense_ffn(name, path, block, D, config.dense_ffn_size)
    yield _tensor("model.norm.weight", (D,), ("final_norm", "scale"), ())
    if not config.tie_embeddings:
        yield _tensor("lm_head.weight", (V, D), ("lm_head", "kernel"), (), order=(1, 0))


def _tensor(name, shape, path, index, *, split=None, order=None) -> _Tensor:
    split = split or shape
    return _Tensor(name, shape, path, index, split, order or tuple(range(len(split))))


def _attention(config: ModelConfig, name: str, path: tuple[str, ...], block: int, half_split: bool) -> Iterator[_Tensor]:
    D, H = config.hidden_size, config.head_dim
    counts = {"query": config.num_heads, "key": config.num_kv_heads, "value": config.num_kv_heads}
    for which, heads in counts.items():
        split, order = (heads, H), (0, 1)
        if half_split and which != "value":  # row j of the first half and row j of the second are rotary pair j
            split, order = (heads, 2, H // 2), (0, 2, 1)
        here, there = (*path, which), f"{name}{which[0]}_proj."
        last = len(split)
        yield _tensor(f"{there}weight", (heads * H, D), (*here, "kernel"), (block,), split=(*split, D), order=(last, *order))
        if config.attention_bias:
            yield _tensor(f"{there}bias", (heads * H,), (*here, "bias"), (block,), split=split, order=order)
    N = config.num_heads
    here, there = (*path, "output"), f"{name}o_proj."
    yield _tensor(f"{there}weight", (D, N * H), (*here, "kernel"), (block,), split=(D, N, H), order=(1, 2, 0))
    if config.attention_bias:
        yield _tensor(f"{there}bias", (D,), (*here, "bias"), (block,))


def _dense_ffn(name: str, path: tuple[str, ...], block: int, D: int, F: int) -> Iterator[_Tensor]:
    for half, which in enumerate(("gate", "up")):
        yield _tensor(f"{name}{which}_proj.weight", (F, D), (*path, "gate_up", "kernel"), (block, _WHOLE, half), order=(1, 0))
    yield _tensor(f"{name}down_proj.weight", (D, F), (*path, "down", "kernel"), (block,), order=(1, 0))


def _moe(config: ModelConfig, name: str, path: tuple[str, ...], block: int) -> Iterator[_Tensor]:
    E, D, F = config.num_experts, config.hidden_size, config.expert_ffn_size
    gate_up, down = ((*path, "experts", which, "kernel") for which in ("gate_up", "down"))
    yield _tensor(f"{name}router.weight", (E, D), (*path, "router", "kernel"), (block,), order=(1, 0))
    yield _tensor(f"{name}experts.gate_up_proj", (E, D, 2 * F), gate_up, (block,), split=(E, D, 2, F))
    yield _tensor(f"{name}experts.down_proj", (E, F, D), down, (block,))
    if config.shared_expert:
        yield from _dense_ffn(f"{name}shared_expert.", (*path, "shared_expert"), block, D, F)


def _vision_tensors(vision: VisionConfig, text_size: int) -> Iterator[_Tensor]:
    """Every tensor of the vision tower, adapter and projector."""
    D, F, A, p, C = vision.hidden_size, vision.mlp_size, vision.adapter_size, vision.patch_size, vision.num_channels
    places = (vision.image_size // p) ** 2 + 1
    split, order = (D, C, p, p), (2, 3, 1, 0)  # a stored patch is channel, row, column
    yield _tensor(
        "vision_model.patch_embedding.linear.weight",
        (D, C * p * p),
        ("patch_embedding", "kernel"),
        (),
        split=split,
        order=order,
    )
    yield _tensor("vision_model.class_embedding", (D,), ("class_embedding",), ())
    yield _tensor("vision_model.positional_embedding_vlm", (places, D), ("position_embedding",), ())
    yield from _layer_norm("vision_model.layernorm_pre.", D, ("norm_pre",), ())
    for layer in range(vision.num_layers):
        name, path, index = f"vision_model.model.layers.{layer}.", ("layers",), (layer,)
        yield from _layer_norm(f"{name}input_layernorm.", D, (*path, "attention_norm"), index)
        for which in ("query", "key", "value"):
            heads = (vision.num_heads, D // vision.num_heads)
            there, here = f"{name}self_attn.{which[0]}_proj.", (*path, which)
            yield _tensor(f"{there}weight", (D, D), (*here, "kernel"), index, split=(*heads, D), order=(2, 0, 1))
            yield _tensor(f"{there}bias", (D,), (*here, "bias"), index, split=heads)
        there, here = f"{name}self_attn.o_proj.", (*path, "output")
        yield _tensor(f"{there}weight", (D, D), (*here, "kernel"), index, split=(D, *heads), order=(1, 2, 0))
        yield _tensor(f"{there}bias", (D,), (*here, "bias"), index)
        yield from _layer_norm(f"{name}post_attention_layernorm.", D, (*path, "mlp_norm"), index)
        for there, here, shape in (("fc1", "up", (F, D)), ("fc2", "down", (D, F))):
            yield _tensor(f"{name}mlp.{there}.weight", shape, (*path, here, "kernel"), index, order=(1, 0))
            yield _tensor(f"{name}mlp.{there}.bias", shape[:1], (*path, here, "bias"), index)
    yield from _layer_norm("vision_model.layernorm_post.", D, ("norm_post",), ())
    yield _tensor("vision_model.vision_adapter.mlp.fc1.weight", (A, F), ("adapter_in", "kernel"), (), order=(1, 0))
    yield _tensor("vision_model.vision_adapter.mlp.fc2.weight", (A, A), ("adapter_out", "kernel"), (), order=(1, 0))
    yield _tensor("multi_modal_projector.linear_1.weight", (text_size, A), ("projector", "kernel"), (), order=(1, 0))


def _layer_norm(name: str, D: int, path: tuple[str, ...], index: tuple[int, ...]) -> Iterator[_Tensor]:
    for there, here in (("weight", "scale"), ("bias", "bias")):
        yield _tensor(f"{name}{there}", (D,), (*path, here), index)


# ------------------------------------------------------------------------------------------------------------------------
# Reading


def load_config(folder: str | os.PathLike) -> ModelConfig:
    """The architecture of a checkpoint folder or hub id, vision tower included. Raises UserError."""
    path = _local_folder(folder, [_CONFIG]) / _CONFIG
    return config_from_hf(_read_json(path), source=str(path))


def load_pretrained(folder: str | os.PathLike, *, dtype: Any = None) -> tuple[Llama4, dict]:
    """The model of a safetensors folder and its parameters, on the default device.

    Reads Llama 4 checkpoints (text or multimodal, of which the text part is loaded and the rest named in a warning) and
    plain dense Llamas. The model's config has no vision tower.

    Args:
        folder: holds config.json and model.safetensors, or the files that model.safetensors.index.json names. A name like
            `organisation/model` that is no folder is fetched from Hugging Face's hub.
        dtype: of the parameters; None keeps the stored one.

    Raises:
        UserError: a file is missing or corrupt, the configuration cannot be read, or a tensor is missing, left over or of
            another shape than the configuration gives it. One line names the file and the tensor.
    """
    folder = _local_folder(folder, ["*.json", "*.safetensors"])
    raw = _read_json(folder / _CONFIG)
    config = dataclasses.replace(config_from_hf(raw, source=str(folder / _CONFIG)), vision=None)
    model = Llama4(config)
    with contextlib.ExitStack() as open_files:
        stored = _open_checkpoint(folder, open_files)
        tensors = list(_tensors(config, plain_llama=raw["model_type"] == "llama"))
        _check_text(folder, stored, tensors, config)
        return model, _read_params(stored, tensors, abstract_params(model), dtype)


def load_vision_tower(folder: str | os.PathLike, *, dtype: Any = None) -> tuple[VisionTower, dict]:
    """The vision tower of a multimodal checkpoint, adapter and projector included, and its parameters.

    Takes and raises what load_pretrained does, and a UserError for a checkpoint without a vision tower.
    """
    folder = _local_folder(folder, ["*.json", "*.safetensors"])
    config = config_from_hf(_read_json(folder / _CONFIG), source=str(folder / _CONFIG))
    if config.vision is None:
        raise UserError(f"{folder / _CONFIG}: describes a text model, without a vision tower")
    tower = VisionTower(config.vision, config.hidden_size)
    with contextlib.ExitStack() as open_files:
        stored = {name: it for name, it in _open_checkpoint(folder, open_files).items() if name.startswith(_VISION)}
        tensors = list(_vision_tensors(config.vision, config.hidden_size))
        _check_tensors(folder, stored, tensors)
        _refuse_extra(stored, [name for name in stored if name not in {tensor.name for tensor in tensors}])
        return tower, _read_params(stored, tensors, abstract_params(Llama4(config))["vision"], dtype)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in an open file."""

    path: Path
    file: Any  # of safetensors
    name: str

    def __post_init__(self):
        if self._header.get_dtype() not in _DTYPES:
            raise UserError(
                f"{self.path}: tensor {self.name} is {self._header.get_dtype()}; only {', '.join(_DTYPES)} can be read"
            )

    @property
    def _header(self):
        return self.file.get_slice(self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._header.get_shape())

    @property
    def dtype(self):
        return _DTYPES[self._header.get_dtype()]

    def read(self) -> np.ndarray:
        try:
            return self.file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: tensor {self.name} cannot be read: {_one_line(error)}") from None


def _open_checkpoint(folder: Path, open_files: contextlib.ExitStack) -> dict[str, _Stored]:
    """Every tensor of a folder by its name in a text model."""
    if (folder / _SINGLE).is_file():
        names_by_file = {_SINGLE: None}
    elif (folder / _INDEX).is_file():
        names_by_file = _read_index(folder / _INDEX)
    else:
        raise UserError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}")
    stored = {}
    for filename, names in names_by_file.items():
        path = folder / filename
        try:
            file = open_files.enter_context(safe_open(path, framework="numpy"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, but {_INDEX} names it") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or not a safetensors file: {_one_line(error)}") from None
        found = set(file.keys())
        for name in sorted(found if names is None else names):
            if name not in found:
                raise UserError(f"{path}: tensor {name} is missing, but {_INDEX} places it there")
            stored[name.removeprefix("language_model.")] = _Stored(path, file, name)
    return stored


def _read_index(path: Path) -> dict[str, list[str]]:
    """The tensors that each file is said to hold."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path}: weight_map must map each tensor to its file")
    names_by_file = {}
    for name, filename in weight_map.items():
        if Path(filename).name != filename:
            raise UserError(f"{path}: weight_map places {name} in {filename!r}, which is no file of this folder")
        names_by_file.setdefault(filename, []).append(name)
    return names_by_file


def _check_tensors(folder: Path, stored: dict[str, _Stored], tensors: list[_Tensor]) -> None:
    """Refuses a checkpoint in which a tensor is missing or has another shape."""
    missing = [tensor.name for tensor in tensors if tensor.name not in stored]
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} is missing{_and_more(missing)}; {_CONFIG} asks for it")
    for tensor in tensors:
        found = stored[tensor.name]
        if found.shape != tensor.shape:
            raise UserError(f"{found.path}: tensor {found.name} has shape {found.shape}, but {_CONFIG} makes it {tensor.shape}")


def _refuse_extra(stored: dict[str, _Stored], extra: list[str]) -> None:
    if extra:
        first = stored[extra[0]]
        raise UserError(f"{first.path}: tensor {first.name}{_and_more(extra)} has no place in this model")


def _check_text(folder: Path, stored: dict[str, _Stored], tensors: list[_Tensor], config: ModelConfig) -> None:
    """Refuses a checkpoint that is not exactly the model, before any tensor is read; names what else it holds."""
    _check_tensors(folder, stored, tensors)
    wanted = {tensor.name for tensor in tensors}
    extra = [name for name in stored if name not in wanted and not _IGNORED.search(name)]
    if config.tie_embeddings and "lm_head.weight" in extra:
        head, embedding = (stored[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
            raise UserError(f"{head.path}: lm_head.weight differs from the embedding, but {_CONFIG} ties them")
        extra.remove("lm_head.weight")
    vision = [name for name in extra if name.startswith(_VISION)]
    _refuse_extra(stored, [name for name in extra if name not in vision])
    if vision:
        parts = ", ".join(f"{prefix}* ({n})" for prefix in _VISION if (n := sum(name.startswith(prefix) for name in vision)))
        warnings.warn(f"{folder}: the text model was loaded; {len(vision)} vision tensors were not: {parts}", stacklevel=3)


def _read_params(stored: dict[str, _Stored], tensors: list[_Tensor], abstract: dict, dtype: Any) -> dict:
    parts = {}
    for tensor in tensors:
        parts.setdefault(tensor.path, []).append(tensor)
    total = sum(int(np.prod(tensor.shape)) * stored[tensor.name].dtype.dtype.itemsize for tensor in tensors)
    params = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=total < PROGRESS_BYTES) as bar:
        for path, tensors_of_leaf in parts.items():
            leaf_dtype = functools.reduce(jnp.promote_types, (stored[t.name].dtype for t in tensors_of_leaf))
            leaf = _aligned_empty(functools.reduce(dict.__getitem__, path, abstract).shape, dtype or leaf_dtype)
            for tensor in tensors_of_leaf:
                array = stored[tensor.name].read()
                tensor.read_into(leaf, array)
                bar.update(array.nbytes)
                del array  # before the next one is read
            *folders, name = path
            functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, params)[name] = jax.device_put(leaf)
    return params


def _aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array at an address that lets device_put on CPU take it over without a copy."""
    dtype, alignment = jnp.dtype(dtype), 64
    nbytes = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + nbytes].view(dtype).reshape(shape)


def _local_folder(folder: str | os.PathLike, patterns: list[str]) -> Path:
    """The folder itself, or where its files from the hub are kept."""
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; give the folder that holds {_CONFIG}")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise UserError(f"{path}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{folder}: no such folder; to fetch it from the hub, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(str(folder), allow_patterns=patterns))
    except Exception as error:  # the hub's, its HTTP client's and the network's errors have no common class
        raise UserError(f"{folder}: no such folder, and the hub does not give it: {_one_line(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint folder needs it") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise UserError(f"{path}: cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# ------------------------------------------------------------------------------------------------------------------------
# Writing


def save_pretrained(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    model_state: dict | None = None,
    *,
    drop_router_bias: bool = False,
) -> None:
    """Writes config.json, generation_config.json and the weights, as transformers' Llama4ForCausalLM loads them.

    The folder appears whole or not at all: everything is written beside it and renamed. Only the text model is written.
    Published Llama 4 has no place for a router's bias: a model with one is written if the bias is zero, as after training
    with ObjectiveConfig.bias_anneal_fraction, and otherwise refused.

    Args:
        folder: must not exist, or be empty.
        config: of the model.
        params: its parameters, in their own dtype.
        model_state: of TrainState; a model with a router bias needs it.
        drop_router_bias: write the model without its bias, whatever that is: it will choose other experts.

    Raises:
        UserError: transformers' Llama 4 cannot hold this model, the parameters are not the configuration's, the folder is
            in use, or the disk refuses. One line names the reason.
    """
    folder = Path(folder).expanduser()
    if config.router_bias:
        if not drop_router_bias:
            _require_zero_bias(model_state)
        config = dataclasses.replace(config, router_bias=False)
    if config.vision is not None:
        warnings.warn(f"{folder}: only the text model is written; the vision tower of the configuration is not", stacklevel=2)
        config = dataclasses.replace(config, vision=None)
    leaves = _check_params(config, params)
    dtype = jnp.dtype(leaves["embed", "embedding"].dtype).name
    files = {
        _CONFIG: {**config_to_hf(config), "dtype": dtype},
        "generation_config.json": {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(config.eos_token_ids) or None,
            "pad_token_id": config.pad_token_id,
        },
    }
    partial = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex[:8]}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: already holds files; choose another folder or remove them")
        partial.mkdir(parents=True)
        _write_weights(partial, list(_tensors(config)), leaves)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written: {_one_line(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_zero_bias(model_state: dict | None) -> None:
    if not model_state or "router_bias" not in model_state:
        raise UserError("ModelConfig.router_bias is true: give model_state, of TrainState, to show that the bias is zero")
    for path, bias in jax.tree_util.tree_leaves_with_path(model_state["router_bias"]):
        if (largest := float(jnp.max(jnp.abs(bias)))) != 0:
            raise UserError(
                f"router_bias/{jax.tree_util.keystr(path, simple=True, separator='/')} reaches {largest:.3g}, and published "
                f"Llama 4 has no router bias: train with objective.bias_anneal_fraction, or pass drop_router_bias=True"
            )


def _check_params(config: ModelConfig, params: dict) -> dict[tuple[str, ...], Any]:
    """The parameters by path, if they are those of the configuration."""

    def by_path(tree):
        return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    wanted, found = by_path(abstract_params(Llama4(config))), by_path(params)
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
        if jnp.dtype(found[path].dtype) not in [jnp.dtype(dtype) for dtype in _DTYPES.values()]:
            raise UserError(f"parameter {name} is {found[path].dtype}; only float32, float16 and bfloat16 can be written")
    return found


def _write_weights(folder: Path, tensors: list[_Tensor], leaves: dict[tuple[str, ...], Any]) -> None:
    sizes = {t.name: int(np.prod(t.shape)) * leaves[t.path].dtype.itemsize for t in tensors}
    shards = _shards(tensors, sizes)
    total = sum(sizes.values())
    weight_map = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=total < PROGRESS_BYTES) as bar:
        for number, shard in enumerate(shards, start=1):
            filename = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {tensor.name: tensor.stored_form(np.asarray(leaves[tensor.path])) for tensor in shard}
            save_file(arrays, folder / filename, metadata={"format": "pt"})  # transformers refuses a file without it
            weight_map |= dict.fromkeys(arrays, filename)
            bar.update(sum(sizes[name] for name in arrays))
            del arrays  # before the next file's are made
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: list[_Tensor], sizes: dict[str, int]) -> list[list[_Tensor]]:
    """Files of at most MAX_SHARD_BYTES, a larger tensor in one of its own."""
    shards, room = [], 0
    for tensor in tensors:
        if sizes[tensor.name] > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(tensor)
        room -= sizes[tensor.name]
    return shards

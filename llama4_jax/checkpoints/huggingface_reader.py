"""Hugging Face's folders of safetensors, in the common form."""

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from llama4_jax.checkpoints.file_tensor import FileTensor, InterleavedRows, Source, shown
from llama4_jax.checkpoints.files import FilesBeside, read_json
from llama4_jax.checkpoints.huggingface_config import config_from_hf
from llama4_jax.checkpoints.readers import SourceReader
from llama4_jax.checkpoints.safetensors_file import open_safetensors
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # computed, not learned; old files store it


class HuggingFaceReader(SourceReader):
    """A CheckpointReader of Llama 4 (text or multimodal) and of plain dense Llamas."""

    def __init__(self, folder: Path):
        """Raises UserError as CheckpointReader says.

        Args:
            folder: holds config.json and model.safetensors, or the files that model.safetensors.index.json names.
        """
        raw = read_json(folder / CONFIG)
        config = config_from_hf(raw, source=str(folder / CONFIG))
        with contextlib.ExitStack() as stack:
            sources: dict[str, Source] = _open_folder(folder, stack)
            if raw["model_type"] == "llama":
                sources = _common_form(sources, config)
            if config.tie_embeddings and "lm_head.weight" in sources:
                _require_same_head(sources, f"{folder / CONFIG}")
                del sources["lm_head.weight"]
            super().__init__(config, sources, FilesBeside(folder), stack.pop_all())


def _open_folder(folder: Path, stack: contextlib.ExitStack) -> dict[str, FileTensor]:
    """Every tensor by its name in a text model."""
    if (folder / SINGLE).is_file():
        names_by_file: dict[str, list[str] | None] = {SINGLE: None}
    elif (folder / INDEX).is_file():
        names_by_file = _read_index(folder / INDEX)
    else:
        raise UserError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    found = {}
    for filename, names in names_by_file.items():
        path = folder / filename
        try:
            file = stack.enter_context(path.open("rb"))
        except FileNotFoundError:
            raise UserError(f"{folder / shown(filename)}: no such file, but {INDEX} names it") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        tensors = open_safetensors(file, path)
        for name in tensors if names is None else names:
            if name not in tensors:
                raise UserError(f"{path}: tensor {shown(name)} is missing, but {INDEX} places it there")
            common = name.removeprefix("language_model.")
            if common in found:
                raise UserError(f"{path}: tensor {shown(name)} is also {found[common].place}")
            if not _IGNORED.search(name):
                found[common] = tensors[name]
    return found


def _read_index(path: Path) -> dict[str, list[str]]:
    """The tensors that each file is said to hold."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path}: weight_map must map each tensor to its file")
    names_by_file: dict[str, list[str]] = {}
    for name, filename in weight_map.items():
        if Path(filename).name != filename or not filename.isprintable():
            raise UserError(f"{path}: weight_map places {shown(name)} in {filename!r}, which is no file of this folder")
        names_by_file.setdefault(filename, []).append(name)
    return names_by_file


def _common_form(sources: dict[str, Any], config: ModelConfig) -> dict[str, Source]:
    """A plain Llama's tensors under Llama 4's names, its rotary rows interleaved."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}

    def common(name: str, source: Source) -> Source:
        which = name.split(".")[-2] if ".self_attn." in name else None
        count = heads.get(which)
        if count is None or source.shape[0] != count * config.head_dim:  # a wrong shape is refused where all shapes are
            return source
        return InterleavedRows(source, count)

    return {name.replace(".mlp.", ".feed_forward."): common(name, source) for name, source in sources.items()}


def _require_same_head(sources: dict[str, Source], config: str) -> None:
    """Some files repeat a tied head; one that differs would be lost."""
    head, embedding = sources["lm_head.weight"], sources.get("model.embed_tokens.weight")
    if embedding is None:
        return  # refused where all names are
    blocks = range(0, head.shape[0], 4096)
    same = head.shape == embedding.shape and all(
        np.array_equal(head.read((slice(i, i + 4096),)), embedding.read((slice(i, i + 4096),)), equal_nan=True) for i in blocks
    )
    if not same:
        raise UserError(f"{head.place} differs from the embedding, but {config} ties them")

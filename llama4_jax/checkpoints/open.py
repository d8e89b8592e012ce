"""Checkpoints of any format, recognised by what they hold."""

import os
from pathlib import Path

from llama4_jax.checkpoints import meta_reader, orbax_reader
from llama4_jax.checkpoints.gguf import GgufReader, model_file
from llama4_jax.checkpoints.hub import local_path
from llama4_jax.checkpoints.huggingface_reader import HuggingFaceReader
from llama4_jax.checkpoints.tensors import CheckpointReader
from llama4_jax.errors import UserError

HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt", "LICENSE*", "USE_POLICY.md"]


def open_checkpoint(path: str | os.PathLike, *, config_name: str | None = None) -> CheckpointReader:
    """A reader of a checkpoint, to be used in a `with`.

    Args:
        path: a Hugging Face folder or hub name, a folder of Meta's consolidated files, a GGUF file or the folder of one, a
            training run or one of its steps, an Orbax folder of weights, or `smollm2` (see gguf.smollm2_file).
        config_name: the named configuration of consolidated files without params.json.

    Raises:
        UserError: there is none, or it is of no known format, or damaged.
    """
    path = local_path(model_file(path), HUB_PATTERNS)
    if config_name is not None and not meta_reader.is_consolidated(path):
        raise UserError(f"{path}: its own files say what it is; only consolidated files are given a configuration by name")
    if (gguf := _gguf_file(path)) is not None:
        return GgufReader(gguf)
    if path.is_file():
        raise UserError(f"{path} is a file, and no GGUF; give the folder that holds the checkpoint")
    if meta_reader.is_consolidated(path):
        return meta_reader.MetaReader(path, config_name)
    if orbax_reader.is_weights(path) or orbax_reader.is_run(path):
        return orbax_reader.OrbaxReader(path)
    return HuggingFaceReader(path)


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that is meant, if one is; any part of a model in several parts stands for all."""
    if path.is_file():
        try:
            with open(path, "rb") as file:
                return path if file.read(4) == b"GGUF" else None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    found = sorted(path.glob("*.gguf"))
    if not found or (path / "config.json").exists():
        return None
    parts = [file for file in found if "-00001-of-" in file.name]
    if len(found) > 1 and len(parts) != 1:
        raise UserError(f"{path}: holds several GGUF files ({', '.join(file.name for file in found[:4])}); name the one")
    return parts[0] if parts else found[0]

"""Checkpoints of any format, recognised by what they hold."""

import os

from llama4_jax.checkpoints.hub import local_path
from llama4_jax.checkpoints.tensors import CheckpointReader
from llama4_jax.errors import UserError

HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "merges.txt", "LICENSE*", "USE_POLICY.md"]


def open_checkpoint(path: str | os.PathLike) -> CheckpointReader:
    """A reader of a checkpoint, to be used in a `with`.

    Raises:
        UserError: there is none, or it is of no known format, or damaged.
    """
    from llama4_jax.checkpoints.huggingface_reader import HuggingFaceReader
    from llama4_jax.checkpoints.meta_reader import MetaReader, is_consolidated

    path = local_path(path, HUB_PATTERNS)
    if path.is_file():
        raise UserError(f"{path} is a file; give the folder that holds it")
    if is_consolidated(path):
        return MetaReader(path)
    return HuggingFaceReader(path)

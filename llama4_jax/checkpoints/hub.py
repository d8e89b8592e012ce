"""Names of Hugging Face's hub, fetched on first use."""

import os
import re
from pathlib import Path

from llama4_jax.errors import UserError


def local_path(path: str | os.PathLike, patterns: list[str]) -> Path:
    """The path itself, or where the files of `organisation/model` that match the patterns are kept.

    Raises:
        UserError: there is no such path, and the hub does not give it.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise UserError(f"{local}: no such file or folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{path}: no such folder; to fetch it from the hub, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # the hub's, its HTTP client's and the network's errors have no common class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: no such folder, and the hub does not give it: {lines[0]}") from None

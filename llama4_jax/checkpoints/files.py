"""Small files of a checkpoint's folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama4_jax.errors import UserError

# What goes along with weights from one format to another: words and terms, never code.
BESIDE = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.md",
    "LICENSE.txt", "merges.txt", "preprocessor_config.json", "processor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "USE_POLICY.md", "video_preprocessor_config.json",
    "vocab.json",
)  # fmt: skip
MAX_BYTES = 2**28


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises UserError."""
    text = read_bytes(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise UserError(f"{path}: cannot be read as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def read_bytes(path: Path) -> bytes:
    """All of a file of moderate size. Raises UserError."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a checkpoint folder needs it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes")
    return content


class FilesBeside(Mapping[str, bytes]):
    """The files of BESIDE that a folder has, read when asked for."""

    def __init__(self, folder: Path):
        self._paths = {name: folder / name for name in BESIDE if (folder / name).is_file()}

    def __getitem__(self, name: str) -> bytes:
        return read_bytes(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

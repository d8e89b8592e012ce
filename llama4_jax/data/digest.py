"""What identifies data: hashes of files and of documents, names and texts alike."""

import hashlib
import json
from pathlib import Path
from typing import Any

from llama4_jax.data.sources import Document
from llama4_jax.errors import UserError


class ContentDigest:
    """Sums documents up: any change of a name, a text or their order changes it."""

    def __init__(self):
        self._digest = hashlib.blake2b(digest_size=16)
        self._documents = self._bytes = 0

    def add(self, document: Document) -> None:
        name, text = document.name.encode("utf-8", "surrogateescape"), document.text.encode()
        for part in (name, text):
            self._digest.update(len(part).to_bytes(8, "little") + part)
        self._documents += 1
        self._bytes += len(text)

    def summary(self) -> dict:
        """`documents`, their `bytes` of UTF-8, and the hash of their `content`, as JSON."""
        return {"documents": self._documents, "bytes": self._bytes, "content": self._digest.hexdigest()}


def hash_file(path: Path) -> str:
    """Raises UserError when the file cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def hash_json(content: Any) -> str:
    """Of anything that JSON can hold; the order of a dictionary's keys does not matter."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def sealed_json(content: dict[str, Any]) -> str:
    """A manifest as text, with its own hash in it."""
    return json.dumps(content | {"seal": hash_json(content)}, indent=1) + "\n"


def unsealed_json(text: str) -> dict[str, Any]:
    """What `sealed_json` made the text of. Raises ValueError when it is not what was written."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.pop("seal", None) != hash_json(content):
        raise ValueError("it is not what was written")
    return content

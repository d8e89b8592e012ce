"""The real text that every Python carries: its help topics and the source of its standard library, 9 to 12 MB."""

import importlib
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# Tests repeat one another and hold deliberately broken text. The charmaps of `encodings` are one template filled in a
# hundred times and `pydoc_data` is one long literal: both would flatter any compressor. The rest is not the library's.
_SKIPPED_FOLDERS = {
    "__phello__", "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages",
    "test", "tests",
}  # fmt: skip
_GENERATED_FILES = ("_sysconfigdata", "stringprep.py")  # build settings of this very machine; Unicode tables


def help_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of each topic that `help()` knows; none where the Python was packaged without them."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def standard_library(root: Path) -> Iterator[tuple[str, str]]:
    """(name relative to `root`, text) of each module under `root`, sorted by name within each folder."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        for file in sorted(files):
            if not file.endswith(".py") or file.startswith(_GENERATED_FILES):
                continue
            path = Path(folder, file)
            try:
                with tokenize.open(path) as module:  # in the encoding that the file declares (PEP 263)
                    text = module.read()
            except (SyntaxError, UnicodeDecodeError, OSError):
                continue  # not Python source by its own declaration, or a link that distributions leave dangling
            yield path.relative_to(root).as_posix(), text


def python_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of each document of the source `python:stdlib`, in an order that depends on nothing but the Python."""
    yield from help_topics()
    yield from standard_library(Path(sysconfig.get_paths()["stdlib"]))

"""The safetensors format: a length, a JSON header of names, dtypes, shapes and offsets, then the numbers.

The header is input from strangers, so every claim in it is checked against the file before anything is allocated for it.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama4_jax.checkpoints.file_tensor import FileTensor, shown
from llama4_jax.errors import UserError

MAX_HEADER_BYTES = 2**25  # a published shard's is below 2**20

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OTHERS = ["BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "U16", "I16", "U32", "I32", "U64", "I64", "F64", "C64"]


def open_safetensors(file: BinaryIO, path: str | os.PathLike) -> dict[str, FileTensor]:
    """The tensors of an open file, by name. Raises UserError for a header that does not describe this file."""

    def damaged(problem: str) -> UserError:
        return UserError(f"{path}: truncated or not a safetensors file: {problem}")

    total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if total < 8:
        raise damaged(f"it has {total} bytes")
    if length > min(MAX_HEADER_BYTES, total - 8):
        raise damaged(f"its header of {length:,} bytes exceeds {min(MAX_HEADER_BYTES, total - 8):,}")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise damaged(f"its header cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, ends = {}, {}
    for name, entry in header.items():
        place = f"{path}: tensor {shown(name)}"
        dtype, shape, (start, stop) = _checked_entry(entry, total - 8 - length, place)
        tensors[name] = FileTensor.contiguous(file, place, 8 + length + start, shape, dtype)
        ends[name] = start, stop
    end = 0
    for name, (start, stop) in sorted(ends.items(), key=lambda item: item[1]):
        if start != end:
            raise UserError(
                f"{path}: tensor {shown(name)} begins at byte {start:,} of the data, but the one before ends at {end:,}"
            )
        end = stop
    if end != total - 8 - length:
        raise damaged(f"its tensors end at byte {end:,} of {total - 8 - length:,}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _checked_entry(entry: Any, size: int, place: str) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and offsets in a data section of `size` bytes."""

    def are_counts(values, length=None):
        return (
            isinstance(values, list)
            and all(type(value) is int and 0 <= value < 2**63 for value in values)
            and (length is None or len(values) == length)
        )

    if not isinstance(entry, dict) or not are_counts(entry.get("shape")) or not are_counts(entry.get("data_offsets"), 2):
        raise UserError(f"{place} is not described by dtype, shape and data_offsets")
    name, shape, (start, stop) = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        known = name if name in _OTHERS else "of an unknown dtype"
        raise UserError(f"{place} is {known}; only {', '.join(_DTYPES)} can be read")
    needed = math.prod(shape) * _DTYPES[name].itemsize
    if len(shape) > 8 or not start <= stop <= size or stop - start != needed:
        raise UserError(
            f"{place} of shape {shape} needs {needed:,} bytes, but is said to lie at {start:,} to {stop:,} of {size:,}: "
            "the file is truncated or not a safetensors file"
        )
    return _DTYPES[name], shape, (start, stop)


def safetensors_header(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> tuple[bytes, dict[str, int], int]:
    """The head of a file with tensors of these shapes and dtypes, each one's place in the file, and the file's size."""
    entries, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0  # transformers refuses a file without the format
    for name in sorted(tensors, key=lambda name: -tensors[name][1].itemsize):  # so that every number is aligned
        shape, dtype = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        offsets[name] = start
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}, len(head) + end

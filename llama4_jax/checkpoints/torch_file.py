"""Files of torch.save: a zip archive, uncompressed, of a pickle and one entry of numbers for each storage."""

import math
import os
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama4_jax.checkpoints.file_tensor import FileTensor, shown
from llama4_jax.checkpoints.torch_pickle import TorchTensor, read_pickle
from llama4_jax.errors import UserError

MAX_DIRECTORY_BYTES = MAX_PICKLE_BYTES = 2**24  # a published shard's are below a megabyte

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}


def open_torch(file: BinaryIO, path: str | os.PathLike) -> dict[str, FileTensor]:
    """The tensors of a saved dictionary, by name; its other values are left out.

    Raises:
        UserError: the file is damaged or hostile, or holds another dtype than float32, float16 and bfloat16.
    """
    entries = _entries(file, path)
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(f"{path}: is an archive without the one data.pkl that torch.save writes")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in entries and _read(file, entries[f"{prefix}byteorder"]) != b"little":
        raise UserError(f"{path}: holds big-endian numbers, which cannot be read")
    saved = read_pickle(_read(file, entries[pickles[0]]), f"{path}: data.pkl")
    if not isinstance(saved, dict):
        raise UserError(f"{path}: holds no dictionary of tensors")
    tensors = {name: value for name, value in saved.items() if isinstance(name, str) and isinstance(value, TorchTensor)}
    return {name: _locate(tensor, entries, prefix, file, f"{path}: tensor {shown(name)}") for name, tensor in tensors.items()}


class _BoundedReads:
    """A file of which nothing large is read at once: what zipfile takes from an archive's own word stays small."""

    def __init__(self, file: BinaryIO, total: int):
        self.seek, self.tell, self._file, self._total = file.seek, file.tell, file, total

    def read(self, size: int = -1) -> bytes:
        left = max(self._total - self.tell(), 0)
        size = left if size < 0 else min(size, left)
        if size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"its directory of {size:,} bytes exceeds {MAX_DIRECTORY_BYTES:,}")
        return self._file.read(size)


def _entries(file: BinaryIO, path: str | os.PathLike) -> dict[str, tuple[int, int]]:
    """Offset and size of each entry's bytes."""
    total = os.fstat(file.fileno()).st_size
    try:
        infos = zipfile.ZipFile(_BoundedReads(file, total)).infolist()
    except Exception as error:  # zipfile's errors on damaged archives are of many kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: truncated or not a file of torch.save: {shown(lines[0])}") from None
    entries = {}
    for info in infos:
        place = f"{path}: entry {shown(info.filename)}"
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise UserError(f"{place} is compressed or encrypted, which torch.save never does")
        if info.filename in entries:
            raise UserError(f"{place} occurs twice")
        head = os.pread(file.fileno(), 30, info.header_offset) if 0 <= info.header_offset < total else b""
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise UserError(f"{place} does not lie where the archive's directory says")
        name_length, extra_length = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
        start = info.header_offset + 30 + name_length + extra_length
        if start + info.file_size > total:
            raise UserError(f"{place} of {info.file_size:,} bytes reaches beyond the file's {total:,}: it is truncated")
        entries[info.filename] = start, info.file_size
    return entries


def _read(file: BinaryIO, entry: tuple[int, int]) -> bytes:
    offset, size = entry
    if size > MAX_PICKLE_BYTES:
        raise UserError(f"{file.name}: an entry of {size:,} bytes beside the tensors exceeds {MAX_PICKLE_BYTES:,}")
    return os.pread(file.fileno(), size, offset)


def _locate(tensor: TorchTensor, entries: dict[str, tuple[int, int]], prefix: str, file: BinaryIO, place: str) -> FileTensor:
    """The tensor in its file, if its storage holds it."""
    if tensor.storage_type not in _DTYPES:
        raise UserError(f"{place} has a {shown(tensor.storage_type)}; only {', '.join(_DTYPES)} can be read")
    dtype = _DTYPES[tensor.storage_type]
    if f"{prefix}data/{tensor.storage}" not in entries:
        raise UserError(f"{place}: its numbers, entry data/{shown(tensor.storage)}, are missing")
    start, size = entries[f"{prefix}data/{tensor.storage}"]
    if tensor.numel * dtype.itemsize != size:
        raise UserError(f"{place}: its storage of {tensor.numel:,} numbers does not match its {size:,} bytes")
    shape, strides = tensor.shape, tensor.strides
    if not _are_counts(shape) or not _are_counts(strides) or len(shape) != len(strides) or not _are_counts((tensor.offset,)):
        raise UserError(f"{place}: shape, strides and offset are not what torch.save writes")
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= tensor.numel or math.prod(shape) > tensor.numel):
        raise UserError(f"{place} of shape {shape} reaches beyond its storage of {tensor.numel:,} numbers")
    offset = start + tensor.offset * dtype.itemsize
    return FileTensor(file, place, offset, shape, tuple(stride * dtype.itemsize for stride in strides), dtype)


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) <= 8 and all(type(value) is int and 0 <= value < 2**63 for value in values)

"""Any checkpoint to any format, tensor by tensor: what is held at one time is one tensor."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from tqdm import tqdm

from llama4_jax.checkpoints.finite import require_finite
from llama4_jax.checkpoints.huggingface_writer import HuggingFaceWriter, nbytes
from llama4_jax.checkpoints.layout import require_same_tensors
from llama4_jax.checkpoints.load import PROGRESS_BYTES
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.checkpoints.partial_folder import hash_file, write_durably
from llama4_jax.checkpoints.readers import TextReader
from llama4_jax.checkpoints.tensors import CheckpointReader, CheckpointWriter, TensorInfo
from llama4_jax.checkpoints.upcycle import UpcycledReader, parse_upcycle
from llama4_jax.errors import UserError

Format = Literal["hf", "orbax", "gguf"]
_DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_GGUF_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_GGUF_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5}
_RESERVE = 2**24  # bytes of small files


@dataclasses.dataclass(frozen=True)
class Converted:
    """Attributes:
    path: of the new checkpoint.
    tensors, nbytes: of the weights in it.
    kept: tensors among them that an earlier, interrupted attempt had written.
    """

    path: Path
    tensors: int
    nbytes: int
    kept: int


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    format: Format | None = None,
    dtype: str | None = None,
    text_only: bool = False,
    upcycle: str | None = None,
    config_name: str | None = None,
    allow_nonfinite: bool = False,
) -> Converted:
    """Writes a checkpoint in another format or dtype.

    The result appears whole or not at all. Interrupted, even by the machine, and called again with the same arguments, it goes
    on after the last whole file; the result is the same byte for byte. (A GGUF begins anew.) Folders have the SHA-256 of every
    file in SHA256SUMS, a GGUF in a file beside it; `sha256sum --check` reads both.

    Args:
        source: whatever open_checkpoint opens.
        target: a new folder, or a new file for a GGUF.
        format: hf (for transformers), orbax (params/ for this project) or gguf (for llama.cpp); None: gguf if `target` ends so,
            otherwise hf.
        dtype: float32, float16 or bfloat16; for a GGUF also one of its quantised types, such as q8_0; None: as it is.
        text_only: leave the vision tower out.
        upcycle: make a mixture of experts of a dense model, such as `experts:8`; see parse_upcycle.
        config_name: see open_checkpoint.
        allow_nonfinite: take tensors with NaN or infinity as they are.

    Raises:
        UserError: the source is damaged or not the model that it describes, the target's format cannot hold it, something is
            there already, or the disk has no room or fails. One line names the file and the tensor.
    """
    target = Path(target).expanduser()
    format = format or ("gguf" if target.suffix == ".gguf" else "hf")
    if format not in _WRITERS:
        raise UserError(f"format {format!r} must be one of {', '.join(_WRITERS)}")
    if format != "gguf" and dtype is not None and dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} of {format} must be one of {', '.join(_DTYPES)}")
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(open_checkpoint(source, config_name=config_name))
        require_same_tensors(reader.tensors, reader.config, str(source))
        if text_only:
            reader = TextReader(reader)
        if upcycle is not None:
            reader = UpcycledReader(reader, parse_upcycle(upcycle))
        stored = {name: _announced(info, None if format == "gguf" else dtype) for name, info in reader.tensors.items()}
        options = {"format": format, "dtype": dtype, "text_only": text_only, "upcycle": upcycle}
        writer = stack.enter_context(_WRITERS[format](target, reader, stored, dtype, _task(source, options)))
        done = getattr(writer, "done", frozenset())  # of formats that can be gone on with
        _require_room(target, _size([info for name, info in stored.items() if name not in done], format, dtype))
        _copy(reader, writer, stored, done, allow_nonfinite)
        writer.finish(reader.beside)
    if format == "gguf":
        write_durably(target.with_name(f"{target.name}.sha256"), f"{hash_file(target)}  {target.name}\n".encode())
    with open_checkpoint(target) as written:
        require_same_tensors(written.tensors, written.config, str(target))
    return Converted(target, len(stored), sum(map(nbytes, stored.values())), len(done))


def _announced(info: TensorInfo, dtype: str | None) -> TensorInfo:
    return TensorInfo(tuple(info.shape), info.dtype if dtype is None else _DTYPES[dtype], info.place)


def _copy(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    stored: dict[str, TensorInfo],
    done: frozenset[str],
    allow_nonfinite: bool,
) -> None:
    total = sum(map(nbytes, stored.values()))
    with tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=total < PROGRESS_BYTES) as bar:
        for name, info in stored.items():
            if name not in done:
                tensor = reader.read(name)
                if not allow_nonfinite:
                    require_finite(tensor, info.place)
                if tensor.dtype != info.dtype:
                    with np.errstate(over="ignore"):  # refused below
                        tensor = tensor.astype(info.dtype)
                    if not allow_nonfinite:
                        require_finite(tensor, f"{info.place}, as {info.dtype},")
                writer.write(name, tensor)
                del tensor  # before the next is read
            bar.update(nbytes(info))


def _task(source: str | os.PathLike, options: dict[str, Any]) -> str:
    """What tells one conversion from another: the options, and names, sizes and times of the source's files."""
    path = Path(source).expanduser().absolute()
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return json.dumps({"source": str(path), "files": stats, **options}, indent=1)


def _size(tensors: list[TensorInfo], format: str, dtype: str | None) -> int:
    bits = _GGUF_BITS.get(_GGUF_NAMES.get(dtype, dtype)) if format == "gguf" else None
    return sum(nbytes(info) if bits is None else math.ceil(math.prod(info.shape) * bits / 8) for info in tensors)


def _require_room(target: Path, needed: int) -> None:
    existing = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + _RESERVE:
        raise UserError(f"{target}: needs {needed + _RESERVE:,} bytes, but the disk has {free:,} free")


# ------------------------------------------------------------------------------------------------------------------------
# The formats that can be written


def _huggingface(target: Path, reader: CheckpointReader, tensors: dict[str, TensorInfo], dtype: str | None, task: str):
    return HuggingFaceWriter(target, reader.config, tensors, task=task)


def _orbax(target: Path, reader: CheckpointReader, tensors: dict[str, TensorInfo], dtype: str | None, task: str):
    from llama4_jax.checkpoints.orbax_writer import OrbaxWriter

    return OrbaxWriter(target, reader.config, tensors, task=task)


@contextlib.contextmanager
def _gguf(
    target: Path, reader: CheckpointReader, tensors: dict[str, TensorInfo], dtype: str | None, task: str
) -> Iterator[CheckpointWriter]:
    from llama4_jax.checkpoints.gguf import GgufWriter

    dtype = dtype or tensors["model.embed_tokens.weight"].dtype.name
    dtype = _GGUF_NAMES.get(dtype, dtype)
    writer = GgufWriter(target, reader.config, tensors, dtype=dtype, beside=reader.beside)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise


_WRITERS: dict[str, Callable[..., contextlib.AbstractContextManager[CheckpointWriter]]] = {
    "hf": _huggingface,
    "orbax": _orbax,
    "gguf": _gguf,
}

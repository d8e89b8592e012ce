"""A corpus tokenised once: ArrayRecord shards of token ids, and a manifest that says what they are.

    manifest.json                   settings, sources, counts, and of each shard its size and checksum
    tokenizer.json                  the tokenizer, whatever it came from
    heldout.txt                     the held-out documents end to end, in UTF-8
    train-00-00000.array_record     part, source, number: a record holds a document's ids, as little-endian uint16 or uint32
    train-00-00000.lengths.npy      how many ids each record has, so that packing needs to read none of them

shard_writer.py makes such a folder; here is what reads one.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int, Integer

from llama4_jax.config import DataConfig
from llama4_jax.data.digest import hash_file, hash_json, unsealed_json
from llama4_jax.data.documents import describe_tokenizer, token_dtype
from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import Tokenizer

MANIFEST, TOKENIZER_FILE, HELDOUT_TEXT = "manifest.json", "tokenizer.json", "heldout.txt"
FORMAT = 2  # rises when the same input would give other shards
_OPEN_READERS = 256
_LONG_DOCUMENT = 1 << 16  # tokens from which a document is kept for its next piece


@dataclasses.dataclass(frozen=True, eq=False)
class Shards:
    """A finished folder of shards, opened."""

    directory: Path
    tokenizer: Tokenizer
    sources: tuple[str, ...]  # of the training documents
    train: "ShardedDocuments"
    heldout: "ShardedDocuments"
    counts: dict[str, int]
    identity: dict[str, Any]  # equal identities, equal documents in an equal order


def load_shards(config: DataConfig) -> Shards:
    """Opens the folder `config.prepared`, and compares its settings with `config` when that names sources too.

    Raises UserError when it is missing, unfinished, damaged, or of other settings.
    """
    directory = Path(config.prepared).expanduser()
    manifest = read_manifest(directory)
    if not manifest["finished"]:
        raise UserError(f"{directory} is unfinished: run python -m llama4_jax.prepare again with --out={directory}")
    settings = manifest["settings"]
    if config.sources:
        now = data_settings(config) | {key: settings[key] for key in ("vocab_size", "shard_bytes")}
        require_same_settings(settings, now, directory, "; or set data.sources to nothing to take the folder as it is")
    for name, content in manifest["files"].items():
        if hash_file(directory / name) != content:
            raise UserError(f"the prepared data file {directory / name} is damaged: prepare the data anew")
    tokenizer = Tokenizer.load(directory / TOKENIZER_FILE)
    return Shards(
        directory=directory,
        tokenizer=tokenizer,
        sources=tuple(settings["sources"]),
        train=ShardedDocuments(directory, manifest, "train", token_dtype(tokenizer)),
        heldout=ShardedDocuments(directory, manifest, "heldout", token_dtype(tokenizer)),
        counts=manifest["counts"],
        identity={
            "sources": [source["content"] for source in manifest["sources"]],
            "tokenizer": manifest["files"][TOKENIZER_FILE],
            "heldout": manifest["files"][HELDOUT_TEXT],
            "shards": hash_json({name: shard["checksum"] for name, shard in manifest["shards"].items()}),
        },
    )


class ShardedDocuments:
    """The documents of one part, in the order of the shards' names; their lengths in memory, their ids on disk."""

    def __init__(self, directory: Path, manifest: dict, part: str, dtype: np.dtype):
        """Raises UserError for a shard that is missing or not as long as the manifest says."""
        shards = {name: shard for name, shard in manifest["shards"].items() if shard["part"] == part}
        self._paths = [directory / f"{name}.array_record" for name in shards]
        self._dtype = dtype
        lengths = []
        for name, path in zip(shards, self._paths, strict=True):
            if not path.is_file() or path.stat().st_size != shards[name]["size"]:
                raise UserError(f"the prepared data file {path} is missing or damaged: prepare the data anew")
            if hash_file(directory / f"{name}.lengths.npy") != shards[name]["lengths"]:
                raise UserError(f"the prepared data file {directory / name}.lengths.npy is damaged: prepare the data anew")
            lengths.append(np.load(directory / f"{name}.lengths.npy"))
        counts = [shard["documents"] for shard in shards.values()]
        self._starts = np.cumsum([0, *counts])
        self.lengths = np.concatenate([np.zeros(0, np.uint32), *lengths])
        self.sources = np.repeat(np.array([shard["source"] for shard in shards.values()], np.int32), counts)
        self.extras = None
        self._reader = functools.lru_cache(_OPEN_READERS)(self._open)
        self._read_long = functools.lru_cache(16)(lambda document: self._read_from_shards(np.array([document]))[0])

    def read(self, documents: Int[np.ndarray, "n"]) -> list[Integer[np.ndarray, "tokens"]]:
        """The ids of these documents. Raises UserError when a shard turns out to be damaged."""
        distinct, place = np.unique(documents, return_inverse=True)
        long = self.lengths[distinct] > _LONG_DOCUMENT
        ids = dict(zip(distinct[~long], self._read_from_shards(distinct[~long]), strict=True))
        ids |= {document: self._read_long(int(document)) for document in distinct[long]}
        return [ids[document] for document in distinct[place]]

    def _read_from_shards(self, documents: Int[np.ndarray, "n"]) -> list[np.ndarray]:
        """Sorted documents."""
        found = []
        shards = np.searchsorted(self._starts, documents, side="right") - 1
        for shard in np.unique(shards):
            own = documents[shards == shard]
            try:
                records = self._reader(int(shard)).read((own - self._starts[shard]).tolist())
            except RuntimeError as error:
                raise UserError(f"{self._paths[shard]} is damaged: {' '.join(str(error).split())}") from None
            found += [np.frombuffer(record, self._dtype) for record in records]
        for document, ids in zip(documents, found, strict=True):
            if len(ids) != self.lengths[document]:
                raise UserError(f"document {document} has {len(ids)} tokens on disk, not {self.lengths[document]}")
        return found

    def _open(self, shard: int) -> ArrayRecordReader:
        # Random reads: what a read-ahead would fetch is never wanted.
        reader = ArrayRecordReader(str(self._paths[shard]), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
        if not reader.ok():  # it would count no records, and say nothing
            raise UserError(f"{self._paths[shard]} is no ArrayRecord file, or was cut short: prepare the data anew")
        return reader


# ------------------------------------------------------------------------------------------------------------------------
# The manifest


def data_settings(config: DataConfig) -> dict:
    """What decides the shards, as JSON, but for the size of vocabulary and shards."""
    return {
        "sources": list(config.sources),
        "heldout_sources": list(config.heldout_sources),
        "heldout_fraction": None if config.heldout_sources else config.heldout_fraction,
        "text_field": config.text_field,
        "deduplicate": config.deduplicate,
        "tokenizer": describe_tokenizer(config),
    }


def read_manifest(directory: Path, missing_ok: bool = False) -> dict | None:
    """The manifest; None where there is none and that is fine. Raises UserError when it is missing or damaged."""
    path = directory / MANIFEST
    try:
        manifest = unsealed_json(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} is of format {manifest['format']}, not {FORMAT}: prepare the data anew")
        manifest["settings"], manifest["finished"], manifest["shards"]
    except UserError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        if missing_ok:
            return None
        raise UserError(
            f"{directory} holds no prepared data: python -m llama4_jax.prepare --out={directory} makes them"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): delete {directory} to make it anew") from None
    return manifest


def require_same_settings(then: dict, now: dict, directory: Path, way_out: str = "") -> None:
    """Raises UserError that names the settings that differ."""
    changes = [
        f"{key} was {then.get(key)}, now {now.get(key)}" for key in sorted({*then, *now}) if then.get(key) != now.get(key)
    ]
    if changes:
        raise UserError(
            f"the prepared data in {directory} are of other settings: {'; '.join(changes)}. Undo the change, choose another "
            f"folder, or delete that one{way_out}"
        )

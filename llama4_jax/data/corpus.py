"""From the sources that a DataConfig names to packed rows of token ids, kept on disk for the next start."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llama4_jax.config import DataConfig
from llama4_jax.data.bad_records import BadRecords
from llama4_jax.data.digest import ContentDigest, hash_file, hash_json, sealed_json, unsealed_json
from llama4_jax.data.documents import (
    describe_tokenizer,
    make_tokenizer,
    require_both_parts,
    require_lossless,
    split_documents,
    tokenize,
)
from llama4_jax.data.packing import PackedRows, PackingPlan, TokenizedDocuments, check_windows, plan_packing
from llama4_jax.data.row_streams import StreamedRows
from llama4_jax.data.shards import HELDOUT_TEXT, TOKENIZER_FILE, load_shards
from llama4_jax.data.sources import Document, read_source
from llama4_jax.errors import UserError
from llama4_jax.processing.processor import Processor
from llama4_jax.processing.tokenizer import Tokenizer

_FORMAT = 1  # rises when the same input would give other rows
_MANIFEST = "corpus.json"


class ChangedData(UserError):
    """The data are not those that a run has begun with. The message names each difference."""


@dataclasses.dataclass(frozen=True)
class CorpusCounts:
    documents: int  # read
    dropped_duplicates: int
    train_documents: int
    heldout_documents: int
    train_bytes: int  # of UTF-8
    heldout_bytes: int
    train_tokens: int  # begin and end tokens included
    heldout_tokens: int
    train_padding_share: float
    heldout_padding_share: float
    skipped: int = 0  # records that cannot be read, and conversations too large for a row


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    tokenizer: Tokenizer
    sources: tuple[str, ...]  # of the training documents, in the order of Batch.source_ids
    train: PackedRows | StreamedRows
    heldout: PackedRows
    counts: CorpusCounts
    identity: dict[str, Any]  # everything that decides the rows, by name, as JSON; equal identities, equal rows
    directory: Path
    processor: Processor | None = None  # of conversations

    @property
    def fingerprint(self) -> str:
        """The identity in short."""
        return hash_json(self.identity)

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of all held-out documents, of conversations what counts: what bits per byte divides by."""
        return self.counts.heldout_bytes

    def heldout_text(self) -> bytes:
        """All held-out documents end to end, in UTF-8."""
        return (self.directory / HELDOUT_TEXT).read_bytes()


@dataclasses.dataclass(frozen=True)
class _SourceText:
    """One source as it was read."""

    spec: str
    documents: list[Document]

    def description(self) -> dict:
        """What the manifest says of a source: a change of any name or text shows in it."""
        digest = ContentDigest()
        for document in self.documents:
            digest.add(document)
        return {"source": self.spec} | digest.summary()


def prepare_text(
    config: DataConfig, *, vocab_size: int, document_window: int | None, cache_dir: Path, progress: bool = True
) -> Corpus:
    """Reads, deduplicates, splits, tokenizes and packs the data of `config`, or loads what `cache_dir` keeps of that.

    With `config.prepared` it opens that folder instead, and packs as training goes: nothing is written.

    Args:
        config: the data.
        vocab_size: the model's; a BPE trained here has at most that many tokens.
        document_window: the promise W of Batch.document_window.
        cache_dir: folder to make, or one that an earlier call made. It appears whole or not at all.
        progress: show bars for phases that take long.

    Raises UserError for every fault of the sources or the tokenizer; when nothing would be held out, or nothing left; and
    when `cache_dir` is damaged or was made from other input: a run depends on it, so it is neither used nor replaced.
    """
    if config.prepared is not None:
        return _load_prepared(config, vocab_size, document_window)
    cache_dir = Path(cache_dir)
    if not config.sources:
        raise UserError("DataConfig.sources is empty: give files, folders or python:stdlib")
    bad = BadRecords(config.max_bad_records)
    sources = [_SourceText(spec, read_source(spec, config.text_field, bad)) for spec in config.sources]
    heldout_sources = [_SourceText(spec, read_source(spec, config.text_field, bad)) for spec in config.heldout_sources]
    inputs = _describe_inputs(config, sources, heldout_sources, vocab_size, document_window)

    if not (cache_dir / _MANIFEST).exists():
        _build(config, sources, heldout_sources, inputs, cache_dir, len(bad.found), progress)
    return _load(config, cache_dir, inputs)


def _describe_inputs(config, sources, heldout_sources, vocab_size, document_window) -> dict:
    """Everything that decides the rows, as JSON."""
    return {
        "format": _FORMAT,
        "sources": [source.description() for source in sources],
        "heldout_sources": [source.description() for source in heldout_sources],
        "heldout_fraction": None if heldout_sources else config.heldout_fraction,
        "deduplicate": config.deduplicate,
        "tokenizer": describe_tokenizer(config),
        "vocab_size": vocab_size,
        "sequence_length": config.sequence_length,
        "document_window": document_window,
    }


# ------------------------------------------------------------------------------------------------------------------------
# Building


def _build(config, sources, heldout_sources, inputs, cache_dir: Path, skipped: int, progress: bool) -> None:
    try:
        cache_dir.parent.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be written shows now
        unfinished = Path(tempfile.mkdtemp(prefix=f".{cache_dir.name}-unfinished-", dir=cache_dir.parent))
        try:
            split = _split(config, sources, heldout_sources, progress)
            tokenizer = _tokenizer(config, split, inputs["vocab_size"])
            _write(unfinished, split, tokenizer, inputs, skipped, progress)
            _publish(unfinished, cache_dir)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {cache_dir}: {error.strerror or error}") from None


@dataclasses.dataclass(frozen=True)
class _Split:
    documents_read: int
    dropped: int
    train: list[tuple[int, Document]]  # index of the source, document
    heldout: list[tuple[int, Document]]


def _split(config: DataConfig, sources: Sequence[_SourceText], heldout_sources: Sequence[_SourceText], progress) -> _Split:
    documents = [(i, document) for i, source in enumerate([*sources, *heldout_sources]) for document in source.documents]
    documents = [d for d in documents if d[0] >= len(sources)] + [d for d in documents if d[0] < len(sources)]
    parts: dict[str, list] = {"train": [], "heldout": [], "duplicate": []}
    bar = tqdm(documents, "dropping near duplicates", unit=" documents", delay=5, disable=not (progress and config.deduplicate))
    for source, document, part in split_documents(config, bar):
        parts[part].append((source, document))
    require_both_parts(config, len(parts["train"]), len(parts["heldout"]))
    return _Split(len(documents), len(parts["duplicate"]), parts["train"], parts["heldout"])


def _tokenizer(config: DataConfig, split: _Split, vocab_size: int) -> Tokenizer:
    tokenizer = make_tokenizer(config, vocab_size, (document.text for _, document in split.train))
    if config.tokenizer != "bpe":
        heldout = [document for _, document in split.heldout]
        for document, ids in zip(heldout, tokenizer.encode_batch([document.text for document in heldout]), strict=True):
            require_lossless(tokenizer, document, ids)
    return tokenizer


def _write(directory: Path, split: _Split, tokenizer: Tokenizer, inputs: dict, skipped: int, progress: bool) -> None:
    tokenizer.save(directory / TOKENIZER_FILE)
    with open(directory / HELDOUT_TEXT, "wb") as file:
        file.writelines(document.text.encode() for _, document in split.heldout)
    rows = {}
    for name, part in (("train", split.train), ("heldout", split.heldout)):
        documents = _tokenize(part, tokenizer, progress)
        plan = plan_packing(np.diff(documents.starts), inputs["sequence_length"], inputs["document_window"])
        rows[name] = PackedRows(documents, plan, inputs["sequence_length"], inputs["document_window"])
        for first in range(0, len(rows[name]), 256):
            chunk = rows[name].batch(range(first, min(first + 256, len(rows[name]))))
            check_windows(chunk.segment_ids, inputs["document_window"])
        _save_rows(directory, name, rows[name])
    counts = CorpusCounts(
        documents=split.documents_read,
        dropped_duplicates=split.dropped,
        train_documents=len(split.train),
        heldout_documents=len(split.heldout),
        train_bytes=sum(len(document.text.encode()) for _, document in split.train),
        heldout_bytes=(directory / HELDOUT_TEXT).stat().st_size,
        train_tokens=len(rows["train"].documents.ids),
        heldout_tokens=len(rows["heldout"].documents.ids),
        train_padding_share=rows["train"].padding_share,
        heldout_padding_share=rows["heldout"].padding_share,
        skipped=skipped,
    )
    files = {path.name: hash_file(path) for path in sorted(directory.iterdir())}
    manifest = {"inputs": inputs, "counts": dataclasses.asdict(counts), "files": files}
    (directory / _MANIFEST).write_text(sealed_json(manifest), encoding="utf-8")


def _tokenize(documents: list[tuple[int, Document]], tokenizer: Tokenizer, progress: bool) -> TokenizedDocuments:
    ids = []
    total = sum(len(document.text) for _, document in documents)
    with tqdm(total=total, desc="tokenizing", unit=" characters", unit_scale=True, delay=5, disable=not progress) as bar:
        for encoded in tokenize(tokenizer, [document.text for _, document in documents], bar.update):
            ids.append(encoded)
    return TokenizedDocuments(
        ids=np.concatenate(ids),
        starts=np.cumsum([0, *map(len, ids)]),
        sources=np.array([source for source, _ in documents], np.int32),
    )


def _publish(unfinished: Path, cache_dir: Path) -> None:
    try:
        os.rename(unfinished, cache_dir)
    except OSError:
        # Another process of this run may have made the same corpus in the meantime; `_load` compares it.
        if not (cache_dir / _MANIFEST).exists():
            raise


# ------------------------------------------------------------------------------------------------------------------------
# Loading


def _load_prepared(config: DataConfig, vocab_size: int, document_window: int | None) -> Corpus:
    shards = load_shards(config)
    shards.tokenizer.require_fits(vocab_size)
    train = StreamedRows(shards.train, config.sequence_length, document_window)
    plan = plan_packing(shards.heldout.lengths, config.sequence_length, document_window)
    heldout = PackedRows(shards.heldout, plan, config.sequence_length, document_window)
    counts = CorpusCounts(**shards.counts, train_padding_share=train.padding_share, heldout_padding_share=heldout.padding_share)
    return Corpus(
        tokenizer=shards.tokenizer,
        sources=shards.sources,
        train=train,
        heldout=heldout,
        counts=counts,
        identity=shards.identity | {"sequence_length": config.sequence_length, "document_window": document_window},
        directory=shards.directory,
    )


def _load(config: DataConfig, directory: Path, inputs: dict) -> Corpus:
    try:
        manifest = unsealed_json((directory / _MANIFEST).read_text(encoding="utf-8"))
        counts = CorpusCounts(**manifest["counts"])
        require_same_inputs(manifest["inputs"], inputs, directory)
        for name, content in manifest["files"].items():
            if hash_file(directory / name) != content:
                raise UserError(f"the prepared data file {directory / name} is damaged: delete {directory} to make it anew")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the prepared data in {directory} are damaged ({error}): delete that folder to make them anew"
        ) from None
    rows = {name: _load_rows(directory, name, inputs) for name in ("train", "heldout")}
    return Corpus(
        tokenizer=Tokenizer.load(directory / TOKENIZER_FILE),
        sources=config.sources,
        train=rows["train"],
        heldout=rows["heldout"],
        counts=counts,
        identity=without_paths(manifest["inputs"]) | {"prepared files": hash_json(manifest["files"])},
        directory=directory,
    )


def require_same_inputs(then: dict, now: dict, directory: Path) -> None:
    """Raises ChangedData that names each input that differs. Where a source lies does not matter, what it holds does."""
    old, new = without_paths(then), without_paths(now)
    changes = []
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        if key in ("sources", "heldout_sources"):
            changes.append(f"{key} held {_summary(then[key])}, now {_summary(now[key])}")
        else:
            changes.append(f"{key} was {old.get(key)}, now {new.get(key)}")
    if changes:
        raise ChangedData(
            f"the prepared data in {directory} were made from other input: {'; '.join(changes)}. "
            "Undo the change, use another work directory, or take the change with data.when_changed=start_over"
        )


def without_paths(inputs: dict) -> dict:
    def contents(sources):
        return [source["content"] for source in sources]

    return inputs | {key: contents(inputs[key]) for key in ("sources", "heldout_sources")}


def _summary(sources: list[dict]) -> str:
    parts = [f"{s['source']} ({s['documents']} documents, {s['bytes']} bytes, {s['content'][:8]})" for s in sources]
    return " + ".join(parts) or "nothing"


def _save_rows(directory: Path, name: str, rows: PackedRows) -> None:
    np.save(directory / f"{name}_ids.npy", rows.documents.ids)
    np.save(directory / f"{name}_starts.npy", rows.documents.starts)
    np.save(directory / f"{name}_sources.npy", rows.documents.sources)
    plan = rows.plan
    np.save(directory / f"{name}_plan.npy", np.stack([plan.document, plan.start, plan.length, plan.row, plan.offset]))


def _load_rows(directory: Path, name: str, inputs: dict) -> PackedRows:
    documents = TokenizedDocuments(
        ids=np.load(directory / f"{name}_ids.npy", mmap_mode="r"),
        starts=np.load(directory / f"{name}_starts.npy"),
        sources=np.load(directory / f"{name}_sources.npy"),
    )
    plan = PackingPlan(*np.load(directory / f"{name}_plan.npy"))
    return PackedRows(documents, plan, inputs["sequence_length"], inputs["document_window"])

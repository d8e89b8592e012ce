"""From the sources that a DataConfig names to packed rows of token ids, kept on disk for the next start."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llama4_jax.config import DataConfig
from llama4_jax.data import deduplicate
from llama4_jax.data.packing import PackedRows, PackingPlan, TokenizedDocuments, check_windows, plan_packing
from llama4_jax.data.sources import Document, read_source
from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import Tokenizer

_FORMAT = 1  # rises when the same input would give other rows
_MANIFEST, _TOKENIZER, _HELDOUT_TEXT = "corpus.json", "tokenizer.json", "heldout.txt"
_ENCODED_AT_ONCE = 1 << 22  # characters; bounds what the tokenizer holds in memory


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


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    tokenizer: Tokenizer
    train: PackedRows
    heldout: PackedRows
    counts: CorpusCounts
    fingerprint: str  # of everything that decides the rows; equal fingerprints, equal rows
    directory: Path

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of all held-out documents: what bits per byte divides by."""
        return self.counts.heldout_bytes

    def heldout_text(self) -> bytes:
        """All held-out documents end to end, in UTF-8."""
        return (self.directory / _HELDOUT_TEXT).read_bytes()


@dataclasses.dataclass(frozen=True)
class _SourceText:
    """One source as it was read."""

    spec: str
    documents: list[Document]

    def description(self) -> dict:
        """What the manifest says of a source: a change of any name or text shows in it."""
        digest = hashlib.blake2b(digest_size=16)
        size = 0
        for document in self.documents:
            for part in (document.name.encode("utf-8", "surrogateescape"), document.text.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
            size += len(part)  # the text, not the name
        return {"source": self.spec, "documents": len(self.documents), "bytes": size, "content": digest.hexdigest()}


def prepare_corpus(
    config: DataConfig, *, vocab_size: int, document_window: int | None, cache_dir: Path, progress: bool = True
) -> Corpus:
    """Reads, deduplicates, splits, tokenizes and packs the data of `config`, or loads what `cache_dir` keeps of that.

    Args:
        config: the data.
        vocab_size: the model's; a BPE trained here has at most that many tokens.
        document_window: the promise W of Batch.document_window.
        cache_dir: folder to make, or one that an earlier call made. It appears whole or not at all.
        progress: show bars for phases that take long.

    Raises UserError for every fault of the sources or the tokenizer; when nothing would be held out, or nothing left; and
    when `cache_dir` is damaged or was made from other input: a run depends on it, so it is neither used nor replaced.
    """
    cache_dir = Path(cache_dir)
    if not config.sources:
        raise UserError("DataConfig.sources is empty: give files, folders or python:stdlib")
    sources = [_SourceText(spec, read_source(spec, config.text_field)) for spec in config.sources]
    heldout_sources = [_SourceText(spec, read_source(spec, config.text_field)) for spec in config.heldout_sources]
    inputs = _describe_inputs(config, sources, heldout_sources, vocab_size, document_window)

    if not (cache_dir / _MANIFEST).exists():
        _build(config, sources, heldout_sources, inputs, cache_dir, progress)
    return _load(cache_dir, inputs)


def _describe_inputs(config, sources, heldout_sources, vocab_size, document_window) -> dict:
    """Everything that decides the rows, as JSON."""
    tokenizer = config.tokenizer if config.tokenizer == "bpe" else _hash_file(Path(config.tokenizer))
    return {
        "format": _FORMAT,
        "sources": [source.description() for source in sources],
        "heldout_sources": [source.description() for source in heldout_sources],
        "heldout_fraction": None if heldout_sources else config.heldout_fraction,
        "deduplicate": config.deduplicate,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "sequence_length": config.sequence_length,
        "document_window": document_window,
    }


# ------------------------------------------------------------------------------------------------------------------------
# Building


def _build(config, sources, heldout_sources, inputs, cache_dir: Path, progress: bool) -> None:
    try:
        cache_dir.parent.mkdir(parents=True, exist_ok=True)  # before the work: a folder that cannot be written shows now
        unfinished = Path(tempfile.mkdtemp(prefix=f".{cache_dir.name}-unfinished-", dir=cache_dir.parent))
        try:
            split = _split(config, sources, heldout_sources, progress)
            tokenizer = _tokenizer(config, split, inputs["vocab_size"])
            _write(unfinished, split, tokenizer, inputs, progress)
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
    def numbered(group, first):
        return [(first + i, document) for i, source in enumerate(group) for document in source.documents]

    heldout = numbered(heldout_sources, len(sources))
    documents = heldout + numbered(sources, 0)  # of two near duplicates the first stays: a held-out set stays whole
    kept = range(len(documents))
    if config.deduplicate:
        kept = deduplicate.distinct([document.text for _, document in documents], progress)

    def is_held_out(i):
        if heldout_sources:
            return i < len(heldout)
        return deduplicate.is_held_out(documents[i][1].name, config.heldout_fraction)

    split = _Split(
        documents_read=len(documents),
        dropped=len(documents) - len(kept),
        train=[documents[i] for i in kept if not is_held_out(i)],
        heldout=[documents[i] for i in kept if is_held_out(i)],
    )
    if not split.train or not split.heldout:
        which = "to train on" if not split.train else "held out"
        raise UserError(
            f"of {len(kept)} different documents in {', '.join(config.sources)} none is {which}: give more documents, "
            "another DataConfig.heldout_fraction, or DataConfig.heldout_sources"
        )
    return split


def _tokenizer(config: DataConfig, split: _Split, vocab_size: int) -> Tokenizer:
    if config.tokenizer == "bpe":
        return Tokenizer.train_bpe((document.text for _, document in split.train), vocab_size)
    tokenizer = Tokenizer.load(config.tokenizer)
    tokenizer.require_fits(vocab_size)
    heldout = [document for _, document in split.heldout]
    for document, ids in zip(heldout, tokenizer.encode_batch([document.text for document in heldout]), strict=True):
        if tokenizer.decode(ids) != document.text:
            raise UserError(
                f"tokenizer {config.tokenizer} does not give back the document {document.name} as it was, "
                "so bits per byte would mean nothing: use a lossless tokenizer"
            )
    return tokenizer


def _write(directory: Path, split: _Split, tokenizer: Tokenizer, inputs: dict, progress: bool) -> None:
    tokenizer.save(directory / _TOKENIZER)
    with open(directory / _HELDOUT_TEXT, "wb") as file:
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
        heldout_bytes=(directory / _HELDOUT_TEXT).stat().st_size,
        train_tokens=len(rows["train"].documents.ids),
        heldout_tokens=len(rows["heldout"].documents.ids),
        train_padding_share=rows["train"].padding_share,
        heldout_padding_share=rows["heldout"].padding_share,
    )
    files = {path.name: _hash_file(path) for path in sorted(directory.iterdir())}
    manifest = {"inputs": inputs, "counts": dataclasses.asdict(counts), "files": files}
    (directory / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _tokenize(documents: list[tuple[int, Document]], tokenizer: Tokenizer, progress: bool) -> TokenizedDocuments:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids = []
    total = sum(len(document.text) for _, document in documents)
    with tqdm(total=total, desc="tokenizing", unit=" characters", unit_scale=True, delay=5, disable=not progress) as bar:
        for texts in _groups([document.text for _, document in documents]):
            for encoded in tokenizer.encode_batch(texts):
                ids.append(np.array([tokenizer.bos_id, *encoded, tokenizer.eos_id], dtype))
            bar.update(sum(map(len, texts)))
    return TokenizedDocuments(
        ids=np.concatenate(ids),
        starts=np.cumsum([0, *map(len, ids)]),
        sources=np.array([source for source, _ in documents], np.int32),
    )


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Texts in order, in groups that hold no more than `_ENCODED_AT_ONCE` characters but for a single longer text."""
    group, size = [], 0
    for text in texts:
        if group and size + len(text) > _ENCODED_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield group


def _publish(unfinished: Path, cache_dir: Path) -> None:
    try:
        os.rename(unfinished, cache_dir)
    except OSError:
        # Another process of this run may have made the same corpus in the meantime; `_load` compares it.
        if not (cache_dir / _MANIFEST).exists():
            raise


# ------------------------------------------------------------------------------------------------------------------------
# Loading


def _load(directory: Path, inputs: dict) -> Corpus:
    try:
        text = (directory / _MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        counts = CorpusCounts(**manifest["counts"])
        _require_same_inputs(manifest["inputs"], inputs, directory)
        for name, content in manifest["files"].items():
            if _hash_file(directory / name) != content:
                raise UserError(f"the prepared data file {directory / name} is damaged: delete {directory} to make it anew")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the prepared data in {directory} are damaged ({error}): delete that folder to make them anew"
        ) from None
    rows = {name: _load_rows(directory, name, inputs) for name in ("train", "heldout")}
    decisive = json.dumps([_without_paths(manifest["inputs"]), manifest["files"]], sort_keys=True)
    return Corpus(
        tokenizer=Tokenizer.load(directory / _TOKENIZER),
        train=rows["train"],
        heldout=rows["heldout"],
        counts=counts,
        fingerprint=hashlib.blake2b(decisive.encode(), digest_size=16).hexdigest(),
        directory=directory,
    )


def _require_same_inputs(then: dict, now: dict, directory: Path) -> None:
    """Raises UserError that names each input that differs. Where a source lies does not matter, what it holds does."""
    old, new = _without_paths(then), _without_paths(now)
    changes = []
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        if key in ("sources", "heldout_sources"):
            changes.append(f"{key} held {_summary(then[key])}, now {_summary(now[key])}")
        else:
            changes.append(f"{key} was {old.get(key)}, now {new.get(key)}")
    if changes:
        raise UserError(
            f"the prepared data in {directory} were made from other input: {'; '.join(changes)}. "
            "Undo the change, use another work directory, or delete that folder"
        )


def _without_paths(inputs: dict) -> dict:
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


def _hash_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None

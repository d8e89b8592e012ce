"""Tokenises a corpus into the shards that shards.py describes, over processes, and after a kill from where it was.

One process reads, deduplicates and splits the sources; others tokenise and write a shard each. A shard is in the manifest once
it is whole, so after a kill the finished ones stay, provided that the text that goes into them is still the same.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from llama4_jax.config import DataConfig
from llama4_jax.data.bad_records import BadRecords
from llama4_jax.data.digest import ContentDigest, hash_file, sealed_json
from llama4_jax.data.documents import make_tokenizer, require_both_parts, require_lossless, split_documents, tokenize
from llama4_jax.data.shards import (
    FORMAT,
    HELDOUT_TEXT,
    MANIFEST,
    TOKENIZER_FILE,
    data_settings,
    read_manifest,
    require_same_settings,
)
from llama4_jax.data.sources import Document, iterate_source, source_size
from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import Tokenizer

_SHARD_BYTES = 1 << 27  # of text
_PARTS = ("train", "heldout")


def prepare_shards(
    config: DataConfig,
    directory: str | Path,
    *,
    vocab_size: int,
    processes: int = 1,
    shard_bytes: int = _SHARD_BYTES,
    progress: bool = True,
) -> dict:
    """Tokenises the sources of `config` into `directory`, or goes on where an interrupted call stopped; returns the manifest.

    Args:
        config: the data; what only concerns batches is not looked at.
        directory: made if need be.
        vocab_size: the model's; no tokenizer may have more tokens, and a BPE is trained to have as many.
        processes: that tokenise, beside the one that reads. The shards do not depend on their number.
        shard_bytes: text in a shard, but for a single document that is longer.
        progress: show a bar.

    Raises UserError for every fault of the sources or the tokenizer; when `directory` cannot be written, holds other things, or
    was begun with other settings or from other text; and when shards of a finished one are damaged.
    """
    if not config.sources:
        raise UserError("DataConfig.sources is empty: give files, folders or python:stdlib")
    directory = Path(directory)
    settings = data_settings(config) | {
        "vocab_size": vocab_size if config.tokenizer == "bpe" else None,
        "shard_bytes": shard_bytes,
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        manifest = read_manifest(directory, missing_ok=True)
        if manifest is None and any(directory.iterdir()):
            raise UserError(f"{directory} is not empty and has no {MANIFEST}: choose another --out")
        if manifest is None or not manifest["shards"]:  # nothing is lost by a new start, such as after a misspelt source
            (directory / TOKENIZER_FILE).unlink(missing_ok=True)
            manifest = {"format": FORMAT, "settings": settings, "finished": False, "shards": {}}
            _write_manifest(directory, manifest)
        require_same_settings(manifest["settings"], settings, directory)
        if manifest["finished"]:
            _verify(directory, manifest, progress)
        else:
            bad = BadRecords(config.max_bad_records)
            _require_tokenizer(config, directory, vocab_size, bad, progress)
            _prepare(config, directory, manifest, processes, bad, progress)
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {directory}: {error.strerror or error}") from None
    return manifest


def _prepare(config: DataConfig, directory: Path, manifest: dict, processes: int, bad: BadRecords, progress: bool) -> None:
    tally = _Tally(config)
    shards, wanted = manifest["shards"], set()
    bar = _bar(config, "tokenising", progress)
    with bar, open(directory / HELDOUT_TEXT, "wb") as heldout_text, _Workers(directory, config, processes) as workers:
        for task in _tasks(_documents(config, bar, bad, tally), heldout_text, manifest["settings"]["shard_bytes"]):
            wanted.add(task.name)
            finished = shards.get(task.name)
            if finished is not None:
                _require_same_text(finished["text"] == task.content, task.name, directory)
            if finished is None or _size(directory / f"{task.name}.array_record") != finished["size"]:
                workers.submit(task, functools.partial(_note_shard, directory, manifest, bar))
    for name in shards:
        _require_same_text(name in wanted, name, directory)
    tally.count_shards(shards)
    tally.counts["skipped"] = len(bad.found)
    require_both_parts(config, tally.counts["train_documents"], tally.counts["heldout_documents"])
    manifest |= {
        "shards": dict(sorted(shards.items())),
        "sources": tally.sources,
        "counts": tally.counts,
        "files": {name: hash_file(directory / name) for name in (TOKENIZER_FILE, HELDOUT_TEXT)},
        "finished": True,
    }
    _write_manifest(directory, manifest)


def _require_same_text(is_same: bool, shard: str, directory: Path) -> None:
    if not is_same:
        raise UserError(
            f"{directory} was begun from other text than the sources hold now (shard {shard}): "
            "delete the folder or choose another --out"
        )


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _require_tokenizer(config: DataConfig, directory: Path, vocab_size: int, bad: BadRecords, progress: bool) -> None:
    path = directory / TOKENIZER_FILE
    if path.exists():  # it appears whole
        return
    with _bar(config, "training the tokenizer", progress and config.tokenizer == "bpe") as bar:
        texts = (document.text for _, document, part in _documents(config, bar, bad) if part == "train")
        tokenizer = make_tokenizer(config, vocab_size, texts)
    tokenizer.save(path.with_suffix(".unfinished"))
    os.replace(path.with_suffix(".unfinished"), path)


def _bar(config: DataConfig, name: str, enabled: bool) -> tqdm:
    """Bytes of files that have been read. Those that tokenise are a few shards behind."""
    total = sum(map(source_size, [*config.sources, *config.heldout_sources])) if enabled else None
    return tqdm(total=total or None, desc=name, unit="B", unit_scale=True, delay=2, disable=not enabled)


class _Tally:
    """Counts of each source, as the manifest has them."""

    def __init__(self, config: DataConfig):
        self.names = [*config.sources, *config.heldout_sources]
        self.digests = [ContentDigest() for _ in self.names]
        self.duplicates = [0] * len(self.names)
        self.sources: list[dict] = []
        self.counts: dict[str, int] = {}

    def count_shards(self, shards: dict[str, dict]) -> None:
        def total(part, what, source=None):
            return sum(s[what] for s in shards.values() if s["part"] == part and source in (None, s["source"]))

        kinds = ("documents", "tokens", "bytes")
        for i, name in enumerate(self.names):
            own = {part: {kind: total(part, kind, i) for kind in kinds} for part in _PARTS}
            self.sources.append({"source": name} | self.digests[i].summary() | {"dropped_duplicates": self.duplicates[i]} | own)
        self.counts = {
            "documents": sum(source["documents"] for source in self.sources),
            "dropped_duplicates": sum(self.duplicates),
        } | {f"{part}_{kind}": total(part, kind) for kind in kinds for part in _PARTS}


def _documents(
    config: DataConfig, bar: tqdm, bad: BadRecords, tally: _Tally | None = None
) -> Iterator[tuple[int, Document, str]]:
    """Source, document and part of every document, those of held-out sources first."""
    numbered = list(enumerate([*config.sources, *config.heldout_sources]))
    numbered = numbered[len(config.sources) :] + numbered[: len(config.sources)]
    documents = itertools.chain.from_iterable(
        ((i, document) for document in iterate_source(source, config.text_field, bad, bar.update)) for i, source in numbered
    )
    for i, document, part in split_documents(config, documents):
        if tally is not None:
            tally.digests[i].add(document)
            tally.duplicates[i] += part == "duplicate"
        yield i, document, part


@dataclasses.dataclass(frozen=True)
class _Task:
    """The documents of one shard."""

    part: str
    source: int
    number: int
    documents: list[Document]
    content: str  # hash of the documents

    @property
    def name(self) -> str:
        return f"{self.part}-{self.source:02}-{self.number:05}"


def _tasks(documents, heldout_text, shard_bytes: int) -> Iterator[_Task]:
    """Documents of one part and source, grouped in order."""
    open_groups: dict[str, list[Document]] = {}  # by part, of the source that is being read
    sizes: dict[str, int] = {}
    numbers: dict[tuple[str, int], int] = {}

    def task(part, source):
        digest = ContentDigest()
        for document in open_groups[part]:
            digest.add(document)
        numbers[part, source] = numbers.get((part, source), -1) + 1
        return _Task(part, source, numbers[part, source], open_groups.pop(part), digest.summary()["content"])

    for source, of_source in itertools.groupby(documents, key=lambda item: item[0]):
        for _, document, part in of_source:
            if part == "duplicate":
                continue
            text = document.text.encode()
            if part == "heldout":
                heldout_text.write(text)
            if part in open_groups and sizes[part] + len(text) > shard_bytes:
                yield task(part, source)
            sizes[part] = len(text) + (sizes[part] if part in open_groups else 0)
            open_groups.setdefault(part, []).append(document)
        for part in sorted(open_groups):
            yield task(part, source)


class _Workers:
    """Processes that write shards, or none: then this one writes them. What they return is noted in this process."""

    def __init__(self, directory: Path, config: DataConfig, processes: int):
        self._lossless = config.tokenizer != "bpe"
        self._directory, self._processes = directory, processes
        self._running: dict[concurrent.futures.Future, Callable] = {}
        self._pool = None

    def __enter__(self) -> "_Workers":
        if self._processes > 1:
            # Not forked: this process may have threads by now.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._processes, multiprocessing.get_context("spawn"), initializer=_start_worker
            )
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def submit(self, task: _Task, note: Callable[[str, dict], None]) -> None:
        if self._pool is None:
            note(task.name, _write_shard(self._directory, task, self._lossless))
            return
        self._running[self._pool.submit(_write_shard, self._directory, task, self._lossless)] = functools.partial(
            note, task.name
        )
        self._settle(2 * self._processes - 1)  # the reader stays at most that far ahead

    def _settle(self, most: int) -> None:
        while len(self._running) > most:
            done, _ = concurrent.futures.wait(self._running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                note = self._running.pop(future)
                try:
                    note(future.result())
                except concurrent.futures.process.BrokenProcessPool:
                    raise UserError(
                        "a process that tokenised was killed, perhaps for memory: start again to go on, with fewer --processes"
                    ) from None


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a word: the parent speaks for all
    # A killed parent would leave its workers waiting for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@functools.lru_cache(maxsize=1)
def _tokenizer(path: Path, content: str) -> Tokenizer:
    """Loaded once in a process, while its `content` stays the same."""
    return Tokenizer.load(path)


def _write_shard(directory: Path, task: _Task, lossless: bool) -> dict:
    """Writes a shard whole or not at all; returns what the manifest says of it."""
    tokenizer = _tokenizer(directory / TOKENIZER_FILE, hash_file(directory / TOKENIZER_FILE))
    path = directory / f"{task.name}.array_record"
    unfinished = path.with_suffix(".unfinished")
    lengths = []
    try:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1,zstd:1")  # a group is what a random read decompresses
        texts = [document.text for document in task.documents]
        for document, ids in zip(task.documents, tokenize(tokenizer, texts), strict=True):
            if lossless and task.part == "heldout":
                require_lossless(tokenizer, document, ids[1:-1])
            writer.write(ids.tobytes())
            lengths.append(len(ids))
        writer.close()
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {' '.join(str(error).split())}") from None
    np.save(directory / f"{task.name}.lengths.npy", np.array(lengths, np.uint32))
    entry = {
        "part": task.part,
        "source": task.source,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "bytes": sum(len(text.encode()) for text in texts),
        "text": task.content,
        "size": unfinished.stat().st_size,
        "checksum": hash_file(unfinished),
        "lengths": hash_file(directory / f"{task.name}.lengths.npy"),
    }
    os.replace(unfinished, path)
    return entry


def _note_shard(directory: Path, manifest: dict, bar, name: str, entry: dict) -> None:
    manifest["shards"][name] = entry
    _write_manifest(directory, manifest)
    bar.set_postfix_str(f"{len(manifest['shards'])} shards", refresh=False)


def _write_manifest(directory: Path, manifest: dict) -> None:
    unfinished = directory / f"{MANIFEST}.unfinished"
    unfinished.write_text(sealed_json(manifest), encoding="utf-8")
    os.replace(unfinished, directory / MANIFEST)


def _verify(directory: Path, manifest: dict, progress: bool) -> None:
    """Reads every file of a finished folder. Raises UserError for one that is damaged."""
    files = dict(manifest["files"])
    for name, shard in manifest["shards"].items():
        files |= {f"{name}.array_record": shard["checksum"], f"{name}.lengths.npy": shard["lengths"]}
    for name, content in tqdm(files.items(), "verifying", unit=" files", delay=2, disable=not progress):
        if hash_file(directory / name) != content:
            raise UserError(f"the prepared data file {directory / name} is damaged: delete {directory} to make it anew")

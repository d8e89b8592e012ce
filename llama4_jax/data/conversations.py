"""Conversations with pictures, out of JSON lines, as a corpus to train on.

Each line is {"messages": [...]}, with `tools` and `images` if need be, or {"prompt": ..., "response": ..., "images": [...]}.
Messages are those of llama4_jax/processing/messages.py; paths of pictures are relative to the file. A conversation is never cut:
rows take whole ones, and one that is too large for a row is left out, counted and named. When a corpus is prepared, only the
headers of its pictures are read; they are decoded with the batches that show them.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt8
from tqdm import tqdm

from llama4_jax.config import DataConfig, ModelConfig
from llama4_jax.data.bad_records import BadRecord, BadRecords
from llama4_jax.data.corpus import ChangedData, Corpus, CorpusCounts, require_same_inputs, without_paths
from llama4_jax.data.deduplicate import is_held_out
from llama4_jax.data.digest import ContentDigest, sealed_json, unsealed_json
from llama4_jax.data.documents import require_both_parts, token_dtype
from llama4_jax.data.packing import PackedRows, plan_rows
from llama4_jax.data.shards import HELDOUT_TEXT
from llama4_jax.data.sources import Document, Record, iterate_records
from llama4_jax.errors import UserError
from llama4_jax.processing.images import ImageError
from llama4_jax.processing.processor import Processor, TrainingText
from llama4_jax.processing.ranks import named_special_tokens
from llama4_jax.processing.tokenizer import Tokenizer

_FORMAT = 1  # rises when the same input would give other rows
_MANIFEST, _SKIPPED = "corpus.json", "skipped.txt"
_DECODERS = 8  # threads


class ConversationDocuments:
    """Conversations in memory: their ids, what counts of them, and where their pictures are."""

    def __init__(
        self,
        texts: Sequence[TrainingText],
        sources: Sequence[int],
        processor: Processor,
        config: DataConfig,
        bad: BadRecords,
    ):
        dtype = token_dtype(processor.tokenizer)
        self._ids = [np.array(text.tokens, dtype) for text in texts]
        self.lengths = np.array([len(ids) for ids in self._ids], np.int64)
        self.sources = np.array(sources, np.int32)
        self.extras = ConversationExtras(texts, processor, config, bad)

    def read(self, documents: Int[np.ndarray, "n"]) -> list[Integer[np.ndarray, "tokens"]]:
        """The ids of these conversations."""
        return [self._ids[i] for i in documents]


class ConversationExtras:
    """What counts of conversations, and their tiles, decoded when they are asked for."""

    def __init__(self, texts: Sequence[TrainingText], processor: Processor, config: DataConfig, bad: BadRecords):
        vision = processor.config.vision
        side = 0 if vision is None else vision.image_size
        self.image_slots, self.tile_shape = config.image_slots, (side, side, 3)
        self.tiles = np.array([text.num_tiles for text in texts], np.int64)
        self._counted = [np.array(text.counted, bool) for text in texts]
        self._shown = [text.shown for text in texts]
        self._processor, self._bad = processor, bad

    @functools.cached_property
    def _decoders(self) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(_DECODERS, "decode")

    def counted(self, documents: Int[np.ndarray, "n"]) -> list[Bool[np.ndarray, "tokens"]]:
        """Of each id of these conversations, whether the loss counts its prediction."""
        return [self._counted[i] for i in documents]

    def images(self, documents: Int[np.ndarray, "n"]) -> list[UInt8[np.ndarray, "i h w 3"] | None]:
        """The tiles of these conversations, decoded in threads.

        A conversation with a picture that turns out to be damaged is a bad record: it has None, or there are too many of them
        and UserError is raised.
        """
        if not any(self._shown[i] for i in documents):
            return [np.zeros((0, *self.tile_shape), np.uint8)] * len(documents)
        return list(self._decoders.map(self._tiles_of, documents))

    def _tiles_of(self, document: int) -> UInt8[np.ndarray, "i h w 3"] | None:
        try:
            tiles = [np.zeros((0, *self.tile_shape), np.uint8), *map(self._processor.tiles, self._shown[document])]
        except ImageError as error:
            self._bad.leave_out(error)
            return None
        tiles = np.concatenate(tiles)
        if len(tiles) != self.tiles[document]:
            raise UserError(f"a picture changed while it was trained on: {self._shown[document][0].picture!s:.200}")
        return tiles


# ------------------------------------------------------------------------------------------------------------------------
# Preparing


def prepare_conversations(
    config: DataConfig, *, model: ModelConfig, document_window: int | None, cache_dir: Path, progress: bool = True
) -> Corpus:
    """Reads the conversations of `config`, drops exact duplicates, splits them, encodes and packs them.

    `cache_dir` receives the processor's files, the held-out answers, and `skipped.txt`: what was left out, and why. A run
    that goes on takes its tokenizer from there, and is refused where its input has changed.

    Raises UserError for every fault of the sources, with file and line, and for a picture that cannot be read, where they are
    more than `max_bad_records`; and when nothing is left to train on or to hold out.
    """
    cache_dir = Path(cache_dir)
    if not config.sources:
        raise UserError("DataConfig.sources is empty: give files or folders of JSON lines")
    _require_room(config, model)
    bad = BadRecords(config.max_bad_records)
    sources = enumerate([*config.sources, *config.heldout_sources])
    records = [(i, record) for i, source in sources for record in iterate_records(source, bad)]
    kept, duplicates = _split(config, records)
    inputs = _describe_inputs(config, records, model, document_window)
    manifest = _read_manifest(cache_dir, inputs)
    processor = _processor(config, model, cache_dir, [r for _, r, part in kept if part == "train"], made=manifest is not None)
    texts, too_large = _encode(config, processor, kept, bad, progress)
    rows = {
        part: _pack(config, processor, [t for t in texts if t[2] == part], document_window, bad)
        for part in ("train", "heldout")
    }
    require_both_parts(config, *(len(rows[part].documents.lengths) for part in ("train", "heldout")))
    identity = _identity(inputs, texts)
    if manifest is not None and manifest["tokens"] != identity["tokens"]:
        raise ChangedData(f"pictures that {cache_dir} was prepared from have changed: undo that, or use another work directory")
    answers = [_answers(processor, text) for _, text, part in texts if part == "heldout"]
    counts = CorpusCounts(
        documents=len(records),
        dropped_duplicates=duplicates,
        train_documents=len(rows["train"].documents.lengths),
        heldout_documents=len(rows["heldout"].documents.lengths),
        train_bytes=sum(len(_answers(processor, text)) for _, text, part in texts if part == "train"),
        heldout_bytes=sum(map(len, answers)),
        train_tokens=int(rows["train"].documents.lengths.sum()),
        heldout_tokens=int(rows["heldout"].documents.lengths.sum()),
        train_padding_share=rows["train"].padding_share,
        heldout_padding_share=rows["heldout"].padding_share,
        skipped=len(too_large) + len(bad.found),
    )
    if not counts.heldout_bytes:
        raise UserError(f"of the held-out conversations no text counts with DataConfig.loss_on={config.loss_on}")
    if manifest is None:
        _write(cache_dir, processor, answers, bad.found + too_large, inputs, counts, identity["tokens"])
    if too_large:
        warnings.warn(
            f"{len(too_large)} of {len(records)} conversations are left out, see {cache_dir / _SKIPPED}; {too_large[0]}",
            stacklevel=2,
        )
    return Corpus(
        tokenizer=processor.tokenizer,
        sources=config.sources,
        train=rows["train"],
        heldout=rows["heldout"],
        counts=counts,
        identity=identity,
        directory=cache_dir,
        processor=processor,
    )


def _require_room(config: DataConfig, model: ModelConfig) -> None:
    if config.image_slots and model.vision is None:
        raise UserError(f"DataConfig.image_slots={config.image_slots} needs a model that sees: set ModelConfig.vision")


def _split(config: DataConfig, records: Sequence[tuple[int, Record]]) -> tuple[list[tuple[int, Record, str]], int]:
    """The records that stay, with their part, and how many were dropped. Of equal ones the held-out one stays, or the first."""
    seen, kept = set(), []
    for source, record in sorted(records, key=lambda each: each[0] < len(config.sources)):
        key = hashlib.blake2b(json.dumps([record.folder, record.value], sort_keys=True).encode()).digest()
        if config.deduplicate and key in seen:
            continue
        seen.add(key)
        given = source >= len(config.sources)
        held_out = given if config.heldout_sources else is_held_out(record.name, config.heldout_fraction)
        kept.append((source, record, "heldout" if held_out else "train"))
    return kept, len(records) - len(kept)


def _processor(config: DataConfig, model: ModelConfig, cache_dir: Path, training: Sequence[Record], made: bool) -> Processor:
    if made:
        processor = Processor.load(cache_dir, model)
    elif config.tokenizer == "bpe":
        tokenizer = Tokenizer.train_bpe(_texts(training), model.vocab_size, named_special_tokens())
        processor = Processor(tokenizer, model)
    elif Path(config.tokenizer).is_dir():
        processor = Processor.load(config.tokenizer, model)
    else:
        processor = Processor(Tokenizer.load(config.tokenizer, config.tokenizer_ranks), model)
    processor.max_tiles = config.image_tiles
    return processor


def _texts(records: Sequence[Record]) -> Iterator[str]:
    """Every text of conversations, for a tokenizer to learn from."""
    for record in records:
        try:
            messages, _ = _messages(record)
        except BadRecord:
            continue  # told when it is encoded
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            parts = content if isinstance(content, list) else [{"text": content}]
            yield from (part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _messages(record: Record) -> tuple[list[Any], dict[str, Any]]:
    """The messages of a record, and what else read_conversation wants of it."""
    value = record.value
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return value["messages"], {"tools": value.get("tools"), "images": _images(record)}
    if isinstance(value, dict) and isinstance(value.get("prompt"), str) and isinstance(value.get("response"), str):
        images = _images(record)
        prompt = [*({"type": "image"} for _ in images), {"type": "text", "text": value["prompt"]}]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": value["response"]}]
        return messages, {"tools": None, "images": images}
    raise BadRecord(f"{record.place} must hold `messages`, or `prompt` and `response`, got {value!r:.80}")


def _images(record: Record) -> list[Any]:
    images = record.value.get("images") or []
    if not isinstance(images, list):
        raise BadRecord(f"{record.place}: images must be a list, got {images!r:.80}")
    return images


def _encode(
    config: DataConfig, processor: Processor, kept, bad: BadRecords, progress: bool
) -> tuple[list[tuple[int, TrainingText, str]], list[str]]:
    """Each conversation that fits a row, and what was left out because it does not."""
    texts, too_large = [], []
    for source, record, part in tqdm(kept, "reading conversations", unit=" conversations", delay=5, disable=not progress):
        try:
            text = _encode_one(config, processor, record)
        except BadRecord as error:
            bad.leave_out(error)
            continue
        if len(text.tokens) > config.sequence_length + 1:
            reason = f"{len(text.tokens)} tokens do not fit DataConfig.sequence_length={config.sequence_length}"
            too_large.append(f"{record.place}: {reason}")
        elif text.num_tiles > config.image_slots:
            reason = f"{text.num_tiles} image tiles do not fit DataConfig.image_slots={config.image_slots}"
            too_large.append(f"{record.place}: {reason}")
        else:
            texts.append((source, text, part))
    return texts, too_large


def _encode_one(config: DataConfig, processor: Processor, record: Record) -> TrainingText:
    messages, beside = _messages(record)
    try:
        return processor.conversation(messages, loss_on=config.loss_on, folder=Path(record.folder), **beside)
    except UserError as error:
        raise BadRecord(f"{record.place}: {error}") from None


def _pack(config: DataConfig, processor: Processor, texts, document_window: int | None, bad: BadRecords) -> PackedRows:
    sources = [source for source, _, _ in texts]
    documents = ConversationDocuments([text for _, text, _ in texts], sources, processor, config, bad)
    plan = plan_rows(documents, np.arange(len(texts)), config.sequence_length, document_window)
    return PackedRows(documents, plan, config.sequence_length, document_window)


def _answers(processor: Processor, text: TrainingText) -> bytes:
    """The text that counts of a conversation."""
    return processor.decode([token for token, counts in zip(text.tokens, text.counted, strict=True) if counts]).encode()


# ------------------------------------------------------------------------------------------------------------------------
# The folder that a run keeps


def _describe_inputs(config: DataConfig, records, model: ModelConfig, document_window: int | None) -> dict[str, Any]:
    """Everything that decides the rows, as JSON."""
    names = [*config.sources, *config.heldout_sources]
    sources = []
    for i, name in enumerate(names):
        digest = ContentDigest()
        for source, record in records:
            if source == i:
                digest.add(Document(record.name, json.dumps(record.value, sort_keys=True)))
        sources.append({"source": name} | digest.summary())
    settings = ("sequence_length", "heldout_fraction", "deduplicate", "tokenizer", "tokenizer_ranks", "loss_on")
    settings += ("image_slots", "image_tiles")
    return {
        "format": _FORMAT,
        "sources": sources[: len(config.sources)],
        "heldout_sources": sources[len(config.sources) :],
        **{name: getattr(config, name) for name in settings},
        "vocab_size": model.vocab_size,
        "vision": None if model.vision is None else dataclasses.asdict(model.vision),
        "document_window": document_window,
    }


def _read_manifest(cache_dir: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier call left; None without one. Raises UserError where it was of other input."""
    if not (cache_dir / _MANIFEST).exists():
        return None
    try:
        manifest = unsealed_json((cache_dir / _MANIFEST).read_text(encoding="utf-8"))
        require_same_inputs(manifest["inputs"], inputs, cache_dir)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the prepared data in {cache_dir} are damaged ({error}): delete that folder") from None
    return manifest


def _identity(inputs: dict[str, Any], texts: Sequence[tuple[int, TrainingText, str]]) -> dict[str, Any]:
    """Of the input and of the tokens, which the sizes of pictures decide; where the sources lie does not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for _, text, _ in texts:
        digest.update(np.array(text.tokens, np.int32).tobytes())
    return without_paths(inputs) | {"tokens": digest.hexdigest()}


def _write(
    cache_dir: Path, processor: Processor, answers, skipped: list[str], inputs, counts: CorpusCounts, tokens: str
) -> None:
    manifest = {"inputs": inputs, "counts": dataclasses.asdict(counts), "tokens": tokens}
    try:
        processor.save(cache_dir)
        (cache_dir / HELDOUT_TEXT).write_bytes(b"".join(answers))
        (cache_dir / _SKIPPED).write_text("".join(f"{line}\n" for line in skipped), encoding="utf-8")
        (cache_dir / _MANIFEST).write_text(sealed_json(manifest), encoding="utf-8")  # last: it says all is there
    except OSError as error:
        raise UserError(f"cannot write the prepared data to {cache_dir}: {error.strerror or error}") from None

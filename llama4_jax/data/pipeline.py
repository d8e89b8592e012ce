"""Batches of a prepared corpus: shuffled, mixed and endless for training, each row once for evaluation.

corpus = prepare_corpus(config, vocab_size=4096, document_window=256, cache_dir=workdir / "data")
batches = train_batches(corpus, config)
batch = next(batches)
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np

from llama4_jax.config import DataConfig, ModelConfig
from llama4_jax.data.batch import Batch
from llama4_jax.data.conversations import prepare_conversations
from llama4_jax.data.corpus import ChangedData, Corpus, CorpusCounts, prepare_text
from llama4_jax.data.mixture import Interleave
from llama4_jax.data.packing import PackingPlan, read_rows
from llama4_jax.data.row_streams import RowStream, StreamedPool, StreamedRows, WholePool
from llama4_jax.errors import UserError

__all__ = ["Corpus", "CorpusCounts", "TrainBatches", "heldout_batches", "prepare_corpus", "train_batches"]

logger = logging.getLogger(__name__)

_PREFETCHED = 4  # batches, by a thread: the tokens are read and unpacked outside of Python's lock


def prepare_corpus(
    config: DataConfig,
    *,
    vocab_size: int,
    document_window: int | None,
    cache_dir: Path,
    model: ModelConfig | None = None,
    progress: bool = True,
) -> Corpus:
    """The corpus that `config` names: prepare_text's, or with format=chat prepare_conversations', which asks for the `model`."""
    options = {"document_window": document_window, "cache_dir": cache_dir, "progress": progress}
    if config.format == "chat" and model is None:
        raise UserError("DataConfig.format=chat needs the model's configuration: prepare_corpus(..., model=config)")

    def prepare() -> Corpus:
        if config.format == "text":
            return prepare_text(config, vocab_size=vocab_size, **options)
        return prepare_conversations(config, model=model, **options)

    try:
        return prepare()
    except ChangedData as changed:
        if config.when_changed == "refuse":
            raise
        logger.warning("%s is made anew: %s", cache_dir, changed)
        if Path(cache_dir).is_symlink():  # of a sweep, whose runs share one
            Path(cache_dir).unlink()
        else:
            shutil.rmtree(cache_dir)
        return prepare()


class TrainBatches:
    """Endless iterator over training batches. A resumed one goes on with the exact next batch.

    Its state is one for all processes and stays good for another number of them: it counts global batches.
    """

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any], when_changed: Literal["refuse", "start_over"]):
        self._iterator = iter(dataset)
        self._beginning = self._iterator.get_state()
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))  # as a state has it that was saved
        self._when_changed = when_changed

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def step(self) -> int:
        """Batches handed out, whatever has been prefetched beyond them."""
        return self._iterator.get_state()["step"]

    @property
    def epochs(self) -> dict[str, float]:
        """How often each source has been handed out."""
        return dict(self._iterator.get_state()["epochs"])

    def get_state(self) -> dict:
        """Place and identity of this stream, as JSON."""
        return {**self._iterator.get_state(), "identity": self._identity}

    def set_state(self, state: dict) -> None:
        """Goes to the place of `state`. Grain would not notice that it comes from another stream.

        Raises ChangedData that names each difference; with when_changed=start_over it goes to the beginning, and logs them.
        """
        then, now = state["identity"], self._identity
        changes = [
            f"{key} was {then.get(key)}, now {now.get(key)}" for key in sorted({*then, *now}) if then.get(key) != now.get(key)
        ]
        if not changes:
            self._iterator.set_state({key: state[key] for key in ("step", "rows", "streams", "epochs")})
        elif self._when_changed == "refuse":
            raise ChangedData(
                f"cannot resume: the data differ from the checkpoint's: {'; '.join(changes)}. Undo the change, or take it with "
                "data.when_changed=start_over"
            )
        else:
            self._iterator.set_state(self._beginning)
            logger.warning("the data differ from the checkpoint's and are read from their beginning: %s", "; ".join(changes))


def train_batches(corpus: Corpus, config: DataConfig, *, places: Sequence[int] | None = None) -> TrainBatches:
    """Batches of `config.batch_size` rows over all processes, of which this process reads those at `places`; None: all.

    Each epoch is shuffled anew by `config.shuffle_seed`. With `config.weights` a row holds one source, and the rows of the
    sources alternate by `Interleave`. Every process plans the same global batches, and reads the tokens and pictures of its
    own rows alone. A batch may hold the end of one epoch and the start of the next. Raises UserError when the weights do not
    fit the sources.
    """
    rows, places = corpus.train, _places(config, places)

    def read(plans: list[PackingPlan]) -> Batch:
        return read_rows(rows.documents, [plans[place] for place in places], rows.sequence_length, rows.document_window)

    dataset = grain.experimental.ThreadPrefetchIterDataset(
        _GlobalBatches(corpus, config).map(read), prefetch_buffer_size=_PREFETCHED
    )
    identity = corpus.identity | {"shuffle_seed": config.shuffle_seed, "batch_size": config.batch_size}
    if config.weights:
        identity["weights"] = config.weights
    return TrainBatches(dataset, identity, config.when_changed)


class _GlobalBatches(grain.IterDataset):
    """What the rows of each global batch hold: pieces of documents, whose tokens are not read yet."""

    def __init__(self, corpus: Corpus, config: DataConfig):
        super().__init__()
        self._corpus, self._config = corpus, config
        _require_fitting_weights(corpus, config)

    def __iter__(self) -> _GlobalBatchIterator:
        return _GlobalBatchIterator(self._corpus, self._config)


class _GlobalBatchIterator(grain.DatasetIterator):
    def __init__(self, corpus: Corpus, config: DataConfig):
        super().__init__()
        self._batch_size, self._sources = config.batch_size, corpus.sources
        self._mixture = Interleave(config.weights or (1.0,))
        self._streams = _streams(corpus, config)
        self._step = 0

    def __next__(self) -> list[PackingPlan]:
        self._step += 1
        return [self._streams[self._mixture.next()].next() for _ in range(self._batch_size)]

    def get_state(self) -> dict:
        epochs = [stream.epochs for stream in self._streams]
        if len(epochs) < len(self._sources):  # all sources are one pool
            epochs *= len(self._sources)
        return {
            "step": self._step,
            "rows": list(self._mixture.counts),
            "streams": [stream.get_state() for stream in self._streams],
            "epochs": dict(zip(self._sources, epochs, strict=True)),
        }

    def set_state(self, state: dict) -> None:
        self._step = state["step"]
        self._mixture.counts = list(state["rows"])
        for stream, place in zip(self._streams, state["streams"], strict=True):
            stream.set_state(place)


def _streams(corpus: Corpus, config: DataConfig) -> list[RowStream]:
    """One for each weight; without weights one for all documents."""
    rows, seed = corpus.train, config.shuffle_seed
    if not config.weights:
        if isinstance(rows, StreamedRows):
            return [RowStream(StreamedPool(rows, range(len(rows.documents.lengths)), seed))]
        return [RowStream(WholePool(rows, seed))]
    streamed = StreamedRows(rows.documents, rows.sequence_length, rows.document_window)
    return [
        RowStream(StreamedPool(streamed, np.flatnonzero(rows.documents.sources == i), zlib.crc32(f"{seed} {i}".encode())))
        for i in range(len(corpus.sources))
    ]


def _require_fitting_weights(corpus: Corpus, config: DataConfig) -> None:
    if config.weights and len(config.weights) != len(corpus.sources):
        raise UserError(
            f"DataConfig.weights has {len(config.weights)} values for {len(corpus.sources)} sources: {', '.join(corpus.sources)}"
        )
    if config.weights:
        for i, source in enumerate(corpus.sources):
            if not np.any(corpus.train.documents.sources == i):
                raise UserError(f"the source {source} has a weight but no document to train on: all are held out or duplicates")


class HeldoutBatches(Sequence):
    """Every held-out row exactly once, in order; empty rows fill the last batch. All batches have one shape.

    A batch is made when it is asked for: pictures that are held out need not fit into memory.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, places: Sequence[int]):
        self._rows, self._size, self._places = corpus.heldout, config.batch_size, np.array(places)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = index * self._size + self._places
        return self._rows.batch(rows[rows < len(self._rows)], batch_size=len(rows))


def heldout_batches(corpus: Corpus, config: DataConfig, *, places: Sequence[int] | None = None) -> HeldoutBatches:
    """The held-out batches, of which this process reads the rows at `places`; None: all."""
    return HeldoutBatches(corpus, config, _places(config, places))


def _places(config: DataConfig, places: Sequence[int] | None) -> Sequence[int]:
    return range(config.batch_size) if places is None else places

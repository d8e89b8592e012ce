"""Batches of a prepared corpus: shuffled and endless for training, each row once for evaluation.

corpus = prepare_corpus(config, vocab_size=4096, document_window=256, cache_dir=workdir / "data")
batches = train_batches(corpus, config)
batch = next(batches)
"""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from llama4_jax.config import DataConfig
from llama4_jax.data.batch import Batch
from llama4_jax.data.corpus import Corpus, CorpusCounts, prepare_corpus
from llama4_jax.errors import UserError

__all__ = ["Corpus", "CorpusCounts", "TrainBatches", "heldout_batches", "prepare_corpus", "train_batches"]

# Threads, not processes: rows are slices of arrays in memory, and Grain's worker processes need parsed absl flags.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)  # batches


class TrainBatches:
    """Endless iterator over training batches. A resumed one goes on with the exact next batch.

    Its state is one for all processes and stays good for another number of them: it counts global batches.
    """

    def __init__(self, dataset: grain.IterDataset, fingerprint: dict[str, str | int], rows_per_epoch: int):
        self._iterator = iter(dataset)
        self._fingerprint = fingerprint
        self._rows_per_epoch = rows_per_epoch

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def step(self) -> int:
        """Batches handed out, whatever has been prefetched beyond them."""
        return self._iterator.get_state()["next_index"]

    @property
    def epochs(self) -> float:
        """How often the training rows have been handed out."""
        return self.step * self._fingerprint["batch_size"] / self._rows_per_epoch

    def get_state(self) -> dict:
        """Place and identity of this stream, as JSON."""
        return {"step": self.step, "fingerprint": dict(self._fingerprint)}

    def set_state(self, state: dict) -> None:
        """Goes to the place of `state`. Raises UserError when it comes from another stream: Grain would not notice."""
        then, now = state["fingerprint"], self._fingerprint
        changes = [
            f"{key} was {then.get(key)}, now {now.get(key)}" for key in sorted({*then, *now}) if then.get(key) != now.get(key)
        ]
        if changes:
            raise UserError(f"cannot resume: the data differ from the checkpoint's: {'; '.join(changes)}")
        self._iterator.set_state({"next_index": state["step"]})


def train_batches(corpus: Corpus, config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> TrainBatches:
    """Batches of `config.batch_size` rows over all processes, of which this process gets its equal part, in order.

    Each epoch is shuffled anew by `config.shuffle_seed`. The parts of all processes, one after another, are the same global
    batch whatever their number. A batch may hold the end of one epoch and the start of the next. Raises UserError when
    `process_count` does not divide the batch.
    """
    part = _part_of_batch(config, process_index, process_count)
    dataset = (
        grain.MapDataset.range(len(corpus.train))
        .shuffle(seed=config.shuffle_seed)
        .repeat()
        .batch(config.batch_size, drop_remainder=True)  # of an endless dataset there is none
        .map(lambda rows: corpus.train.batch(rows[part]))
        .to_iter_dataset(_PREFETCH)
    )
    fingerprint = {
        "corpus": corpus.fingerprint,
        "shuffle_seed": config.shuffle_seed,
        "batch_size": config.batch_size,
        "sequence_length": corpus.train.sequence_length,
    }
    return TrainBatches(dataset, fingerprint, len(corpus.train))


def heldout_batches(corpus: Corpus, config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
    """Every held-out row exactly once, in order; empty rows fill the last batch. All batches have one shape."""
    part = _part_of_batch(config, process_index, process_count)
    for first in range(0, len(corpus.heldout), config.batch_size):
        rows = np.arange(first, min(first + config.batch_size, len(corpus.heldout)))
        yield corpus.heldout.batch(rows[part], batch_size=part.stop - part.start)


def _part_of_batch(config: DataConfig, process_index: int, process_count: int) -> slice:
    if config.batch_size % process_count:
        raise UserError(f"DataConfig.batch_size={config.batch_size} must be a multiple of the {process_count} processes")
    size = config.batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)

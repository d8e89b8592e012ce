"""What becomes of documents on their way from a source to token ids, whether they stay in memory or go to shards."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Integer

from llama4_jax.config import DataConfig
from llama4_jax.data.deduplicate import Distinct, is_held_out
from llama4_jax.data.digest import hash_file
from llama4_jax.data.sources import Document
from llama4_jax.errors import UserError
from llama4_jax.processing.tokenizer import Tokenizer, tokenizer_file

_ENCODED_AT_ONCE = 1 << 22  # characters; bounds what the tokenizer holds in memory

Part = Literal["train", "heldout", "duplicate"]


def split_documents(config: DataConfig, documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, Document, Part]]:
    """Says of each (source, document) what becomes of it. Sources count through `sources`, then `heldout_sources`.

    Those of `heldout_sources` must come first: of two near duplicates the first stays, so a given held-out set stays whole.
    """
    seen = Distinct() if config.deduplicate else None
    for source, document in documents:
        if seen is not None and not seen.keep(document.text):
            part = "duplicate"
        elif config.heldout_sources:
            part = "heldout" if source >= len(config.sources) else "train"
        else:
            part = "heldout" if is_held_out(document.name, config.heldout_fraction) else "train"
        yield source, document, part


def require_both_parts(config: DataConfig, train: int, heldout: int) -> None:
    """Raises UserError unless there are documents to train on and held-out ones."""
    if not train or not heldout:
        which = "to train on" if not train else "held out"
        raise UserError(
            f"of {train + heldout} different documents in {', '.join(config.sources)} none is {which}: give more documents, "
            "another DataConfig.heldout_fraction, or DataConfig.heldout_sources"
        )


def describe_tokenizer(config: DataConfig) -> str:
    """`bpe`, or the hash of the file with what is kept of it."""
    if config.tokenizer == "bpe":
        if config.tokenizer_ranks is not None:
            raise UserError("DataConfig.tokenizer_ranks cuts a tokenizer.model, not bpe; its size is ModelConfig.vocab_size")
        return "bpe"
    content = hash_file(tokenizer_file(config.tokenizer))
    return content if config.tokenizer_ranks is None else f"{content} cut to {config.tokenizer_ranks}"


def make_tokenizer(config: DataConfig, vocab_size: int, training_texts: Iterable[str]) -> Tokenizer:
    """A BPE trained on these texts, or the one that `config` names. Raises UserError when it has over `vocab_size` tokens."""
    if config.tokenizer == "bpe":
        return Tokenizer.train_bpe(training_texts, vocab_size)
    tokenizer = Tokenizer.load(config.tokenizer, config.tokenizer_ranks)
    tokenizer.require_fits(vocab_size)
    return tokenizer


def require_lossless(tokenizer: Tokenizer, document: Document, ids: Sequence[int]) -> None:
    """Raises UserError unless `ids`, without begin and end tokens, give the document's text back."""
    if tokenizer.decode(ids) != document.text:
        raise UserError(
            f"tokenizer {tokenizer.name} does not give back the document {document.name} as it was, "
            "so bits per byte would mean nothing: use a lossless tokenizer"
        )


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], advance: Callable[[int], object] = lambda characters: None
) -> Iterator[Integer[np.ndarray, "tokens"]]:
    """The ids of each text between a begin and an end token; `advance` hears how many characters are done."""
    dtype = token_dtype(tokenizer)
    for group in _groups(texts):
        for encoded in tokenizer.encode_batch(group):
            yield np.array([tokenizer.bos_id, *encoded, tokenizer.eos_id], dtype)
        advance(sum(map(len, group)))


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest type for the tokenizer's ids, little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in order, in groups that hold no more than `_ENCODED_AT_ONCE` characters but for a single longer text."""
    group, size = [], 0
    for text in texts:
        if group and size + len(text) > _ENCODED_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    yield group

"""Near-duplicate removal, and the split that holds whole documents out.

Duplicates go before the split, so that no held-out document has a near twin among the training documents.
"""

import hashlib
import re
import zlib
from collections import defaultdict

import numpy as np
from jaxtyping import UInt64

SIMILARITY = 0.7  # Jaccard similarity of two documents' shingles from which they count as near duplicates
_SHINGLE = 5  # words
_BANDS, _ROWS = 32, 4  # a pair just at SIMILARITY shares a band with probability 1 - (1 - 0.7**4)**32 = 0.9998

# In UTF-8: ASCII words; every other character stands alone, for many scripts put no space between words.
_WORD = re.compile(rb"[a-z0-9_]+|[\xc0-\xff][\x80-\xbf]+")
_MULTIPLIERS = np.random.default_rng(0).integers(2**63, size=_BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def shingles(text: str) -> UInt64[np.ndarray, "shingles"]:
    """Sorted distinct hashes of the runs of five words in a text, whatever their case and the punctuation between."""
    words = _WORD.findall(text.lower().encode())
    if len(words) < _SHINGLE:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return np.frombuffer(digest, np.uint64)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    runs = np.zeros(len(words) - _SHINGLE + 1, np.uint64)
    for i in range(_SHINGLE):
        runs = runs * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(runs)]
    return np.unique(runs ^ (runs >> np.uint64(32)))


def similarity(a: UInt64[np.ndarray, "shingles_a"], b: UInt64[np.ndarray, "shingles_b"]) -> float:
    """Jaccard similarity of two sets of shingles: shared over all."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _band_keys(hashes: UInt64[np.ndarray, "shingles"]) -> list[tuple[int, bytes]]:
    """MinHash signature, cut into bands: documents that share a band are worth comparing. Broder 1997; Leskovec,
    Rajaraman and Ullman, Mining of Massive Datasets, 3.4."""
    minima = np.array([(hashes * multiplier).min() for multiplier in _MULTIPLIERS])
    return [(band, values.tobytes()) for band, values in enumerate(minima.reshape(_BANDS, _ROWS))]


class Distinct:
    """Tells the texts that it is shown apart: deterministic, and in memory in proportion to them (8 bytes a word)."""

    def __init__(self):
        self._kept: list[np.ndarray] = []  # shingles
        self._buckets = defaultdict(list)  # band key -> indices of kept texts

    def keep(self, text: str) -> bool:
        """Whether the text is no near duplicate of one kept before it; then it is kept."""
        hashes = shingles(text)
        keys = _band_keys(hashes)
        candidates = {other for key in keys for other in self._buckets.get(key, ())}
        if any(similarity(hashes, self._kept[other]) >= SIMILARITY for other in candidates):
            return False
        for key in keys:
            self._buckets[key].append(len(self._kept))
        self._kept.append(hashes)
        return True


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of that name is held out: a coin that falls the same way whatever other documents there are."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64

"""What general-purpose compressors make of the held-out text: the bar for a language model's bits per byte."""

import gzip
import lzma


def compression_baselines(data: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` on `data`, which must not be empty."""
    compressed = {"gzip": gzip.compress(data, compresslevel=9), "xz": lzma.compress(data, preset=9)}
    return {name: 8 * len(result) / len(data) for name, result in compressed.items()}

"""What the press said, what the arithmetic says: claims about running these models on little hardware.

    python -m llama4_jax.plan --report=deployment

A model's memory is its weights, at so many bits each, and the keys and values of its context in 16 bits: a layer with RoPE
keeps its chunk, a NoPE layer everything (model/cache.py). A token needs every weight that is active for it, and the cache,
from memory once: that bounds the tokens a second of one row, whatever the arithmetic units do.
"""

import dataclasses
import functools

from llama4_jax.named_configs import ParameterCounts, count_parameters, named_config
from llama4_jax.planning.caches import cache_bytes
from llama4_jax.planning.chips import CHIPS
from llama4_jax.planning.report import gb, table

DDR5 = 89.6e9  # bytes/s of two channels of DDR5-5600, a desktop's: JEDEC JESD79-5
PCIE = 32e9  # bytes/s of PCIe 4.0 x16 in one direction, by which weights kept in a host's memory reach a card
RTX4090 = 24e9, 1008e9  # bytes and bytes/s: NVIDIA Ada GPU architecture whitepaper, table 2


@dataclasses.dataclass(frozen=True)
class Need:
    """Attributes:
    weights, cache: bytes.
    token_bytes: that must be read for one token.
    """

    weights: float
    cache: float
    token_bytes: float

    @property
    def total(self) -> float:
        return self.weights + self.cache

    def tokens_a_second(self, bandwidth: float) -> float:
        """At most, of one row."""
        return bandwidth / self.token_bytes


@functools.cache
def counts(name: str) -> ParameterCounts:
    return count_parameters(dataclasses.replace(named_config(name), vision=None))


def need(name: str, bits: float, context: int) -> Need:
    """Of a named configuration's language model with `bits` a weight and one row of `context` tokens."""
    model, count = named_config(name), counts(name)
    cache = cache_bytes(model, 1, context, "bfloat16")
    return Need(count.total * bits / 8, cache, count.active * bits / 8 + cache)


@dataclasses.dataclass(frozen=True)
class Claim:
    """Attributes:
    said: the claim.
    model, bits, context: what it would run.
    bytes, bandwidth: of the memory that it names.
    truth: what would make it true, in words; figures in braces are filled in by `fields`.
    """

    said: str
    model: str
    bits: float
    context: int
    bytes: float
    bandwidth: float
    truth: str

    @property
    def need(self) -> Need:
        return need(self.model, self.bits, self.context)

    @property
    def holds(self) -> bool:
        return self.need.total <= self.bytes

    @property
    def bits_that_fit(self) -> float:
        """A weight's, with this cache, in the memory named."""
        return max(0.0, (self.bytes - self.need.cache) * 8 / counts(self.model).total)

    @property
    def context_that_fits(self) -> int:
        """Tokens of one row, with weights of these bits in the memory named."""
        model = named_config(self.model)
        each = 4 * model.num_kv_heads * model.head_dim  # keys and values of one layer, two bytes a number
        full = sum(not kind.uses_rope for kind in model.layer_kinds) * each
        local = (model.num_layers * each - full) * (model.attention_chunk_size or 0)
        return max(0, int((self.bytes - self.need.weights - local) / full))


def claims() -> list[Claim]:
    """Of Meta's announcement (the first) and of the press of 2026."""
    h100 = CHIPS["h100"]
    one, eight = (h100.hbm_bytes, h100.hbm_bandwidth), (8 * h100.hbm_bytes, 8 * h100.hbm_bandwidth)
    scout, maverick, large, dense = "scout-17b-16e", "maverick-17b-128e", "llama4-405b-a40b", "llama4-70b"
    return [
        Claim("Scout on one 80 GB GPU, 4 bits", scout, 4, 131_072, *one, "true"),
        Claim("Scout on one 80 GB GPU, 16 bits", scout, 16, 8192, *one, "three such GPUs"),
        Claim("Scout in about 40 GB, 4 bits", scout, 4, 8192, 40e9, h100.hbm_bandwidth, "under 3 bits, or experts on the host"),
        Claim(
            "Scout in about 15 GB, 4 bits", scout, 4, 8192, 15e9, RTX4090[1], "the active weights alone; the rest on the host"
        ),
        Claim("Maverick in 40 GB, 4 bits", maverick, 4, 8192, 40e9, h100.hbm_bandwidth, "experts on the host"),
        Claim("405B on one H100, 4 bits", large, 4, 8192, *one, "three such GPUs"),
        Claim("70B for QLoRA on one 24 GB card", dense, 4, 2048, *RTX4090, "a 48 GB card, adapters included"),
        Claim("70B in 4 bits takes 8 GPUs of 80 GB", dense, 4, 8192, *eight, "one is enough"),
        Claim(
            "1-2 tokens a second: Scout in desktop memory",
            scout,
            4,
            8192,
            96e9,
            DDR5,
            "faster; so slow from a disk of 9-17 GB/s",
        ),
        Claim("1-2 tokens a second: 70B over PCIe", dense, 4, 8192, 128e9, PCIE, "true: every weight crosses for each token"),
        Claim("Scout at 400K tokens on one 80 GB GPU", scout, 4, 400_000, *one, "true, with 5 GB left for all else"),
        Claim("Scout at 1M tokens on 8 x 80 GB", scout, 16, 1_048_576, *eight, "true, in 16 bits"),
        Claim("Scout at 10M tokens on 8 x 80 GB", scout, 8, 10_485_760, *eight, "barely, in 8 bits: sixteen in practice"),
        Claim("Scout at 10M tokens on one 80 GB GPU", scout, 4, 10_485_760, *one, "seven such GPUs for the cache alone"),
    ]


def as_text() -> str:
    """The table, with the source arithmetic below it."""
    rows = []
    for claim in claims():
        n = claim.need
        rows.append(
            (
                claim.said,
                f"{gb(n.weights)} + {gb(n.cache)}",
                gb(n.total),
                gb(claim.bytes),
                "yes" if claim.holds else "NO",
                f"{claim.bits_that_fit:.1f}",
                f"{claim.context_that_fits:,}",
                f"{n.tokens_a_second(claim.bandwidth):,.1f}",
                claim.truth,
            )
        )
    header = (
        "said",
        "weights + cache",
        "needs",
        "has",
        "fits",
        "bits that fit",
        "context that fits",
        "tokens/s at most",
        "what is true",
    )
    lines = [table(header, rows), "", "arithmetic:"]
    for name in dict.fromkeys(claim.model for claim in claims()):
        count, long = counts(name), need(name, 4, 1_048_576)
        sizes = ", ".join(f"{bits} bits {gb(count.total * bits / 8)}" for bits in (16, 8, 4, 2))
        lines.append(
            f"  {name}: {count.total / 1e9:.1f}B weights ({sizes}), {count.active / 1e9:.1f}B active; "
            f"cache {gb(need(name, 4, 8192).cache)} at 8K, {gb(long.cache)} at 1M tokens"
        )
    lines.append("weights and cache alone: activations and the runtime's own buffers come on top, a few GB")
    return "\n".join(lines)

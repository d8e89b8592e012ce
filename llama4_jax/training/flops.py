"""Model FLOPs of a training step, the chip's peak, and their quotient: model FLOPs utilisation (MFU)."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llama4_jax.config import ModelConfig, VisionConfig


def active_matmul_parameters(config: ModelConfig) -> int:
    """Weights that one token is multiplied with: the chosen experts only, the output head, but not the token table."""
    D, H, V = config.hidden_size, config.head_dim, config.vocab_size
    attention = 2 * D * config.num_heads * H + 2 * D * config.num_kv_heads * H  # query and output, key and value
    moe = D * config.num_experts + 3 * D * config.expert_ffn_size * (config.experts_per_token + config.shared_expert)
    dense = 3 * D * config.dense_ffn_size
    return D * V + sum(attention + (moe if kind.is_moe else dense) for kind in config.layer_kinds)


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs that one token of a training step needs, forward and backward.

    6 for each active parameter, and 12 * N * H for each layer and visible key, after PaLM (arXiv 2204.02311, appendix B),
    where we count only the keys that the mask lets a token see: (n + 1) / 2 of the row or chunk of n, on average. Rows are
    taken as one document each. Recomputation in the backward pass does not count.
    """

    def visible_keys(uses_rope: bool) -> float:
        chunk = config.attention_chunk_size if uses_rope else None
        return (min(chunk or sequence_length, sequence_length) + 1) / 2

    attention = sum(12 * config.num_heads * config.head_dim * visible_keys(kind.uses_rope) for kind in config.layer_kinds)
    return 6 * active_matmul_parameters(config) + attention


def training_flops_per_tile(vision: VisionConfig, text_size: int) -> float:
    """FLOPs of the vision tower for one image tile of a training step, counted as those of a token: all patches see each other."""
    D, A = vision.hidden_size, vision.adapter_size
    patches = (vision.image_size // vision.patch_size) ** 2
    merged, side = patches * vision.pixel_shuffle_ratio**2, 1 / vision.pixel_shuffle_ratio
    layers = (patches + 1) * vision.num_layers * (4 * D * D + 2 * D * vision.mlp_size)
    embedding = patches * vision.patch_size**2 * vision.num_channels * D
    adapter = merged * (side**2 * D * A + A * A + A * text_size)
    return 6 * (layers + embedding + adapter) + vision.num_layers * 12 * D * (patches + 1) ** 2


# Dense bfloat16 FLOP/s of one JAX device, by jax.Device.device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,  # cloud.google.com/tpu/docs/v4
    "TPU v5 lite": 197e12,  # v5e: cloud.google.com/tpu/docs/v5e
    "TPU v5": 459e12,  # v5p: cloud.google.com/tpu/docs/v5p
    "TPU v6 lite": 918e12,  # v6e, Trillium: cloud.google.com/tpu/docs/v6e
    "TPU7x": 2307e12 / 2,  # Ironwood, two devices a chip: cloud.google.com/tpu/docs/tpu7x
    "NVIDIA A100-SXM4-40GB": 312e12,  # NVIDIA A100 datasheet
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # NVIDIA H100 datasheet, SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,  # NVIDIA H200 datasheet
    "NVIDIA B200": 2250e12,  # NVIDIA DGX B200 datasheet
}


@dataclass
class Peak:
    """Attributes:
    flops: FLOP/s of all devices together.
    source: "table", or how it was measured.
    """

    flops: float
    source: str


def peak_of(devices: list[jax.Device], compute_dtype: str) -> Peak:
    """From the table of chips; a CPU, or a chip that is not in it, is measured by a large matmul (about half a second)."""
    kind = devices[0].device_kind
    if kind in PEAK_FLOPS:
        return Peak(PEAK_FLOPS[kind] * len(devices), "table")
    # Virtual CPU devices share the same cores, so one device's matmul, which uses all of them, is the whole machine's.
    count = 1 if devices[0].platform == "cpu" else len(devices)
    return Peak(_measured_matmul_flops(compute_dtype) * count, f"{compute_dtype} matmul measured on {kind}")


def _measured_matmul_flops(dtype: str, n: int = 1536, repeats: int = 8) -> float:
    x = jnp.ones((n, n), dtype)
    matmul = jax.jit(jnp.matmul).lower(x, x).compile()

    def seconds():
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        return time.perf_counter() - start

    return 2 * n**3 / min(seconds() for _ in range(repeats))

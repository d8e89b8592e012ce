"""Attention over rows that lie in parts on the devices of a mesh axis."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.attention.intervals import Intervals
from pallas_kernels.ring_attention import gpu, reference, tpu, xla

IMPLEMENTATIONS = {
    "reference": reference.ring_attention,
    "xla": xla.ring_attention,
    "tpu": tpu.ring_attention,
    "gpu": gpu.ring_attention,
}
AUTO = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    intervals: Intervals,
    *,
    axis: str,
    zigzag: bool = False,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """Self-attention inside `jax.shard_map`, of rows that lie over the n shards of the mesh axis `axis`.

    Keys and values pass from shard to shard, and each shard merges what its queries find in them (arXiv 2310.01889). The
    backward pass is a ring too, in which float32 gradients of keys and values follow them and come home; it computes the
    logits again and keeps nothing of a hop.

    Args:
        query, key, value: this shard's part of each row. Contiguous: the i-th of n pieces on shard i. Zigzag: of 2n pieces,
            the i-th and then the (2n-1-i)-th, which gives every shard the same work in every hop of a causal mask.
        intervals: of this shard's queries, in places of the whole row. A query without keys gets zeros.
        implementation: "xla" passes with `ppermute` around matmuls, "gpu" around the GPU kernels, "tpu" with remote DMA beside
            the TPU kernels.

    Raises:
        ValueError: N is not a multiple of K, T is odd in a zigzag, or there is no such implementation.
        NotImplementedError: the implementation cannot take these shapes or dtypes; it says why.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"ring_attention: {query.shape[2]} query heads are not a multiple of {key.shape[2]} KV heads")
    if zigzag and query.shape[1] % 2:
        raise ValueError(f"ring_attention: a zigzag's shard has two pieces of one length, not {query.shape[1]} places")
    function = dispatch.choose("ring_attention", IMPLEMENTATIONS, AUTO, implementation)
    return function(query, key, value, intervals, axis=axis, zigzag=zigzag)

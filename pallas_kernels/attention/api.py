"""Grouped-query attention under a lazy mask."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.attention import gpu, reference, tpu, xla
from pallas_kernels.attention.mask import Mask

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention, "tpu": tpu.attention, "gpu": gpu.attention}
AUTO = {"cpu": ("xla",), "gpu": ("gpu", "xla"), "tpu": ("tpu", "xla")}
AUTO_OVER_A_CACHE = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}  # keys in any order


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    implementation: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H) + mask) v, with float32 softmax statistics, in the dtype of the query.

    Query head n reads KV head n // (N / K). A query that may read no key at all gets an unspecified finite value.

    Raises:
        ValueError: N is not a multiple of K, or there is no such implementation.
        NotImplementedError: the implementation cannot take these shapes, dtypes or this mask; it says why.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"attention: {query.shape[2]} query heads are not a multiple of {key.shape[2]} KV heads")
    auto = AUTO if mask.is_self_attention else AUTO_OVER_A_CACHE
    return dispatch.choose("attention", IMPLEMENTATIONS, auto, implementation)(query, key, value, mask)

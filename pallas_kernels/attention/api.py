"""Grouped-query attention under a lazy mask."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.attention import reference, xla
from pallas_kernels.attention.mask import Mask

IMPLEMENTATIONS = {"reference": reference.attention, "xla": xla.attention}
AUTO = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}


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
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"attention: {query.shape[2]} query heads are not a multiple of {key.shape[2]} KV heads")
    return dispatch.choose("attention", IMPLEMENTATIONS, AUTO, implementation)(query, key, value, mask)

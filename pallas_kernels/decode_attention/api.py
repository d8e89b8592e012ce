"""Attention of a row's newest tokens over its cache."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.attention import Mask, Part
from pallas_kernels.decode_attention import reference, tpu, xla
from pallas_kernels.decode_attention.quantized import Quantized

IMPLEMENTATIONS = {"reference": reference.decode_attention, "xla": xla.decode_attention, "tpu": tpu.decode_attention}
AUTO = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("tpu", "xla")}


def decode_attention(
    query: Float[Array, "B T N H"],
    keys: Float[Array, "*L B S K H"] | Quantized,
    values: Float[Array, "*L B S K H"] | Quantized,
    mask: Mask,
    *,
    layer: Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> Part:
    """Attention over the slots of a cache, in the dtype of the query, and its log-sum-exp in float32.

    With the log-sum-exp, shards of a cache can be merged (`attention.merge`). A query that may read no slot gets an unspecified
    finite value and a log-sum-exp of about -1e30. Query head n reads KV head n // (N / K).

    Args:
        mask: with the positions of queries and slots, a negative one of an empty slot, and the chunk if there is one.
        layer: which of several stacked layers' slots to read, so that none of them has to be cut out of the stack; without
            it, keys and values are one layer's.

    Raises:
        ValueError: N is not a multiple of K, the mask says more or less than positions and chunk, or there is no such
            implementation.
        NotImplementedError: the implementation cannot take these shapes or dtypes; it says why.
    """
    if query.shape[2] % keys.shape[-2]:
        raise ValueError(f"decode_attention: {query.shape[2]} query heads are not a multiple of {keys.shape[-2]} KV heads")
    if mask.key_positions is None or mask.query_segment_ids is not None:
        raise ValueError("decode_attention: the mask has positions of queries and slots, and no documents")
    if layer is None:
        keys, values = jax.tree.map(lambda x: x[None], (keys, values))
    return dispatch.choose("decode_attention", IMPLEMENTATIONS, AUTO, implementation)(query, keys, values, mask, layer)

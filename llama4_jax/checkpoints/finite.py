"""Whether all numbers of a tensor are numbers."""

import numpy as np

from llama4_jax.errors import UserError

BLOCK = 2**22  # numbers looked at together: what the check needs beside the tensor

# Unsigned form of a float, and its bits of infinity: above these, without the sign, are NaN and infinity alone.
_INFINITY = {"float32": (np.uint32, 0x7F80_0000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}


def require_finite(tensor: np.ndarray, place: str) -> None:
    """Raises UserError, with the tensor's place, for one that holds NaN or infinity."""
    bits, infinity = _INFINITY[tensor.dtype.name]
    rows = max(1, BLOCK // max(tensor[:1].size, 1))
    for start in range(0, len(tensor), rows):
        block = np.ascontiguousarray(tensor[start : start + rows]).view(bits)
        if block.size and (block << 1 >> 1).max() >= infinity:
            raise UserError(f"{place} holds NaN or infinity; if that is meant, allow it with allow_nonfinite")

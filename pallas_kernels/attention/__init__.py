from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.parts import Part, empty_part, merge, merge_over

__all__ = ["Mask", "Part", "attention", "empty_part", "merge", "merge_over"]

from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.parts import Part, empty_part, merge

__all__ = ["Mask", "Part", "attention", "empty_part", "merge"]

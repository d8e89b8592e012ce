from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.parts import Part, PartGradients, attend_part, empty_part, merge, part_gradients

__all__ = ["Mask", "Part", "PartGradients", "attend_part", "attention", "empty_part", "merge", "part_gradients"]

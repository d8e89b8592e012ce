from pallas_kernels.attention.api import attention
from pallas_kernels.attention.mask import Mask

__all__ = ["Mask", "attention"]

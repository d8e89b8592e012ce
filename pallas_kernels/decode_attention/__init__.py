from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.quantized import Quantized, quantize

__all__ = ["Quantized", "decode_attention", "quantize"]

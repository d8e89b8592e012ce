from pallas_kernels.ring_attention.api import ring_attention

__all__ = ["ring_attention"]

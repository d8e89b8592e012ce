from pallas_kernels.routing.api import permute, route, unpermute
from pallas_kernels.routing.decision import Route

__all__ = ["Route", "permute", "route", "unpermute"]

"""What the backward pass still has of a layer's forward pass, beside its input."""

import flax.linen as nn
import jax

REMAT_POLICIES = {
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of matmuls with dense weights
    "layer": jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(layer: type[nn.Module], remat: str) -> type[nn.Module]:
    """The layer's class under ExecutionConfig.remat."""
    return layer if remat == "none" else nn.remat(layer, policy=REMAT_POLICIES[remat])

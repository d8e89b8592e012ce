"""What a router decides."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Where each token's choices go. Means are over the valid tokens, and zero where there is none.

    Attributes:
        experts: chosen by each token, best first.
        scores: sigmoid of their logits, float32.
        place: of each choice among all of them in the order of their experts, those of one expert in the order of tokens;
            M * X for a token that is not valid.
        group_sizes: choices with a place, of each expert.
        load: share of these on each expert; no gradient.
        probabilities: mean of softmax(logits).
        entropy: mean of its entropy, in nats.
        z_loss: mean of logsumexp(logits)^2.
    """

    experts: Int[Array, "M X"]
    scores: Float[Array, "M X"]
    place: Int[Array, "M X"]
    group_sizes: Int[Array, " E"]
    load: Float[Array, " E"]
    probabilities: Float[Array, " E"]
    entropy: Float[Array, ""]
    z_loss: Float[Array, ""]

"""How the next token is drawn from the logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from llama4_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature first, then top-k, top-p and min-p of what is left, as transformers has them.

    Attributes:
        temperature: of the softmax; 0 takes the likeliest token, whatever the other fields say.
        top_k: keep that many of the likeliest tokens; None: all.
        top_p: keep the likeliest tokens that together first reach this probability. arXiv 1904.09751, section 3.1.
        min_p: drop tokens less likely than this share of the likeliest. arXiv 2407.01082, section 3.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"Sampling.temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"Sampling.top_k must be 1 or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"Sampling.top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"Sampling.min_p must lie in [0, 1], got {self.min_p}")

    def draw(self, logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        """One token a row, each by its own key."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)

    def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits over the temperature, -inf where a token is not to be drawn. Tokens as likely as the last kept one stay."""
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = _keep_from(logits, jax.lax.top_k(logits, self.top_k)[0][:, -1:])
        if self.top_p < 1:
            ranked = jnp.sort(logits, axis=-1, descending=True)
            p = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(p, axis=-1) - p  # probability of the likelier tokens
            logits = _keep_from(logits, jnp.min(jnp.where(before < self.top_p, ranked, jnp.inf), axis=-1, keepdims=True))
        if self.min_p > 0:
            logits = _keep_from(logits, jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p))
        return logits


def _keep_from(logits, least):
    return jnp.where(logits >= least, logits, -jnp.inf)

"""The feed-forward network of routed experts, from tokens to tokens."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.expert_ffn import blocks, ragged, reference

IMPLEMENTATIONS = {
    "reference": reference.expert_ffn,
    "blocks": blocks.expert_ffn,
    "ragged": ragged.expert_ffn,
    "tpu": ragged.expert_ffn_tpu,
    "gpu": ragged.expert_ffn_gpu,
}
AUTO = {"cpu": ("blocks",), "gpu": ("gpu", "ragged"), "tpu": ("tpu", "ragged")}


def expert_ffn(
    x: Float[Array, "M D"],
    experts: Int[Array, "M X"],
    scores: Float[Array, "M X"],
    gate_up: Float[Array, "E 2 D F"],
    down: Float[Array, "E F D"],
    order: tuple[Int[Array, "M X"], Int[Array, " E"]] | None = None,
    *,
    implementation: str = "auto",
) -> Float[Array, "M D"]:
    """sum over x of expert_{e_mx}(s_mx * x_m), with expert_e(z) = (silu(z gate_e) * (z up_e)) down_e. Drops no token.

    Llama 4 scales what an expert reads, not what it writes; the two differ, since SwiGLU is not linear.

    Args:
        x: tokens.
        experts: the experts of each token, all different; E where a choice is empty, which costs and adds nothing.
        scores: the weight of each of them, float32.
        gate_up: of each expert, gate at index 0 and up at index 1.
        down: of each expert.
        order: place and group sizes of these choices where a `routing.Route` has them already. An implementation that takes
            them gives zeros for a token without a place.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: the implementation cannot take these shapes or dtypes; it says why.
    """
    return dispatch.choose("expert_ffn", IMPLEMENTATIONS, AUTO, implementation)(x, experts, scores, gate_up, down, order)

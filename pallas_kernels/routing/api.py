"""Which experts a token goes to, and the way there and back."""

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.routing import reference, rows, rows_tpu, tpu
from pallas_kernels.routing.decision import Route

ROUTE = {"reference": reference.route, "tpu": tpu.route}
AUTO = {"cpu": ("reference",), "gpu": ("reference",), "tpu": ("tpu", "reference")}
PERMUTE = {"reference": reference.permute, "xla": rows.permute, "tpu": rows_tpu.permute}
UNPERMUTE = {"reference": reference.unpermute, "xla": rows.unpermute, "tpu": rows_tpu.unpermute}
AUTO_ROWS = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("tpu", "xla")}


def route(
    logits: Float[Array, "M E"],
    num_choices: int,
    bias: Float[Array, " E"] | None = None,
    valid: Bool[Array, " M"] | None = None,
    *,
    implementation: str = "auto",
) -> Route:
    """Each token's `num_choices` experts with the highest logits, of equal ones the lower index first; their scores, the
    place of every choice in the order of experts, and how the tokens are spread.

    Gradients go to the logits, from the scores and the three differentiable means.

    Args:
        bias: added to the logits for the choice alone.
        valid: tokens that count; the others choose too, but have no place. None: all.

    Raises:
        ValueError: more choices than experts, or there is no such implementation.
        NotImplementedError: the implementation cannot take these shapes; it says why.
    """
    if not 1 <= num_choices <= logits.shape[1]:
        raise ValueError(f"route: {num_choices} choices of {logits.shape[1]} experts")
    return dispatch.choose("route", ROUTE, AUTO, implementation)(logits, num_choices, bias, valid)


def permute(
    x: Float[Array, "M D"], scores: Float[Array, "M X"], place: Int[Array, "M X"], *, implementation: str = "auto"
) -> Float[Array, "M*X D"]:
    """score_mx * x_m at row place_mx, in the dtype of x; zeros where no choice has its place.

    Args:
        place: of a Route; M * X and more for choices that go nowhere.

    Raises:
        ValueError: there is no such implementation.
    """
    return dispatch.choose("permute", PERMUTE, AUTO_ROWS, implementation)(x, scores, place)


def unpermute(rows: Float[Array, "R D"], place: Int[Array, "M X"], *, implementation: str = "auto") -> Float[Array, "M D"]:
    """The sum of each token's rows; arguments and errors as `permute`."""
    return dispatch.choose("unpermute", UNPERMUTE, AUTO_ROWS, implementation)(rows, place)

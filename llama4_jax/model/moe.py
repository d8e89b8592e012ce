"""Mixture of experts: a float32 router, the chosen experts on scaled tokens, and a shared expert on all of them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llama4_jax.config import ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.context import Context
from llama4_jax.model.linear import Linear, expert_ffn, normal, project, swiglu
from llama4_jax.model.transfer import initial_stddev
from llama4_jax.parallel.mesh import current_mesh
from pallas_kernels.routing import Route, route


@struct.dataclass
class RouterStats:
    """How a layer's router spread the tokens (padding aside). In a model's output each has a leading axis of MoE layers.

    Attributes:
        load: share of all choices that fell on each expert, dropped ones included; sums to 1.
        drop_share: of all choices, those beyond their expert's capacity.
        entropy: mean over tokens of the entropy of softmax(logits), in nats.
        load_balance_loss: E * sum_e load_e * mean_m softmax(logits_m)_e; 1 when even. Switch Transformer, arXiv
            2101.03961, equations 4 to 6.
        z_loss: mean over tokens of logsumexp(logits)^2. ST-MoE, arXiv 2202.08906, equation 5.
    """

    load: Float[Array, "*L E"]
    drop_share: Float[Array, "*L"]
    entropy: Float[Array, "*L"]
    load_balance_loss: Float[Array, "*L"]
    z_loss: Float[Array, "*L"]


@struct.dataclass
class Routing:
    """A router's decision; a captured one has a leading axis of blocks. Attributes:
    logits: of every expert, float32.
    experts: the chosen ones, best first; of equal logits the lower index.
    scores: sigmoid of their logits; 0 for a dropped choice, to which its expert answers 0.
    kept: choices that their expert had room for; None without a capacity.
    place, group_sizes: of the choices in the order of experts, see pallas_kernels/routing; of one device's tokens.
    stats: how the tokens are spread.
    """

    logits: Float[Array, "*L M E"]
    experts: Int[Array, "*L M X"]
    scores: Float[Array, "*L M X"]
    kept: Bool[Array, "*L M X"] | None
    place: Int[Array, "*L M X"]
    group_sizes: Int[Array, "*L E"]
    stats: RouterStats


def router_stats(route: Route, kept: Bool[Array, "M X"] | None = None, valid: Bool[Array, " M"] | None = None) -> RouterStats:
    M = len(route.experts)
    weights = jnp.ones(M) if valid is None else valid.astype(jnp.float32)
    dropped = jnp.zeros(M) if kept is None else 1.0 - kept.mean(axis=1)
    return RouterStats(
        load=route.load,
        drop_share=jnp.vdot(weights / jnp.maximum(weights.sum(), 1.0), dropped),
        entropy=route.entropy,
        load_balance_loss=route.load.size * jnp.vdot(route.load, route.probabilities),
        z_loss=route.z_loss,
    )


def within_capacity(
    experts: Int[Array, "M X"], valid: Bool[Array, " M"] | None, num_experts: int, capacity_factor: float
) -> Bool[Array, "M X"]:
    """The choices that their expert has room for: its first ceil(capacity_factor * tokens * X / E), earlier tokens first.

    Tokens are those of the whole batch, row after row and in the order of the row. Padding takes no room and gets none.
    """
    M, X = experts.shape
    valid = jnp.ones(M, bool) if valid is None else valid
    capacity = jnp.ceil(capacity_factor * X * valid.sum() / num_experts)
    taken = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=1) * valid[:, None]  # [M, E]
    place = jnp.take_along_axis(jnp.cumsum(taken, axis=0), experts, axis=1)  # from 1: a token's experts all differ
    return valid[:, None] & (place <= capacity)


def _kept(experts: Int[Array, "M X"], rows: int, num_experts: int, context: Context) -> Bool[Array, "M X"]:
    """`within_capacity` of tokens that may lie in another order than the row's."""
    valid, zigzag = context.valid, context.zigzag
    if zigzag is not None:
        experts = zigzag.restore(experts.reshape(rows, zigzag.length, -1)).reshape(experts.shape)
        valid = zigzag.restore(valid)
    valid = None if valid is None else valid.reshape(-1)
    kept = within_capacity(experts, valid, num_experts, context.capacity_factor)
    return kept if zigzag is None else zigzag.arrange(kept.reshape(rows, zigzag.length, -1)).reshape(kept.shape)


def _routing(execution: ExecutionConfig) -> str:
    """On a mesh rows find their place after their journey (parallel/expert_parallel.py), and what is left of routing is
    plain arithmetic on each token, which the compiler splits: the reference."""
    if current_mesh() is None:
        return execution.routing
    if execution.routing not in ("auto", "reference"):
        raise UserError(f"execution.routing={execution.routing} works on one device; on a mesh use auto")
    return "reference"


class Router(nn.Module):
    """Top-k of the logits, then a sigmoid of each by itself: the scores do not sum to one.

    With `config.router_bias`, the collection `router_bias` holds a bias of each expert that is added to the logits for the
    choice alone: no score, and so no gradient, knows of it. arXiv 2408.15664, equation 3, on the logits, by which Llama 4
    chooses.
    """

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context) -> Routing:
        c, rows = self.config, len(x)
        if jitter := context.router_jitter:
            x = x.astype(jnp.float32)
            noise = jax.random.uniform(self.make_rng("jitter"), x.shape, minval=1 - jitter, maxval=1 + jitter)
            x *= noise if context.zigzag is None else context.zigzag.arrange(noise)
        axes = "embed", "router_experts"
        kernel = self.param("kernel", normal(initial_stddev(c, "readout"), axes), (c.hidden_size, c.num_experts), jnp.float32)
        logits = project(x, kernel, axes, matmul="float32")
        logits = logits.reshape(-1, c.num_experts)  # [M, E]; not sooner: tokens over `context` do not flatten in place
        bias = self.variable("router_bias", "bias", jnp.zeros, (c.num_experts,)).value if c.router_bias else None
        valid = None if context.valid is None else context.valid.reshape(-1)
        chosen = route(logits, c.experts_per_token, bias, valid, implementation=_routing(self.execution))
        kept, scores = None, chosen.scores
        if context.capacity_factor is not None:
            kept = _kept(chosen.experts, rows, c.num_experts, context)
            scores = jnp.where(kept, scores, 0.0)
        stats = router_stats(chosen, kept, valid)
        return Routing(logits, chosen.experts, scores, kept, chosen.place, chosen.group_sizes, stats)


class DenseFFN(nn.Module):
    """(silu(x gate) * (x up)) down. Serves the dense layers and the shared expert."""

    config: ModelConfig
    execution: ExecutionConfig
    size: int  # F

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        c, linear = self.config, partial(Linear, matmul=self.execution.matmul)
        gate_up = linear((c.hidden_size, 2, self.size), ("embed", None, "ffn"), initial_stddev(c, "matrix"), name="gate_up")
        down = linear((self.size, c.hidden_size), ("ffn", "embed"), initial_stddev(c, "residual"), name="down")
        return down(swiglu(gate_up(x)))


class ExpertKernel(nn.Module):
    """One stacked weight of the routed experts."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float

    @nn.compact
    def __call__(self):
        return self.param("kernel", normal(self.stddev, self.axes), self.shape, jnp.float32)


class Experts(nn.Module):
    """The routed experts: gate and up in one weight, down in another, stacked over E."""

    config: ModelConfig
    execution: ExecutionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], routing: Routing) -> Float[Array, "B T D"]:
        c, run = self.config, self.execution
        E, D, F = c.num_experts, c.hidden_size, c.expert_ffn_size
        axes = ("experts", None, "embed", "ffn")
        gate_up = ExpertKernel((E, 2, D, F), axes, initial_stddev(c, "matrix"), name="gate_up")()
        down = ExpertKernel((E, F, D), ("experts", "ffn", "embed"), initial_stddev(c, "residual"), name="down")()
        experts, scores = (a.reshape(*x.shape[:2], -1) for a in (routing.experts, routing.scores))
        order = routing.place, routing.group_sizes
        options = {"implementation": run.expert_ffn, "exchange": run.expert_exchange}
        return expert_ffn(x, experts, scores, gate_up, down, order, **options)


class MoE(nn.Module):
    """Routed experts on score * x, plus the shared expert on x itself."""

    config: ModelConfig
    execution: ExecutionConfig

    def setup(self):
        self.router = Router(self.config, self.execution)
        self.experts = Experts(self.config, self.execution)
        if self.config.shared_expert:
            self.shared_expert = DenseFFN(self.config, self.execution, self.config.expert_ffn_size)

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], RouterStats]:
        routing = self.router(x, context)
        y = self.experts(x, routing)
        if self.config.shared_expert:
            y += self.shared_expert(x)
        return y, routing.stats

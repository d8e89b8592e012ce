"""Llama 4, from tokens to logits."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from llama4_jax.config import ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.cache import Cache
from llama4_jax.model.context import Context, make_context
from llama4_jax.model.decoder import run_layers, scanned_blocks
from llama4_jax.model.embedding import Embedding
from llama4_jax.model.linear import normal, project
from llama4_jax.model.losses import HEAD_AXES, target_log_probs
from llama4_jax.model.moe import RouterStats
from llama4_jax.model.norms import RMSNorm
from llama4_jax.model.transfer import initial_stddev
from llama4_jax.model.vision import Pixels, VisionTower, fuse, patch_places
from llama4_jax.parallel.context_parallel import zigzag_of


@struct.dataclass
class Output:
    """Attributes:
    logits: of the next token, float32; None when targets were given.
    log_probs: of the given targets, float32; None when none were given.
    cache: with these tokens in it; None when none was given.
    router_stats: of each MoE layer in order; None in a model without experts.
    """

    logits: Float[Array, "B T V"] | None
    log_probs: Float[Array, "B T"] | None
    cache: Cache | None
    router_stats: RouterStats | None


class Llama4(nn.Module):
    """A Llama 4: `Llama4(config).apply({"params": params}, tokens) -> Output`.

    A model with `config.router_bias` is applied to `{"params": params} | model_state`, see init_model_state.
    Inner states come out through `capture_intermediates=True`: layers/layer_j holds the outputs of the layer itself and
    of its attention_norm, attention, ffn_norm, feed_forward and feed_forward/router, stacked over the repeated blocks.
    """

    config: ModelConfig
    execution: ExecutionConfig = ExecutionConfig()

    def setup(self):
        c = self.config
        self.embed = Embedding(c)
        if c.vision is not None:
            self.vision = VisionTower(c.vision, c.hidden_size, self.execution)
        self.layers = scanned_blocks(c, self.execution)
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Head(c)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        images: Pixels | None = None,
        cache: Cache | None = None,
        targets: Int[Array, "B T"] | None = None,
        document_window: int | None = None,
        capacity_factor: float | None = None,
        router_jitter: float = 0.0,
        last_logits_only: bool = False,
    ) -> Output:
        """One forward pass.

        Args:
            tokens: ids.
            positions: of each token in its document; None counts from each document's start, or goes on from the cache.
            segment_ids: the document of each token, 0 for padding; None: one document a row. With a cache, a row is one
                document, and 0 marks its padding.
            images: tile slots [B, I, h, w, 3], pixels in [-1, 1] or bytes; a row's patch tokens take its tiles in turn, and
                slots after them are padding. None: a patch token is a token like any other.
            cache: what was read before. The tokens are added to it.
            targets: return their log-probabilities instead of logits.
            document_window: the packer's promise, see `Batch.document_window`.
            capacity_factor: drop what is beyond an expert's capacity; None drops nothing. See moe.within_capacity.
            router_jitter: noise on what the router reads, see ObjectiveConfig; needs `rngs={"jitter": key}`.
            last_logits_only: of each row's last token alone, [B, 1, V]: all that decoding needs of a prompt.

        Raises:
            UserError: the model has a router bias and was given none.
        """
        if images is not None and self.config.vision is None:
            raise UserError("this model has no vision tower, and was given images")
        if self.config.router_bias and "router_bias" not in self.variables and not self.is_initializing():
            raise UserError("this model has a router bias: give it model_state (of TrainState, or init_model_state) too")
        dtype = jnp.dtype(self.execution.compute_dtype)
        places = None if images is None else patch_places(tokens, self.config.vision.patch_token_id)
        in_place = cache is None or (cache.is_empty and cache.full.positions.shape == tokens.shape)  # slots lie as tokens do
        zigzag = zigzag_of(self.execution, *tokens.shape) if in_place else None
        if zigzag is not None:
            if positions is None and segment_ids is None:
                document_window = self.config.attention_chunk_size  # one document a row begins where the row does
            tokens, targets, places = map(zigzag.arrange, (tokens, targets, places))
        context = make_context(self.config, tokens.shape, positions, segment_ids, cache, document_window, zigzag)
        context = context.replace(capacity_factor=capacity_factor, router_jitter=router_jitter)
        x = self.embed(tokens, dtype)
        if images is not None:
            x = fuse(x, self.vision(images), places)
        x = nn.with_logical_constraint(x, ("batch", "seq", "act_embed"))
        x, cache, stats = run_layers(self.layers, x, context, cache)
        x = self.final_norm(last_tokens(x, context) if last_logits_only else x)
        head = self.embed.table().T if self.config.tie_embeddings else self.lm_head()
        if targets is not None:
            log_probs = target_log_probs(x, head.astype(dtype), targets, self.execution.loss_block_size)
            return Output(None, log_probs if zigzag is None else zigzag.restore(log_probs), cache, stats)
        logits = project(x, head, HEAD_AXES).astype(jnp.float32)
        return Output(logits if zigzag is None or last_logits_only else zigzag.restore(logits), None, cache, stats)


def last_tokens(x: Float[Array, "B T D"], context: Context) -> Float[Array, "B 1 D"]:
    """Of each row the last token that is not padding."""
    T, valid, zigzag = x.shape[1], context.valid, context.zigzag
    if valid is None:
        last = jnp.full(len(x), T - 1)
    else:
        valid = valid if zigzag is None else zigzag.restore(valid)
        last = T - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    last = last if zigzag is None else zigzag.places(last)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)


class Head(nn.Module):
    """The untied output projection."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "D V"]:
        c = self.config
        return self.param("kernel", normal(initial_stddev(c, "readout"), HEAD_AXES), (c.hidden_size, c.vocab_size))


@partial(jax.jit, static_argnums=0)
def _init(model: Llama4, key):
    plain = dict.fromkeys(("attention", "routing", "expert_ffn"), "reference")  # two tokens are not for kernels
    model = model.clone(execution=dataclasses.replace(model.execution, **plain))
    vision = model.config.vision
    images = None if vision is None else jnp.zeros((1, 1, vision.image_size, vision.image_size, vision.num_channels))
    return model.init(key, jnp.zeros((1, 2), jnp.int32), images=images)


def init_params(model: Llama4, key: jax.Array) -> dict:
    """Fresh float32 parameters as nested dicts of plain arrays."""
    return nn.unbox(_init(model, key)["params"])


def init_model_state(model: Llama4) -> dict:
    """What a fresh model carries beside its parameters, by collection: zeros as `router_bias`, or nothing."""
    shapes = jax.eval_shape(lambda: _init(model, jax.random.key(0)))
    return {name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[name]) for name in shapes if name != "params"}


def abstract_params(model: Llama4) -> dict:
    """The tree of init_params as ShapeDtypeStructs: any size on any machine."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def logical_axes(model: Llama4) -> dict:
    """The tree of init_params as PartitionSpecs of logical axis names."""
    return nn.get_partition_spec(jax.eval_shape(lambda: _init(model, jax.random.key(0)))["params"])

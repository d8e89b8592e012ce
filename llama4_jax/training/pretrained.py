"""A run that starts from weights rather than from random numbers."""

import dataclasses

import jax

from llama4_jax.checkpoints.huggingface import load_pretrained
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.training.state import TrainState

# Fields of which a set of weights says nothing: how they began, what a row is framed with, and what training adds.
FREE = {
    "initializer_range", "transfer", "router_bias", "max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id",
    "vision",
}  # fmt: skip


def with_pretrained(state: TrainState, model: ModelConfig, source: str) -> TrainState:
    """The state before the first step, with the parameters of a folder or hub name, in float32 and where they belong.

    Raises:
        UserError: the weights cannot be read, or belong to another architecture, named by its fields and both values.
    """
    other, params = load_pretrained(source, dtype="float32")
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in FREE and _matters(f.name, model)]
    differences = [
        f"model.{name} is {getattr(other.config, name)!r} there and {getattr(model, name)!r} here"
        for name in [*names, "layer_kinds"]
        if getattr(other.config, name) != getattr(model, name)
    ]
    if differences:
        raise UserError(f"init_from={source} holds another model: {'; '.join(differences)}")
    return state.replace(params=jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), state.params, params))


def _matters(name: str, model: ModelConfig) -> bool:
    """Sizes of what the model has none of are free too. How layers alternate is said in two ways, and compared as layer_kinds."""
    if name in ("moe_interval", "moe_layers", "nope_interval", "nope_layers"):
        return False
    if name in ("num_experts", "experts_per_token", "expert_ffn_size", "shared_expert"):
        return any(kind.is_moe for kind in model.layer_kinds)
    return name != "dense_ffn_size" or not all(kind.is_moe for kind in model.layer_kinds)

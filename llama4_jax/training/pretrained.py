"""A run that starts from weights rather than from random numbers."""

import dataclasses

import jax

from llama4_jax.checkpoints.load import load_params
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.checkpoints.readers import TextReader
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.training.state import TrainState

# Fields of which a set of weights says nothing: how they began, what a row is framed with, and what training adds.
FREE = {
    "initializer_range", "transfer", "router_bias", "max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id",
}  # fmt: skip


def with_pretrained(state: TrainState, model: ModelConfig, source: str) -> TrainState:
    """The state before the first step, with the parameters of a checkpoint of any format, in float32 and where they belong.

    A text model takes the text part of a multimodal checkpoint.

    Raises:
        UserError: the weights cannot be read, or belong to another architecture, named by its fields and both values.
    """
    with open_checkpoint(source) as reader:
        reader = reader if model.vision is not None else TextReader(reader)
        _require_same_model(reader.config, model, source)
        shardings = jax.tree.map(lambda x: x.sharding, state.params)
        return state.replace(params=load_params(reader, dtype="float32", shardings=shardings, source=source))


def _require_same_model(there: ModelConfig, here: ModelConfig, source: str) -> None:
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in FREE and _matters(f.name, here)]
    differences = [
        f"model.{name} is {getattr(there, name)!r} there and {getattr(here, name)!r} here"
        for name in [*names, "layer_kinds"]
        if getattr(there, name) != getattr(here, name)
    ]
    if differences:
        raise UserError(f"init_from={source} holds another model: {'; '.join(differences)}")


def _matters(name: str, model: ModelConfig) -> bool:
    """Sizes of what the model has none of are free too. How layers alternate is said in two ways, and compared as layer_kinds."""
    if name in ("moe_interval", "moe_layers", "nope_interval", "nope_layers"):
        return False
    if name in ("num_experts", "experts_per_token", "expert_ffn_size", "shared_expert"):
        return any(kind.is_moe for kind in model.layer_kinds)
    return name != "dense_ffn_size" or not all(kind.is_moe for kind in model.layer_kinds)

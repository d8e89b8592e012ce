"""Models small enough to compile in a second, with every feature that can go wrong switched on."""

import dataclasses

import jax
import jax.numpy as jnp

from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling
from llama4_jax.model.llama4 import Llama4, init_params

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    expert_ffn_size=16,
    dense_ffn_size=48,
    moe_interval=2,
    nope_interval=4,
    attention_chunk_size=8,
    temperature=AttentionTemperature(floor=4, scale=0.5),
    rope_scaling=RopeScaling(original_max_position_embeddings=16),
    initializer_range=0.3,
    max_position_embeddings=64,
)


def tiny_model(seed=0, **changes):
    model = Llama4(dataclasses.replace(TINY, **changes))
    return model, init_params(model, jax.random.key(seed))


def tokens(*shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size, jnp.int32)

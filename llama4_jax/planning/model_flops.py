"""FLOPs that a program's tokens need, whatever it spends."""

from llama4_jax.config import Experiment, ModelConfig
from llama4_jax.inference.generator import PREFILL_PIECE
from llama4_jax.training.flops import active_matmul_parameters, training_flops_per_tile, training_flops_per_token


def tokens_of(experiment: Experiment, program: str) -> int:
    """Of one run on all devices: of a step, of a piece of prompts (all of them over `context`), or one of each row."""
    data, whole_rows = experiment.data, experiment.mesh.context != 1
    piece = data.sequence_length if whole_rows else min(data.sequence_length, PREFILL_PIECE)
    return data.batch_size * {"train": data.sequence_length, "prefill": piece, "decode": 1}[program]


def model_flops(experiment: Experiment, program: str) -> float:
    """Of one run on all devices. Inference is the forward pass of the last tokens of a row of `data.sequence_length`."""
    model, data = experiment.model, experiment.data
    tokens = tokens_of(experiment, program)
    if program == "train":
        tiles = data.batch_size * data.image_slots
        vision = tiles * training_flops_per_tile(model.vision, model.hidden_size) if tiles else 0.0
        return tokens * training_flops_per_token(model, data.sequence_length) + vision
    head = model.hidden_size * model.vocab_size
    forward = 2 * (active_matmul_parameters(model) - head) * tokens + 2 * head * data.batch_size  # logits of the last place
    piece = tokens // data.batch_size
    return forward + tokens * sum(
        4 * model.num_heads * model.head_dim * keys for keys in keys_seen(model, data.sequence_length - piece, piece)
    )


def keys_seen(model: ModelConfig, before: int, piece: int) -> list[float]:
    """By layer, the keys that a token sees on average, of `piece` tokens after `before` others."""
    chunk = model.attention_chunk_size
    full = before + (piece + 1) / 2
    local = full if chunk is None else min(full, (chunk + 1) / 2 if piece > 1 else before % chunk + 1)
    return [local if kind.uses_rope else full for kind in model.layer_kinds]

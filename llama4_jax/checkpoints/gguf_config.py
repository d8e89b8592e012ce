"""llama.cpp's two Llama architectures, `llama` (dense) and `llama4`: metadata of a GGUF <-> ModelConfig, and names of tensors.

What llama.cpp fixes in its code for `llama4` and no metadata can change is here too: every fourth layer NoPE, chunks of 8,192,
the temperature, QK norm in all models but those of 128 experts, always a shared expert (src/models/llama4.cpp). So is Llama 3's
stretching of wavelengths, of which a GGUF has only the result, a factor for each rotary pair.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama4_jax.checkpoints.file_tensor import Source
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling
from llama4_jax.errors import UserError
from llama4_jax.model.rotary import inverse_frequencies

ROPE_FACTORS = "rope_freqs.weight"

_NOPE_INTERVAL, _CHUNK, _TEMPERATURE = 4, 8192, AttentionTemperature(floor=8192, scale=0.1)
_NO_QK_NORM = 128  # experts

# Keys that would change the function, with the values that change nothing.
_NEUTRAL = {
    "rope.scaling.factor": 1,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "attention.scale": 0,
    "attention.causal": True,
    "expert_weights_scale": 1,
    "use_parallel_residual": False,
}
_LOW_HIGH = ((1.0, 4.0), (1.0, 1.0))  # low_freq_factor and high_freq_factor of Llama 3.1 and later, and of Llama 4

# The parts of a layer: common names, and GGUF's after `blk.N.`. The experts' gate and up are apart there.
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    **{f"self_attn.{x}_proj.{part}": f"attn_{x}.{part}" for x in "qkv" for part in ("weight", "bias")},
    **{f"self_attn.o_proj.{part}": f"attn_output.{part}" for part in ("weight", "bias")},
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{f"feed_forward.{x}_proj.weight": f"ffn_{x}.weight" for x in ("gate", "up", "down")},
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "feed_forward.experts.down_proj": "ffn_down_exps.weight",
    **{f"feed_forward.shared_expert.{x}_proj.weight": f"ffn_{x}_shexp.weight" for x in ("gate", "up", "down")},
}
GATE_UP = "feed_forward.experts.gate_up_proj"
GATE_UP_PARTS = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


class Metadata:
    """The metadata of a GGUF, read with checks that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], path: Any):
        self.values, self.path = values, path

    def get(self, key: str, default: Any, kind: type) -> Any:
        """A value, which must be of a kind; a float may be an integer. Absent gives the default, which is required when None."""
        value = self.values.get(key, default)
        if value is None:
            self.fail(key, "is missing")
        if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
            self.fail(key, f"must be of type {kind.__name__}, got {str(value)[:60]!r}")
        return value

    def optional(self, key: str, kind: type) -> Any:
        return self.get(key, None, kind) if key in self.values else None

    def fail(self, key: str, problem: str):
        raise UserError(f"{self.path}: {key} {problem}")


# ------------------------------------------------------------------------------------------------------------------------
# Reading


def config_from_gguf(metadata: Metadata, tied: bool, bias: bool, factors: Source | None) -> ModelConfig:
    """The architecture that a GGUF describes.

    Args:
        metadata: of the file.
        tied: the file has no head of its own.
        bias: its attention has biases.
        factors: what wavelengths are multiplied by, if anything.

    Raises:
        UserError: another architecture, or a value that is missing, invalid or not supported, naming file and key.
    """
    arch = metadata.get("general.architecture", None, str)
    if arch not in ("llama", "llama4"):
        metadata.fail("general.architecture", f"is {arch!r}, but only llama and llama4 can be read")

    def get(key, default=None, kind=int):
        return metadata.get(f"{arch}.{key}", default, kind)

    for key, value in _NEUTRAL.items():
        if get(key, value, type(value) if isinstance(value, bool) else float) != value:
            metadata.fail(f"{arch}.{key}", f"is {get(key, value, object)!r}, but only {value!r} is supported")
    if (scaling := get("rope.scaling.type", "none", str)) not in ("none", "linear"):  # linear, by a factor of 1
        metadata.fail(
            f"{arch}.rope.scaling.type", f"is {scaling!r}, but only Llama 3's scaling, as {ROPE_FACTORS}, is supported"
        )
    heads, width = get("attention.head_count"), get("embedding_length")
    if heads <= 0:
        metadata.fail(f"{arch}.attention.head_count", f"must be positive, got {heads}")
    head_dim = get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            metadata.fail(f"{arch}.{key}", f"is {get(key)}, but only the head size {head_dim} is supported")
    theta = get("rope.freq_base", 10_000.0, float)
    try:
        return ModelConfig(
            vocab_size=get("vocab_size", len(metadata.get("tokenizer.ggml.tokens", [], list))),
            hidden_size=width,
            num_layers=get("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            dense_ffn_size=get("feed_forward_length"),
            rope_theta=theta,
            rope_scaling=None if factors is None else _read_scaling(metadata, arch, theta, head_dim, factors),
            norm_eps=get("attention.layer_norm_rms_epsilon", kind=float),
            attention_bias=bias,
            tie_embeddings=tied,
            max_position_embeddings=get("context_length"),
            **_read_special_ids(metadata),
            **(_read_dense if arch == "llama" else _read_llama4)(metadata, get),
        )
    except UserError as error:  # of the dataclass: it cannot know the file
        raise error if str(error).startswith(str(metadata.path)) else UserError(f"{metadata.path}: {error}") from None


def _read_dense(metadata: Metadata, get) -> dict[str, Any]:
    if experts := get("expert_count", 0):
        metadata.fail("llama.expert_count", f"is {experts}: only llama4's experts can be read, not those of Mixtral")
    return {"moe_interval": 0, "nope_interval": 0, "attention_chunk_size": None, "qk_norm": False, "temperature": None}


def _read_llama4(metadata: Metadata, get) -> dict[str, Any]:
    for key, value in (("attention.sliding_window", _CHUNK), ("attention.sliding_window_pattern", _NOPE_INTERVAL)):
        if get(key, value) != value:
            metadata.fail(f"llama4.{key}", f"is {get(key)}, but llama.cpp runs Llama 4 with {value} only")
    experts = get("expert_count")
    if get("interleave_moe_layer_step") < 1:
        metadata.fail("llama4.interleave_moe_layer_step", f"must be 1 or more, got {get('interleave_moe_layer_step')}")
    return {
        "num_experts": experts,
        "experts_per_token": get("expert_used_count"),
        "expert_ffn_size": get("expert_feed_forward_length"),
        "moe_interval": get("interleave_moe_layer_step"),
        "nope_interval": _NOPE_INTERVAL,
        "attention_chunk_size": _CHUNK,
        "qk_norm": experts != _NO_QK_NORM,
        "temperature": _TEMPERATURE,
    }


def _read_special_ids(metadata: Metadata) -> dict[str, Any]:
    def ids(*names):
        found = [metadata.optional(f"tokenizer.ggml.{name}_token_id", int) for name in names]
        return [token for token in dict.fromkeys(found) if token is not None]

    end = ids("eos", "eom", "eot")
    return {
        "bos_token_id": next(iter(ids("bos")), None),
        "eos_token_ids": (*end[:1], *sorted(end[1:])),
        "pad_token_id": next(iter(ids("padding")), None),
    }


def _read_scaling(metadata: Metadata, arch: str, theta: float, head_dim: int, stored: Source) -> RopeScaling | None:
    """The scaling that gives these factors. Theirs is all that a GGUF has of it, so the known ones are tried."""
    if stored.shape != (head_dim // 2,):
        metadata.fail(ROPE_FACTORS, f"has shape {stored.shape}, but the head size makes it {(head_dim // 2,)}")
    factors = stored.read().astype(np.float32)
    if (factors == 1).all():
        return None
    low_high = [tuple(metadata.optional(f"{arch}.rope.scaling.{which}_freq_factor", float) for which in ("low", "high"))]
    length = metadata.get(f"{arch}.rope.scaling.original_context_length", 8192, int)
    for low, high in low_high if None not in low_high[0] else _LOW_HIGH:
        if 1 <= factors.max() < math.inf and 0 < low <= high and length > 0:
            scaling = RopeScaling(round(float(factors.max()), 4), low, high, length)
            if np.allclose(rope_factors(scaling, theta, head_dim), factors, rtol=1e-4):
                return scaling
    metadata.fail(ROPE_FACTORS, "holds factors that no known scaling of Llama 3 or 4 gives")


def rope_factors(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What the wavelengths of the rotary pairs are multiplied by, [H / 2] float32: 1 for short ones, `factor` for long ones."""
    return inverse_frequencies(head_dim, theta, None) / inverse_frequencies(head_dim, theta, scaling)


# ------------------------------------------------------------------------------------------------------------------------
# Writing


def config_to_gguf(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a model, its tokens excepted: `llama4` for a model with experts, otherwise `llama`.

    Raises:
        UserError: llama.cpp cannot run this model; the message names the field.
    """
    moe = any(kind.is_moe for kind in config.layer_kinds)
    arch, fields = ("llama4", _write_llama4(config)) if moe else ("llama", _write_dense(config))
    if config.vision is not None:
        _refuse("vision", "set", "keeps the vision tower in a file of another kind; write the text model alone")
    fields |= {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.dense_ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if (scaling := config.rope_scaling) is not None:
        fields |= {  # llama.cpp takes the factors; these are for whoever wants to know where they came from
            "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
            "rope.scaling.low_freq_factor": float(scaling.low_freq_factor),
            "rope.scaling.high_freq_factor": float(scaling.high_freq_factor),
        }
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in fields.items()}}


def _refuse(field: str, value: Any, instead: str):
    raise UserError(f"ModelConfig.{field}={value} cannot be written as GGUF: llama.cpp {instead}")


def _write_dense(config: ModelConfig) -> dict[str, Any]:
    if not all(kind.uses_rope for kind in config.layer_kinds):
        _refuse("nope_interval", config.nope_interval, "runs a model without experts with rotary positions in every layer")
    if config.attention_chunk_size is not None:
        _refuse("attention_chunk_size", config.attention_chunk_size, "runs a model without experts without chunks (None)")
    if config.qk_norm:
        _refuse("qk_norm", True, "runs a model without experts without it")
    return {}


def _write_llama4(config: ModelConfig) -> dict[str, Any]:
    moe = [kind.is_moe for kind in config.layer_kinds]
    interval = moe.index(True) + 1
    if moe != [(layer + 1) % interval == 0 for layer in range(config.num_layers)]:
        layers = tuple(layer for layer, is_moe in enumerate(moe) if is_moe)
        _refuse("moe_layers", layers, "has experts in every n-th layer, the n-th first")
    if any(kind.uses_rope != bool((layer + 1) % _NOPE_INTERVAL) for layer, kind in enumerate(config.layer_kinds)):
        _refuse("nope_interval", config.nope_interval, f"makes every {_NOPE_INTERVAL}th layer of a Llama 4 NoPE")
    required = {
        "attention_chunk_size": (_CHUNK, f"runs Llama 4 with chunks of {_CHUNK}"),
        "temperature": (_TEMPERATURE, f"runs Llama 4 with {_TEMPERATURE}"),
        "qk_norm": (config.num_experts != _NO_QK_NORM, f"normalises queries and keys unless there are {_NO_QK_NORM} experts"),
        "shared_expert": (True, "gives every Llama 4 a shared expert"),
        "router_bias": (False, "has no bias in Llama 4's router"),
        "attention_bias": (False, "has no bias in Llama 4's attention"),
    }
    for field, (value, instead) in required.items():
        if getattr(config, field) != value:
            _refuse(field, getattr(config, field), instead)
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": config.expert_ffn_size,
        "interleave_moe_layer_step": interval,
    }

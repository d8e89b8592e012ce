"""Meta's params.json -> ModelConfig.

Read as Meta's own code reads it: an absent key means what llama-models' ModelArgs takes for it. Widths that the file gives by
formulas (of the FFNs) or leaves open (the vocabulary) are those of the tensors.
"""

from collections.abc import Mapping
from typing import Any

from llama4_jax.checkpoints.keys import Keys
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError

SPECIAL_TOKENS = 200_019  # a vocabulary of fewer has none of Llama 4's


def config_from_meta(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: str) -> ModelConfig:
    """The architecture of consolidated files.

    Args:
        params: the parsed params.json.
        shapes: of the whole tensors, by their names in the common form.
        source: how messages name the file.

    Raises:
        UserError: a value is missing, invalid or not supported.
    """
    keys = Keys(params.get("model", params), f"{source}: ")
    for key in ("quantization_args", "lora_args"):
        if keys.has(key):
            keys.fail(key, "is set, but only plain weights can be read")
    for key in ("dim", "n_layers", "n_heads"):
        if not keys.has(key):
            keys.fail(key, "is missing")
    dim, heads = keys.get("dim", None, int), keys.get("n_heads", None, int)
    vocab_size = _size(shapes, "embed_tokens.weight", 0)
    moe = keys.sub("moe_args")
    temperature, rope = keys.get("attn_temperature_tuning", False, bool), keys.get("use_scaled_rope", False, bool)
    try:
        return ModelConfig(
            vocab_size=vocab_size,
            hidden_size=dim,
            num_layers=keys.layers("n_layers", None),
            num_heads=heads,
            num_kv_heads=keys.get("n_kv_heads", heads, int),
            head_dim=dim // max(heads, 1),
            num_experts=moe.get("num_experts", 0, int),
            experts_per_token=moe.get("top_k", 1, int),
            expert_ffn_size=_size(shapes, "experts.down_proj", 1),
            dense_ffn_size=_size(shapes, "feed_forward.down_proj.weight", 1),
            moe_interval=moe.get("interleave_moe_layer_step", 1, int) if keys.has("moe_args") else 0,
            nope_interval=keys.get("nope_layer_interval", 0, int),
            attention_chunk_size=keys.get("attention_chunk_size", None, int),
            qk_norm=keys.get("use_qk_norm", False, bool),
            temperature=_temperature(keys) if temperature else None,
            rope_theta=keys.get("rope_theta", 500_000.0, float),
            rope_scaling=_scaling(keys) if rope else None,
            norm_eps=keys.get("norm_eps", 1e-5, float),
            **({} if vocab_size >= SPECIAL_TOKENS else {"bos_token_id": None, "eos_token_ids": (), "pad_token_id": None}),
            vision=_vision(keys.sub("vision_args")) if keys.has("vision_args") else None,
        )
    except UserError as error:  # of the dataclass: it cannot know the file
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None


def _size(shapes: Mapping[str, tuple[int, ...]], ending: str, axis: int) -> int:
    """Of the first tensor with that ending; 1 where the model has none, and none asks for it."""
    return next((shape[axis] for name, shape in shapes.items() if name.endswith(ending) and axis < len(shape)), 1)


def _temperature(keys: Keys) -> AttentionTemperature:
    return AttentionTemperature(floor=keys.get("floor_scale", 8192.0, float), scale=keys.get("attn_scale", 0.1, float))


def _scaling(keys: Keys) -> RopeScaling:
    return RopeScaling(
        factor=keys.get("rope_scaling_factor", 16.0, float),
        low_freq_factor=1.0,
        high_freq_factor=keys.get("rope_high_freq_factor", 1.0, float),
        original_max_position_embeddings=8192,
    )


def _vision(keys: Keys) -> VisionConfig:
    def side(key: str) -> int:
        sides = keys.sub(key)
        height, width = (sides.get(name, None, int) for name in ("height", "width"))
        if height is None or height != width:
            keys.fail(key, f"must be a square of pixels, got {keys.values.get(key)!r}")
        return height

    for key in ("dim", "n_layers", "n_heads", "mlp_ratio", "output_dim", "pixel_shuffle_ratio"):
        if not keys.has(key):
            keys.fail(key, "is missing")
    ratio = keys.get("pixel_shuffle_ratio", None, float)
    if not 0.01 <= ratio <= 1:
        keys.fail("pixel_shuffle_ratio", f"must be between 0.01 and 1, got {ratio}")
    return VisionConfig(
        hidden_size=keys.get("dim", None, int),
        num_layers=keys.layers("n_layers", None),
        num_heads=keys.get("n_heads", None, int),
        mlp_size=int(keys.get("mlp_ratio", None, float) * keys.get("dim", None, int)),
        image_size=side("image_size"),
        patch_size=side("patch_size"),
        pixel_shuffle_ratio=ratio,
        adapter_size=keys.get("output_dim", None, int),
    )

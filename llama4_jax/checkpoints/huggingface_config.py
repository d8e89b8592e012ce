"""config.json of a Hugging Face checkpoint <-> ModelConfig.

Two forms of the same fields are in circulation and both are read: the published one (`rope_theta` beside `rope_scaling`,
`no_rope_layers: []`, `attn_temperature_tuning: 4`) and that of transformers 5 (`rope_parameters`, `layer_types`, explicit
lists), each either as a text model (`llama4_text`) or as the `text_config` of a multimodal one (`llama4`). A plain dense
Llama (`llama`) is read too. Written is the transformers 5 form.

An absent key means what transformers 5 takes for it, because that is the model which such a file stands for. For the vision
tower those defaults are not Llama 4's and contradict each other, so a vision_config that leaves them out is refused by
the check of widths rather than read as a wrong model. Keys that do not change the function (`use_cache`,
`router_aux_loss_coef`, `router_jitter_noise`, `initializer_range` of the tower, ...) are not read.
"""

from collections.abc import Mapping
from typing import Any

from llama4_jax.checkpoints.keys import Keys
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError

# Keys that would change the function, with the only values that Llama 4 defines. Absent means the value here.
_FIXED_TEXT = {"hidden_act": "silu", "attention_dropout": 0, "mlp_bias": False}
_FIXED_VISION = {
    "hidden_act": "gelu",
    "norm_eps": 1e-5,  # the reference ignores this key and always uses 1e-5
    "vision_feature_select_strategy": "default",
    "multi_modal_projector_bias": False,
    "attention_dropout": 0,
    "projector_dropout": 0,
}
_IMAGE_TOKENS = {
    "patch_token_id": "image_token_index",
    "image_start_token_id": "boi_token_index",
    "image_end_token_id": "eoi_token_index",
}


# ------------------------------------------------------------------------------------------------------------------------
# Reading


def config_from_hf(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The architecture that a parsed config.json describes.

    Lists of layers that follow "every n-th layer" become that interval (0 where the list is empty), so that both forms of
    one model give equal configurations. `layer_types` that give every RoPE layer full attention mean no chunk.

    Args:
        raw: the parsed file.
        source: how error messages name the file.

    Raises:
        UserError: an unknown model_type, or a value that is invalid, contradictory or not supported, naming file and key.
    """
    keys = Keys(raw, f"{source}: ")
    if keys.has("quantization_config"):
        keys.fail("quantization_config", "is set, but quantised checkpoints cannot be read")
    readers = {"llama4": _read_multimodal, "llama4_text": _read_llama4_text, "llama": _read_dense_llama}
    model_type = keys.get("model_type", None, str)
    if model_type not in readers:
        keys.fail("model_type", f"is {model_type!r}, but only {', '.join(readers)} can be read")
    try:
        return ModelConfig(**readers[model_type](keys))
    except UserError as error:  # of the dataclass: it cannot know the file
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None


def _read_multimodal(keys: Keys) -> dict[str, Any]:
    if keys.get("tie_word_embeddings", False, bool) and not keys.sub("text_config").get("tie_word_embeddings", False, bool):
        keys.fail("tie_word_embeddings", "is true, but text_config.tie_word_embeddings is not")
    fields = _read_llama4_text(keys.sub("text_config"))
    if not keys.has("vision_config"):
        return fields
    tokens = {field: token for field, key in _IMAGE_TOKENS.items() if (token := keys.get(key, None, int)) is not None}
    return fields | {"vision": VisionConfig(**_read_vision(keys.sub("vision_config")), **tokens)}


def _read_llama4_text(keys: Keys) -> dict[str, Any]:
    keys.expect(_FIXED_TEXT)
    layers = keys.layers("num_hidden_layers", 48)
    rope, scaling = _read_rope(keys, default_theta=500_000.0)
    nope_layers, full_attention = _read_attention_pattern(keys, layers)
    moe_layers = _read_moe_layers(keys, layers)
    return {
        **_read_sizes(keys, vocab_size=202_048, hidden_size=5120, num_layers=48, num_heads=40, max_position=131_072, eps=1e-5),
        "num_kv_heads": keys.get("num_key_value_heads", 8, int),
        "head_dim": keys.get("head_dim", 128, int),
        "num_experts": keys.get("num_local_experts", 16, int),
        "experts_per_token": keys.get("num_experts_per_tok", 1, int),
        "expert_ffn_size": keys.get("intermediate_size", 8192, int),
        "dense_ffn_size": keys.get("intermediate_size_mlp", 16_384, int),
        **_interval_or_list("moe", moe_layers, layers),
        **_interval_or_list("nope", nope_layers, layers),
        "attention_chunk_size": None if full_attention else _read_chunk(keys),
        "qk_norm": keys.get("use_qk_norm", True, bool),
        "temperature": _read_temperature(keys),
        "rope_theta": rope,
        "rope_scaling": scaling,
    }


def _read_dense_llama(keys: Keys) -> dict[str, Any]:
    keys.expect(_FIXED_TEXT)
    sizes = _read_sizes(keys, vocab_size=32_000, hidden_size=4096, num_layers=32, num_heads=32, max_position=2048, eps=1e-6)
    rope, scaling = _read_rope(keys, default_theta=10_000.0)
    return {
        **sizes,
        "num_kv_heads": keys.get("num_key_value_heads", sizes["num_heads"], int),
        "head_dim": keys.get("head_dim", sizes["hidden_size"] // max(sizes["num_heads"], 1), int),
        "dense_ffn_size": keys.get("intermediate_size", 11_008, int),
        "moe_interval": 0,
        "nope_interval": 0,
        "attention_chunk_size": None,
        "qk_norm": False,
        "temperature": None,
        "rope_theta": rope,
        "rope_scaling": scaling,
    }


def _read_sizes(
    keys: Keys, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_position: int, eps: float
) -> dict[str, Any]:
    """What every text model has, under transformers' defaults of its family."""
    eos = keys.values.get("eos_token_id", 2)
    eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(isinstance(token, int) for token in eos):
        keys.fail("eos_token_id", f"must be an integer or a list of integers, got {keys.values['eos_token_id']!r}")
    return {
        "vocab_size": keys.get("vocab_size", vocab_size, int),
        "hidden_size": keys.get("hidden_size", hidden_size, int),
        "num_layers": keys.layers("num_hidden_layers", num_layers),
        "num_heads": keys.get("num_attention_heads", num_heads, int),
        "norm_eps": keys.get("rms_norm_eps", eps, float),
        "attention_bias": keys.get("attention_bias", False, bool),
        "tie_embeddings": keys.get("tie_word_embeddings", False, bool),
        "initializer_range": keys.get("initializer_range", 0.02, float),
        "max_position_embeddings": keys.get("max_position_embeddings", max_position, int),
        # A null id means that there is none; only an absent key takes the default.
        "bos_token_id": keys.get("bos_token_id", None if "bos_token_id" in keys.values else 1, int),
        "eos_token_ids": eos,
        "pad_token_id": keys.get("pad_token_id", None, int),
    }


def _read_rope(keys: Keys, default_theta: float) -> tuple[float, RopeScaling | None]:
    """theta and scaling from either form: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    name = "rope_parameters" if keys.has("rope_parameters") else "rope_scaling"
    rope = keys.sub(name)
    theta = rope.get("rope_theta", keys.get("rope_theta", default_theta, float), float)
    rope.expect({"partial_rotary_factor": 1.0})
    kind = rope.get("rope_type", rope.get("type", "default", str), str)
    if kind == "default":
        return theta, None
    if kind != "llama3":
        rope.fail("rope_type", f"is {kind!r}, but only default and llama3 are supported")
    numbers = {key: float for key in ("factor", "low_freq_factor", "high_freq_factor")} | {
        "original_max_position_embeddings": int
    }
    for key in numbers:
        if not rope.has(key):
            rope.fail(key, "is missing: llama3 scaling needs it")
    return theta, RopeScaling(**{key: rope.get(key, None, number) for key, number in numbers.items()})


def _read_temperature(keys: Keys) -> AttentionTemperature | None:
    tuning = keys.values.get("attn_temperature_tuning", True)
    if tuning not in (None, False, True, 4):  # transformers 4.51 wrote the integer 4 for true
        keys.fail("attn_temperature_tuning", f"must be true or false, got {tuning!r}")
    if not tuning:
        return None
    return AttentionTemperature(floor=keys.get("floor_scale", 8192, float), scale=keys.get("attn_scale", 0.1, float))


def _read_chunk(keys: Keys) -> int | None:
    if "attention_chunk_size" in keys.values and keys.values["attention_chunk_size"] is None:
        return None  # Llama Guard 4: local layers attend to the whole past
    return keys.get("attention_chunk_size", 8192, int)


def _read_moe_layers(keys: Keys, num_layers: int) -> tuple[int, ...]:
    step = keys.get("interleave_moe_layer_step", 1, int)
    if step < 1:
        keys.fail("interleave_moe_layer_step", f"must be 1 or more, got {step}; for no experts set moe_layers to []")
    layers = keys.get("moe_layers", list(range(step - 1, num_layers, step)), list)
    if not all(isinstance(layer, int) and 0 <= layer < num_layers for layer in layers):
        keys.fail("moe_layers", f"must hold layers from 0 to {num_layers - 1}, got {layers}")
    return tuple(sorted(set(layers)))


def _read_attention_pattern(keys: Keys, num_layers: int) -> tuple[tuple[int, ...], bool]:
    """The NoPE layers, and whether `layer_types` lifts the chunk from all others.

    Despite its name `no_rope_layers` holds 1 where a layer uses RoPE. An empty list means the default pattern.
    """
    interval = keys.get("no_rope_layer_interval", 4, int)
    if interval < 1:
        keys.fail("no_rope_layer_interval", f"must be 1 or more, got {interval}; for RoPE in every layer list no_rope_layers")
    default = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    uses_rope = keys.get("no_rope_layers", [], list) or default
    if len(uses_rope) < num_layers or any(entry not in (0, 1) for entry in uses_rope):
        keys.fail("no_rope_layers", f"must hold 0 or 1 for each of {num_layers} layers, got {uses_rope}")
    uses_rope = uses_rope[:num_layers]
    nope_layers = tuple(layer for layer, entry in enumerate(uses_rope) if not entry)

    expected = ["chunked_attention" if entry else "full_attention" for entry in uses_rope]
    types = keys.get("layer_types", expected, list)[:num_layers]
    if types == expected:
        return nope_layers, False
    if types == ["full_attention"] * num_layers:
        return nope_layers, True
    wrong = next((i for i, (a, b) in enumerate(zip(types, expected, strict=False)) if a != b), len(types))
    found = repr(types[wrong]) if wrong < len(types) else "missing"
    keys.fail("layer_types", f"entry {wrong} is {found}, but no_rope_layers makes it {expected[wrong]!r}")


def _interval_or_list(name: str, layers: tuple[int, ...], num_layers: int) -> dict[str, Any]:
    """`<name>_interval` where the layers are every n-th one, otherwise `<name>_layers`."""
    interval = layers[0] + 1 if layers else 0
    if not layers or layers == tuple(range(interval - 1, num_layers, interval)):
        return {f"{name}_interval": interval}
    return {f"{name}_layers": layers}


def _read_vision(keys: Keys) -> dict[str, Any]:
    keys.expect(_FIXED_VISION)
    width = keys.get("hidden_size", 768, int)
    mlp = keys.get("intermediate_size", 5632, int)
    ratio = keys.get("pixel_shuffle_ratio", 0.5, float)
    if not 0.01 <= ratio <= 1:
        keys.fail("pixel_shuffle_ratio", f"must be between 0.01 and 1, got {ratio}")
    if mlp != round(width / ratio**2):
        # transformers takes intermediate_size for the width after the pixel shuffle as well.
        keys.fail(
            "intermediate_size",
            f"is {mlp}, but hidden_size={width} and pixel_shuffle_ratio={ratio} make it {round(width / ratio**2)}",
        )
    adapter = {
        "vision_output_dim": keys.get("vision_output_dim", 7680, int),
        "projector_input_dim": keys.get("projector_input_dim", 4096, int),
        "projector_output_dim": keys.get("projector_output_dim", 4096, int),
    }
    if len(set(adapter.values())) > 1:
        keys.fail("vision_output_dim", f"must equal the projector's widths, got {adapter}")
    rope, scaling = _read_rope(keys, default_theta=10_000.0)
    if scaling is not None:
        keys.fail("rope_parameters", "must have rope_type 'default' in the vision tower")
    return {
        "hidden_size": width,
        "num_layers": keys.layers("num_hidden_layers", 34),
        "num_heads": keys.get("num_attention_heads", 16, int),
        "mlp_size": mlp,
        "image_size": _square(keys, "image_size", 448),
        "patch_size": _square(keys, "patch_size", 14),
        "num_channels": keys.get("num_channels", 3, int),
        "pixel_shuffle_ratio": ratio,
        "adapter_size": adapter["vision_output_dim"],
        "rope_theta": rope,
    }


def _square(keys: Keys, key: str, default: int) -> int:
    value = keys.values.get(key)
    if isinstance(value, list) and len(set(value)) == 1:
        keys = Keys({key: value[0]}, keys.where)
    return keys.get(key, default, int)


# ------------------------------------------------------------------------------------------------------------------------
# Writing


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, in the form of transformers 5: `llama4`, or `llama4_text` without a vision tower.

    config_from_hf gives the same model back. A model without an attention chunk is written with full attention in every
    layer, as transformers cannot run a null chunk.

    Raises:
        UserError: the configuration has something that transformers' Llama 4 has not; the message names the field.
    """
    text = _write_text(config)
    if config.vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": _write_vision(config.vision),
        "tie_word_embeddings": config.tie_embeddings,
        **{key: getattr(config.vision, field) for field, key in _IMAGE_TOKENS.items()},
    }


def _refuse(field: str, value: Any, instead: str) -> None:
    raise UserError(f"ModelConfig.{field}={value!r} cannot be written for transformers, whose Llama 4 {instead}")


def _write_text(config: ModelConfig) -> dict[str, Any]:
    kinds = config.layer_kinds
    if not config.shared_expert and any(kind.is_moe for kind in kinds):
        _refuse("shared_expert", False, "always has a shared expert")
    if config.router_bias:
        _refuse("router_bias", True, "has no bias in its router")
    temperature = config.temperature or AttentionTemperature()
    if temperature.floor != int(temperature.floor):
        _refuse("temperature.floor", temperature.floor, "takes an integer floor_scale")
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    chunked = config.attention_chunk_size is not None
    return {
        "model_type": "llama4_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_ffn_size,
        "intermediate_size_mlp": config.dense_ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "interleave_moe_layer_step": config.moe_interval or 1,
        "moe_layers": [layer for layer, kind in enumerate(kinds) if kind.is_moe],
        "no_rope_layers": [int(kind.uses_rope) for kind in kinds],
        "no_rope_layer_interval": config.nope_interval or config.num_layers + 1,
        "layer_types": ["chunked_attention" if chunked and kind.uses_rope else "full_attention" for kind in kinds],
        # Without chunks no layer reads the size, but transformers refuses to run with null.
        "attention_chunk_size": config.attention_chunk_size if chunked else config.max_position_embeddings,
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.temperature is not None,
        "floor_scale": int(temperature.floor),
        "attn_scale": temperature.scale,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }


def _write_vision(vision: VisionConfig) -> dict[str, Any]:
    if vision.mlp_size != round(vision.hidden_size / vision.pixel_shuffle_ratio**2):
        _refuse("vision.mlp_size", vision.mlp_size, "takes it for the width after the pixel shuffle as well")
    if vision.norm_eps != 1e-5:
        _refuse("vision.norm_eps", vision.norm_eps, "always uses 1e-5")
    return {
        "model_type": "llama4_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.mlp_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": vision.num_channels,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
        "vision_output_dim": vision.adapter_size,
        "projector_input_dim": vision.adapter_size,
        "projector_output_dim": vision.adapter_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": vision.rope_theta},
        "hidden_act": "gelu",
        "norm_eps": vision.norm_eps,
    }

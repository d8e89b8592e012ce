import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.checkpoints.huggingface_config import config_from_hf, config_to_hf
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.named_configs import list_named_configs, named_config

# The published form of Scout (pre-trained), as Hugging Face's config.json has it.
SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "boi_token_index": 200080,
    "eoi_token_index": 200081,
    "image_token_index": 200092,
    "model_type": "llama4",
    "text_config": {
        "attention_bias": False,
        "attention_chunk_size": 8192,
        "attention_dropout": 0.0,
        "bos_token_id": 200000,
        "eos_token_id": 200001,
        "pad_token_id": 200018,
        "for_llm_compressor": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "interleave_moe_layer_step": 1,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "max_position_embeddings": 262144,
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_attention_heads": 40,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 1.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_qk_norm": True,
        "vocab_size": 202048,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": 1408,
        "image_size": 336,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "pixel_shuffle_ratio": 0.5,
        "projector_dropout": 0.0,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "rope_theta": 10000,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": 4096,
    },
}
TEXT = {"model_type": "llama4_text", "num_hidden_layers": 8}


def text(**keys):
    return config_from_hf(TEXT | keys)


def test_the_published_scout_is_the_named_configuration():
    assert config_from_hf(SCOUT) == named_config("scout-17b-16e")


def test_absent_keys_mean_transformers_defaults():
    assert config_from_hf({"model_type": "llama4_text"}) == ModelConfig(
        max_position_embeddings=131_072, bos_token_id=1, eos_token_ids=(2,), pad_token_id=None
    )


def test_both_forms_of_rope_mean_the_same():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    wanted = text(rope_theta=1e4, rope_scaling=scaling)
    assert (wanted.rope_theta, wanted.rope_scaling) == (1e4, RopeScaling(8.0, 1.0, 4.0, 8192))
    assert text(rope_parameters=scaling | {"rope_theta": 1e4}) == wanted
    old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    assert text(rope_theta=1e4, rope_scaling=old) == wanted
    assert text(rope_theta=1e4, rope_scaling=None) == text(rope_parameters={"rope_type": "default", "rope_theta": 1e4})


@pytest.mark.parametrize(
    ("keys", "nope_layers"),
    [
        ({}, (3, 7)),
        ({"no_rope_layers": None}, (3, 7)),
        ({"no_rope_layers": []}, (3, 7)),
        ({"no_rope_layers": [], "no_rope_layer_interval": 3}, (2, 5)),
        ({"no_rope_layers": [1, 0, 1, 1, 1, 1, 1, 0]}, (1, 7)),
        ({"no_rope_layers": [1, 1, 1, 1, 1, 1, 1, 1, 0]}, ()),  # longer than the model: the rest has no layer
        ({"no_rope_layers": [0] * 8}, tuple(range(8))),
    ],
)
def test_no_rope_layers_holds_1_where_a_layer_uses_rope(keys, nope_layers):
    assert tuple(i for i, kind in enumerate(text(**keys).layer_kinds) if not kind.uses_rope) == nope_layers


@pytest.mark.parametrize(
    ("keys", "moe_layers"),
    [
        ({}, tuple(range(8))),
        ({"interleave_moe_layer_step": 3}, (2, 5)),
        ({"interleave_moe_layer_step": 2, "moe_layers": None}, (1, 3, 5, 7)),
        ({"interleave_moe_layer_step": 2, "moe_layers": []}, ()),
        ({"moe_layers": [0, 5]}, (0, 5)),
    ],
)
def test_explicit_moe_layers_override_the_step_and_an_empty_list_means_dense(keys, moe_layers):
    assert tuple(i for i, kind in enumerate(text(**keys).layer_kinds) if kind.is_moe) == moe_layers


def test_lists_that_follow_an_interval_become_that_interval():
    listed = text(moe_layers=[1, 3, 5, 7], no_rope_layers=[1, 1, 0, 1, 1, 0, 1, 1])
    assert listed == text(interleave_moe_layer_step=2, no_rope_layer_interval=3)
    assert (listed.moe_interval, listed.moe_layers, listed.nope_interval, listed.nope_layers) == (2, None, 3, None)
    assert text(moe_layers=[1, 3, 5]).moe_layers == (1, 3, 5)


def test_a_null_chunk_and_layer_types_of_full_attention_mean_no_chunk():
    assert text(attention_chunk_size=None).attention_chunk_size is None  # Llama Guard 4
    assert text(layer_types=["full_attention"] * 8).attention_chunk_size is None
    assert text().attention_chunk_size == 8192


@pytest.mark.parametrize(("value", "on"), [(None, False), (True, True), (4, True), (False, False)])
def test_temperature_tuning_may_be_a_boolean_or_transformers_451s_integer_4(value, on):
    config = text(attn_temperature_tuning=value, floor_scale=100, attn_scale=0.3)
    assert config.temperature == (AttentionTemperature(100, 0.3) if on else None)
    assert text().temperature == AttentionTemperature(8192, 0.1)


def test_a_null_token_id_is_none_and_an_eos_list_stays_one():
    config = text(bos_token_id=None, eos_token_id=[7, 8], pad_token_id=3)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (7, 8), 3)
    assert text(eos_token_id=None).eos_token_ids == ()


def test_a_plain_llama_is_dense_with_rope_and_full_attention_everywhere():
    config = config_from_hf({"model_type": "llama", "num_hidden_layers": 2, "num_key_value_heads": 8})
    assert {tuple(kind) for kind in config.layer_kinds} == {(True, False)}
    assert (config.attention_chunk_size, config.qk_norm, config.temperature) == (None, False, None)
    assert (config.head_dim, config.num_kv_heads, config.rope_theta, config.norm_eps) == (128, 8, 1e4, 1e-6)


NO_VISION_WIDTH = {key: value for key, value in SCOUT["vision_config"].items() if key != "hidden_size"}
NO_OUTPUT_DIM = {key: value for key, value in SCOUT["vision_config"].items() if key != "vision_output_dim"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], "config.json must hold a JSON object"),
        ({}, "model_type is None"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        (TEXT | {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "quantization_config"),
        (TEXT | {"hidden_size": "5120"}, "hidden_size must be an integer, got '5120'"),
        (TEXT | {"hidden_size": -1}, "hidden_size must be positive, got -1"),
        (TEXT | {"num_hidden_layers": True}, "num_hidden_layers must be an integer"),
        (TEXT | {"num_experts_per_tok": 17}, "experts_per_token must be 1 to num_experts=16, got 17"),
        (TEXT | {"num_key_value_heads": 7}, "num_kv_heads=7"),
        (TEXT | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (TEXT | {"attn_temperature_tuning": "yes"}, "attn_temperature_tuning must be true or false, got 'yes'"),
        (TEXT | {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step must be 1 or more"),
        (TEXT | {"no_rope_layer_interval": 0}, "no_rope_layer_interval must be 1 or more"),
        (TEXT | {"moe_layers": [8]}, "moe_layers must hold layers from 0 to 7, got [8]"),
        (TEXT | {"no_rope_layers": [1, 0]}, "no_rope_layers must hold 0 or 1 for each of 8 layers"),
        (TEXT | {"no_rope_layers": [2] * 8}, "no_rope_layers must hold 0 or 1"),
        (TEXT | {"layer_types": ["chunked_attention"] * 8}, "layer_types entry 3 is 'chunked_attention'"),
        (TEXT | {"layer_types": ["chunked_attention"] * 3}, "layer_types entry 3 is missing"),
        (TEXT | {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
        (TEXT | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor is missing"),
        (TEXT | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (TEXT | {"eos_token_id": "</s>"}, "eos_token_id"),
        (SCOUT | {"text_config": 3}, "text_config must be an object"),
        (SCOUT | {"tie_word_embeddings": True}, "text_config.tie_word_embeddings is not"),
        (SCOUT | {"vision_config": NO_VISION_WIDTH}, "vision_config.intermediate_size is 5632, but hidden_size=768"),
        (SCOUT | {"vision_config": NO_OUTPUT_DIM}, "vision_config.vision_output_dim must equal"),
        (SCOUT | {"vision_config": SCOUT["vision_config"] | {"norm_eps": 1e-6}}, "vision_config.norm_eps is 1e-06"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_file_and_key(raw, words):
    with pytest.raises(UserError) as error:
        config_from_hf(raw, source="config.json")
    assert words in str(error.value) and str(error.value).startswith("config.json") and "\n" not in str(error.value)


@st.composite
def configs(draw):
    layers = draw(st.integers(1, 12))
    some = st.one_of(st.none(), st.lists(st.integers(0, layers - 1), unique=True).map(sorted).map(tuple))
    experts, kv_heads = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 300)),
        hidden_size=draw(st.integers(1, 64)),
        num_layers=layers,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 8)),
        num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)),
        moe_interval=draw(st.integers(0, 4)),
        moe_layers=draw(some),
        nope_interval=draw(st.integers(0, 4)),
        nope_layers=draw(some),
        attention_chunk_size=draw(st.one_of(st.none(), st.integers(1, 100))),
        qk_norm=draw(st.booleans()),
        temperature=draw(st.one_of(st.none(), st.builds(AttentionTemperature, st.integers(1, 99), st.floats(0, 1)))),
        rope_scaling=draw(st.one_of(st.none(), st.just(RopeScaling()), st.just(RopeScaling(8.0, 1.0, 4.0, 64)))),
        attention_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        bos_token_id=draw(st.one_of(st.none(), st.just(0))),
        eos_token_ids=draw(st.sampled_from([(), (1,), (1, 2)])),
        pad_token_id=draw(st.one_of(st.none(), st.just(0))),
        vision=draw(st.one_of(st.none(), st.just(VisionConfig()))),
    )


PATTERN = {"moe_interval": 1, "moe_layers": None, "nope_interval": 4, "nope_layers": None}


@given(configs())
def test_what_is_written_reads_back_as_the_same_model(config):
    again = config_from_hf(json.loads(json.dumps(config_to_hf(config))))
    assert again.layer_kinds == config.layer_kinds  # the same pattern may be written as an interval or as a list
    if any(kind.uses_rope for kind in config.layer_kinds):
        assert again.attention_chunk_size == config.attention_chunk_size
    same_form = PATTERN | {"attention_chunk_size": None}
    assert dataclasses.replace(again, **same_form) == dataclasses.replace(config, **same_form)


@pytest.mark.parametrize("name", [config.name for config in list_named_configs()])
def test_named_configurations_survive_the_round_trip(name):
    assert config_from_hf(config_to_hf(named_config(name))) == named_config(name)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ModelConfig(shared_expert=False), "shared_expert=False"),
        (ModelConfig(temperature=AttentionTemperature(8.5)), "temperature.floor=8.5"),
        (ModelConfig(vision=VisionConfig(mlp_size=1024)), "vision.mlp_size=1024"),
        (ModelConfig(vision=VisionConfig(norm_eps=1e-6)), "vision.norm_eps=1e-06"),
    ],
)
def test_what_transformers_cannot_hold_is_refused_by_name(config, field):
    with pytest.raises(UserError, match=field.replace(".", r"\.")):
        config_to_hf(config)
    assert config_to_hf(ModelConfig(shared_expert=False, moe_interval=0))["moe_layers"] == []  # no experts, nothing to hold


@pytest.mark.transformers
@pytest.mark.parametrize("name", ["scout-17b-16e", "maverick-17b-128e", "llama4-8b"])
def test_transformers_reads_the_same_numbers_from_what_is_written(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(named_config(name))))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path / "again")
    assert config_from_hf(json.loads((tmp_path / "again" / "config.json").read_text())) == named_config(name)


WILD = [
    None,
    True,
    -1,
    0,
    1,
    0.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    10**9,
    10**30,
    "x",
    [],
    [1, 2],
    [None],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("group", [None, "text_config", "vision_config"])
def test_no_wild_value_is_more_than_one_line(group):
    """Nor does any cost time or memory: a billion layers are refused before there is a list of them."""
    keys = SCOUT if group is None else SCOUT[group]
    refused = 0
    for key in (*keys, "no_rope_layer_interval", "layer_types", "moe_layers", "rope_parameters", "floor_scale"):
        for value in WILD:
            changed = keys | {key: value}
            try:
                config_from_hf(changed if group is None else SCOUT | {group: changed}, source="config.json")
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                refused += 1
    assert refused > 50


def test_image_tokens_go_both_ways():
    config = config_from_hf(SCOUT | {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7})
    vision = config.vision
    assert (vision.patch_token_id, vision.image_start_token_id, vision.image_end_token_id) == (5, 6, 7)
    written = config_to_hf(config)
    assert (written["image_token_index"], written["boi_token_index"], written["eoi_token_index"]) == (5, 6, 7)
    absent = {key: value for key, value in SCOUT.items() if not key.endswith("_token_index")}
    assert config_from_hf(absent).vision == VisionConfig()

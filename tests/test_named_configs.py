import pytest

from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.named_configs import count_parameters, list_named_configs, named_config

ALL = list_named_configs()
CHOSEN = [config for config in ALL if config.total is not None and not config.published]


def closed_form(c: ModelConfig, experts: int) -> int:
    """Text parameters from the architecture's formula, with `experts` of the routed ones counted."""
    n_moe = sum(kind.is_moe for kind in c.layer_kinds)
    attention = 2 * c.hidden_size * (c.num_heads + c.num_kv_heads) * c.head_dim + 2 * c.hidden_size
    moe = (experts + 1) * 3 * c.hidden_size * c.expert_ffn_size + c.hidden_size * c.num_experts
    dense = 3 * c.hidden_size * c.dense_ffn_size
    layers = c.num_layers * attention + n_moe * moe + (c.num_layers - n_moe) * dense
    return 2 * c.vocab_size * c.hidden_size + layers + c.hidden_size


@pytest.mark.parametrize(
    ("name", "text", "total", "active"),
    [
        ("scout-17b-16e", 107_769_861_120, 108_641_793_536, 17_172_894_720),
        ("maverick-17b-128e", 400_711_848_960, 401_583_781_376, 17_184_691_200),
    ],
)
def test_published_models_have_exactly_their_parameters(name, text, total, active):
    counts = count_parameters(named_config(name))
    assert (counts.text, counts.total, counts.active) == (text, total, active)
    assert counts.vision == 811_115_008 + 39_845_888 + 20_971_520  # tower, adapter, projector


@pytest.mark.parametrize("config", CHOSEN, ids=lambda config: config.name)
def test_chosen_shapes_come_within_one_percent_of_the_claim_and_say_that_they_are_chosen(config):
    counts = config.count()
    assert counts.total == pytest.approx(config.total * 1e9, rel=0.01)
    assert counts.active == pytest.approx(config.active * 1e9, rel=0.01)
    assert config.source.startswith("chosen; ") and "claims" in config.source


@pytest.mark.parametrize("config", ALL, ids=lambda config: config.name)
def test_counts_of_the_modules_equal_the_closed_form(config):
    counts, c = config.count(), config.make()
    assert counts.text == closed_form(c, c.num_experts)
    assert counts.active == closed_form(c, c.experts_per_token)


@pytest.mark.parametrize("config", CHOSEN, ids=lambda config: config.name)
def test_chosen_widths_are_multiples_of_128(config):
    c = config.make()
    for width in (c.hidden_size, c.expert_ffn_size, c.dense_ffn_size, c.head_dim, c.num_heads * c.head_dim):
        assert width % 128 == 0


def test_the_family_is_complete_and_only_released_models_are_published():
    assert [config.name for config in ALL if config.published] == ["scout-17b-16e", "maverick-17b-128e"]
    assert {config.name for config in CHOSEN} == {
        "behemoth-288b-16e", "llama4-8b", "llama4-70b", "llama4-405b-a40b", "llama4-405b-a17b", "llama4-400b-a52b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "experts", "active_experts"),
    [
        ("behemoth-288b-16e", 16, range(1, 17)),
        ("llama4-405b-a40b", 128, [8]),
        ("llama4-405b-a17b", 128, [2, 3, 4]),
        ("llama4-400b-a52b", 128, [8]),
    ],
)
def test_chosen_mixtures_have_the_claimed_experts(name, experts, active_experts):
    config = named_config(name)
    assert config.num_experts == experts and config.experts_per_token in active_experts
    assert any(kind.is_moe for kind in config.layer_kinds)


def test_the_claimed_128k_context():
    assert named_config("llama4-400b-a52b").max_position_embeddings == 128 * 1024


def test_a_misspelt_name_offers_the_nearest():
    with pytest.raises(UserError, match=r"scuot.*did you mean scout-17b-16e"):
        named_config("scuot-17b-16e")
    with pytest.raises(UserError, match=r"'\?\?\?'; there are scout-17b-16e, maverick"):
        named_config("???")


def test_every_call_gives_a_configuration_of_its_own():
    named_config("tiny").num_layers = 1
    assert named_config("tiny").num_layers == 4

import jax
import pytest
from flax.traverse_util import flatten_dict

from llama4_jax.config import ExecutionConfig, ModelConfig, VisionConfig
from llama4_jax.model.llama4 import Llama4, abstract_params
from llama4_jax.training.flops import active_matmul_parameters, peak_of, training_flops_per_tile, training_flops_per_token


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(vocab_size=96, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=6, num_experts=8,
                    experts_per_token=2, expert_ffn_size=24, dense_ffn_size=40, moe_interval=2),
        ModelConfig(vocab_size=96, hidden_size=32, num_layers=2, num_experts=4, expert_ffn_size=16, shared_expert=False),
        ModelConfig(vocab_size=96, hidden_size=32, num_layers=3, moe_interval=0, dense_ffn_size=48),
    ],
)  # fmt: skip
def test_active_parameters_are_the_matrices_of_the_real_tree_with_the_chosen_experts(config):
    kernels = flatten_dict(abstract_params(Llama4(config, ExecutionConfig())), sep="/")
    share = config.experts_per_token / config.num_experts
    expected = sum(x.size * (share if "/experts/" in path else 1) for path, x in kernels.items() if path.endswith("kernel"))
    assert active_matmul_parameters(config) == expected


def test_scout_has_seventeen_billion_active_parameters():
    assert active_matmul_parameters(ModelConfig()) + 202_048 * 5120 == pytest.approx(17.17e9, rel=2e-3)


def test_attention_counts_the_keys_that_a_token_sees():
    config = ModelConfig(num_layers=4, nope_interval=4, attention_chunk_size=8)
    attention = training_flops_per_token(config, 32) - 6 * active_matmul_parameters(config)
    local, everything = (8 + 1) / 2, (32 + 1) / 2
    assert attention == 12 * 40 * 128 * (3 * local + everything)


def test_a_tile_counts_every_matrix_of_the_tower_for_the_places_that_it_is_applied_to():
    vision = VisionConfig(
        hidden_size=16, num_layers=3, num_heads=2, mlp_size=64, image_size=12, patch_size=3, adapter_size=10
    )  # 16 patches and the class token, merged to 4
    tower = flatten_dict(abstract_params(Llama4(ModelConfig(hidden_size=32, num_layers=4, vision=vision)))["vision"], sep="/")
    kernels = {path: x.size for path, x in tower.items() if path.endswith("kernel")}
    places = {"patch": 16, "layers": 17, "adapter": 4, "projector": 4}
    matmuls = sum(6 * size * places[path.split("/")[0].split("_")[0]] for path, size in kernels.items())
    assert training_flops_per_tile(vision, 32) == matmuls + 3 * 12 * 16 * 17 * 17


def test_a_chip_that_no_table_knows_is_measured():
    peak = peak_of(jax.devices()[:1] * 8, "float32")
    assert 1e9 < peak.flops < 1e14
    assert peak.source.startswith("float32 matmul measured on")

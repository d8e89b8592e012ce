"""Meta's consolidated files, against the folder of Hugging Face that they were made from and against Meta's own model."""

import collections
import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.checkpoints.load import load_pretrained
from llama4_jax.checkpoints.meta_config import config_from_meta
from llama4_jax.checkpoints.meta_reader import MetaReader
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors.torch")
from tests.checkpoints.meta_format import write_consolidated  # noqa: E402

# What Meta's params.json can say: heads of dim / n_heads, scaled RoPE over 8,192 positions.
TEXT = ModelConfig(
    vocab_size=16, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=3, experts_per_token=2,
    expert_ffn_size=8, dense_ffn_size=12, moe_interval=2, nope_interval=4, attention_chunk_size=8,
    temperature=AttentionTemperature(4, 0.5), rope_theta=1e4, rope_scaling=RopeScaling(16, 1, 1, 8192), bos_token_id=None,
    eos_token_ids=(), pad_token_id=None,
)  # fmt: skip
VISION = VisionConfig(hidden_size=8, num_layers=2, num_heads=2, mlp_size=32, image_size=8, patch_size=2, adapter_size=6)
MULTIMODAL = dataclasses.replace(TEXT, vision=VISION)


def save_random(folder, config, dtype=jnp.float32):
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(0, 0.4, x.shape), dtype), abstract_params(Llama4(config)))
    save_pretrained(folder, config, params)
    return params


@pytest.fixture
def folder(tmp_path):
    save_random(tmp_path / "hf", TEXT)
    write_consolidated(tmp_path / "hf", tmp_path / "meta", ranks=2)
    return tmp_path / "meta"


def refused(folder, *words, **kwargs):
    with pytest.raises(UserError) as error, MetaReader(folder, **kwargs) as reader:
        for name in reader.tensors:
            reader.read(name)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


def edit(folder, rank, change):
    path = folder / f"consolidated.{rank:02d}.pth"
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)


@pytest.mark.parametrize("config", [TEXT, MULTIMODAL], ids=["text", "multimodal"])
@pytest.mark.parametrize(("ranks", "fused"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_rank_is_joined_to_the_same_model(tmp_path, config, ranks, fused, dtype):
    params = save_random(tmp_path / "hf", config, dtype)
    write_consolidated(tmp_path / "hf", tmp_path / "meta", ranks, fused=fused)
    model, loaded = load_pretrained(tmp_path / "meta")
    assert dataclasses.replace(model.config, initializer_range=config.initializer_range) == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_parts_of_tensors_are_those_of_the_whole(tmp_path):
    save_random(tmp_path / "hf", MULTIMODAL)
    write_consolidated(tmp_path / "hf", tmp_path / "meta", ranks=2, fused=True)
    with MetaReader(tmp_path / "meta") as reader:
        for name, info in reader.tensors.items():
            index = tuple(slice(size // 3, size - size // 4) for size in info.shape)
            np.testing.assert_array_equal(reader.read(name, index), reader.read(name)[index], err_msg=name)


def test_without_params_the_named_configuration_is_taken(folder, monkeypatch):
    from llama4_jax.checkpoints import meta_reader

    (folder / "params.json").write_text("{}")
    refused(folder, "tensors are not those of scout-17b-16e or maverick-17b-128e", "--config_name")
    refused(folder, "moe_w_out_eF_D has 12 rows, which are not 16 equal parts", config_name="scout-17b-16e")
    monkeypatch.setattr(meta_reader, "named_config", lambda name: TEXT if name == "scout-17b-16e" else MULTIMODAL)
    for kwargs in ({}, {"config_name": "maverick-17b-128e"}):
        with MetaReader(folder, **kwargs) as reader:
            assert reader.config == TEXT  # the tower, which these files do not hold, is left out


def test_a_raw_table_of_positions_is_resampled_as_metas_loader_does(tmp_path):
    save_random(tmp_path / "hf", MULTIMODAL)
    write_consolidated(tmp_path / "hf", tmp_path / "meta", ranks=1)
    raw = torch.randn(17, 8, generator=torch.Generator().manual_seed(0))

    def change(saved):
        saved.pop("vision_embeddings.vision_encoder.positional_embedding_vlm")
        saved["vision_embeddings.vision_encoder.positional_embedding"] = raw

    edit(tmp_path / "meta", 0, change)
    grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)[None] / 4 * 2 - 1
    table = raw[1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    sampled = torch.nn.functional.grid_sample(table, grid, padding_mode="zeros", align_corners=False)
    expected = torch.cat([sampled[0].permute(1, 2, 0).reshape(16, 8), raw[:1]])
    with MetaReader(tmp_path / "meta") as reader:
        table = reader.read("vision_model.positional_embedding_vlm")
        np.testing.assert_allclose(table, expected, atol=1e-6)
        index = (slice(3, 17), slice(2, 5))
        np.testing.assert_array_equal(reader.read("vision_model.positional_embedding_vlm", index), table[index])


def test_what_is_saved_beside_the_weights_is_left_out(folder):
    """Parameters, versions of a state_dict, and the bytes that Transformer Engine adds."""

    def change(saved):
        saved["norm.weight"] = torch.nn.Parameter(saved["norm.weight"])
        saved["layers.0.attention.wo._extra_state"] = io.BytesIO(b"any")
        saved["layers.1.feed_forward.running_gate_stats_3E"] = torch.zeros(3, 3)

    edit(folder, 0, change)
    edit(folder, 1, change)
    for rank in range(2):  # a state_dict is an OrderedDict with an attribute
        saved = collections.OrderedDict(torch.load(folder / f"consolidated.{rank:02d}.pth", weights_only=False))
        saved._metadata = {"": {"version": 1}}
        torch.save(saved, folder / f"consolidated.{rank:02d}.pth")
    load_pretrained(folder)


def test_a_missing_rank_or_tensor_is_named(folder):
    shutil.copytree(folder, folder.parent / "gap")
    (folder.parent / "gap" / "consolidated.00.pth").unlink()
    refused(folder.parent / "gap", "consolidated.00.pth is missing")
    edit(folder, 1, lambda saved: saved.pop("layers.2.attention.wo.weight"))
    refused(folder, "consolidated.00.pth: tensor layers.2.attention.wo.weight is missing in the file of rank 1")


def test_a_missing_last_rank_shows_in_the_shapes(folder):
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated.00.pth: tensor layers.0.attention.wq.weight has shape \(8, 16\)"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(strange=torch.zeros(2)), "tensor strange has no place"),
        (lambda s: s.update({"layers.0.strange": torch.zeros(2)}), "tensor layers.0.strange has no place"),
        (lambda s: s.update({"norm.weight": torch.zeros(2, dtype=torch.int8)}), "tensor norm.weight has a CharStorage"),
        (lambda s: s.update({"norm.weight": torch.zeros(2, dtype=torch.float8_e4m3fn)}), "names 'torch._utils._rebuild_tensor_v3'"),
        (lambda s: s.update({"layers.0.attention.wq.weight": torch.zeros(3, 5)}), "does not continue"),
        (lambda s: s.update({"layers.1.feed_forward.experts.moe_w_in_eD_F": torch.zeros(7, 4)}), "not 3 equal parts"),
        (lambda s: s.pop("layers.1.feed_forward.experts.moe_w_swiglu_eD_F"), "is missing in the file of rank 1"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(folder, change, words):
    edit(folder, 1, change)
    refused(folder, words)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": "16"}, "dim must be an integer"),
        ({"n_layers": None}, "n_layers is missing"),
        ({"n_heads": 0}, "n_heads"),
        ({"moe_args": 3}, "params.json"),
        ({"quantization_args": {"scheme": "x"}}, "quantization_args is set"),
        ({"vision_args": {"dim": 3}}, "vision_args"),
    ],
)
def test_wrong_params_are_refused_by_key(folder, params, words):
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | params))
    refused(folder, "params.json", words)


def test_no_wild_params_are_more_than_one_line():
    shapes = {"model.embed_tokens.weight": (16, 16)}
    sides = {"height": 8, "width": 8}
    vision = {
        "image_size": sides, "patch_size": sides, "dim": 8, "n_layers": 2, "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 6,
        "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    params = {"dim": 16, "n_layers": 4, "n_heads": 4, "vision_args": vision, "moe_args": {"num_experts": 4}}
    config_from_meta(params, shapes, "params.json")
    wild = (None, True, -1, 0, 0.5, 1e-300, 1e308, float("nan"), float("inf"), 10**9, 10**30, "x", [], {}, {"a": 1})
    keys = (*params, "n_kv_heads", "rope_theta", "norm_eps", "nope_layer_interval", "floor_scale", "use_qk_norm", "model")
    refused = 0
    for value in wild:
        for changed in (
            *(params | {key: value} for key in keys),
            *(params | {"vision_args": vision | {key: value}} for key in vision),
            params | {"moe_args": {"num_experts": 4, "interleave_moe_layer_step": value}},
        ):
            try:
                config_from_meta(changed, shapes, "params.json")
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50

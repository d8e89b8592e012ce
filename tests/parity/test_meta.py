"""Meta's own model (llama-models) with random weights, cut for its ranks by Meta's own code, saved by torch and loaded here.

pip install -e .[parity,llama-tokenizer]
"""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.checkpoints.load import load_pretrained

torch = pytest.importorskip("torch")
pytest.importorskip("llama_models")

pytestmark = pytest.mark.transformers

PARAMS = {
    "dim": 16, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 32, "multiple_of": 8, "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0, "norm_eps": 1e-5, "attention_chunk_size": 8, "rope_theta": 1e4, "use_scaled_rope": True,
    "nope_layer_interval": 4, "use_qk_norm": True, "attn_temperature_tuning": True, "floor_scale": 4.0, "attn_scale": 0.5,
    "moe_args": {"num_experts": 4, "top_k": 2, "interleave_moe_layer_step": 2},
    "vision_args": {
        "image_size": {"height": 24, "width": 24}, "patch_size": {"height": 4, "width": 4}, "dim": 16, "n_layers": 2,
        "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 12, "pixel_shuffle_ratio": 0.5,
    },
}  # fmt: skip


class ParallelLinear(torch.nn.Linear):
    """fairscale's parallel layers, on one rank."""

    def __init__(self, size_in, size_out, bias=True, **_):
        super().__init__(size_in, size_out, bias=bias)


class ParallelEmbedding(torch.nn.Embedding):
    def __init__(self, size, width, **_):
        super().__init__(size, width)


@pytest.fixture
def meta(monkeypatch):
    """llama_models.llama4, without fairscale and without a GPU."""

    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        module(name)
    rank = dict(get_model_parallel_rank=lambda: 0, get_model_parallel_world_size=lambda: 1)
    module("fairscale.nn.model_parallel.initialize", **rank)
    sys.modules["fairscale.nn.model_parallel"].initialize = sys.modules["fairscale.nn.model_parallel.initialize"]
    layers = dict(
        ColumnParallelLinear=ParallelLinear, RowParallelLinear=ParallelLinear, VocabParallelEmbedding=ParallelEmbedding
    )
    module("fairscale.nn.model_parallel.layers", **layers)
    module("fairscale.nn.model_parallel.mappings", reduce_from_model_parallel_region=lambda x: x)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    before = set(sys.modules)
    from llama_models import checkpoint
    from llama_models.llama4 import args, datatypes, model

    yield types.SimpleNamespace(args=args, model=model, checkpoint=checkpoint, datatypes=datatypes)
    for name in set(sys.modules) - before:
        if name.startswith("llama_models"):
            del sys.modules[name]


def test_metas_model_is_the_same_function(meta, tmp_path):
    torch.manual_seed(0)
    arguments = meta.args.ModelArgs(**PARAMS, max_batch_size=2, max_seq_len=64)
    model = meta.model.Transformer(arguments).float().eval()
    for name, parameter in model.named_parameters():
        scale = 0.2 if parameter.ndim == 1 else parameter.shape[1 if parameter.ndim == 3 else -1] ** -0.5
        with torch.no_grad():
            parameter.copy_(
                (("norm" in name or "ln_" in name) and name.endswith("weight")) + scale * torch.randn(parameter.shape)
            )
    save_as_published(meta.checkpoint, model.state_dict(), tmp_path, ranks=2)

    random = np.random.default_rng(0)
    tokens = random.integers(0, 32, (1, 30))
    ours, params = load_pretrained(tmp_path)
    vision = ours.config.vision
    assert (vision.hidden_size, vision.adapter_size, ours.config.experts_per_token) == (16, 12, 2)
    with torch.no_grad():
        wanted = model(meta.datatypes.TransformerInput(tokens=torch.from_numpy(tokens), tokens_position=0)).logits
    logits = jax.jit(lambda params: ours.apply({"params": params}, jnp.asarray(tokens)).logits)(params)
    np.testing.assert_allclose(logits, wanted, atol=2e-5)

    tiles = random.uniform(-1, 1, (3, 24, 24, 3)).astype(np.float32)
    pixels = torch.from_numpy(tiles.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        tower = model.vision_embeddings
        wanted = model.vision_projection(tower.vision_adapter(tower.vision_encoder(pixels[:, None])))
    features = jax.jit(lambda params: ours.bind({"params": params}).vision(jnp.asarray(tiles)))(params)
    np.testing.assert_allclose(features, wanted, atol=2e-5)


def save_as_published(checkpoint, tensors, folder, ranks):
    """Under the keys of Meta's published files, each rank's part as Meta's code cuts it."""
    published = {}
    for name, tensor in tensors.items():
        name = name.replace("experts.w1", "experts.moe_w_in_eD_F").replace("experts.w3", "experts.moe_w_swiglu_eD_F")
        name = name.replace("experts.w2", "experts.moe_w_out_eF_D")
        for one, other in (("w1", "w_in_shared_FD"), ("w3", "w_swiglu_FD"), ("w2", "w_out_shared_DF")):
            name = name.replace(f"shared_expert.{one}", other)
        published[name] = tensor
    for rank in range(ranks):
        part = checkpoint.reshard_mp([published], size=ranks, rank=rank)
        experts = {name: tensor.flatten(0, 1) for name, tensor in part.items() if ".moe_w_" in name}
        torch.save(part | experts, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))

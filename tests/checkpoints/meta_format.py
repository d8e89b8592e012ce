"""Tiny checkpoints in Meta's layout, written with torch.save from Meta's names for the tensors of a folder of Hugging Face.

Written apart from the reader: one loop over a model's tensors that cuts each for its ranks as fairscale's parallel layers do.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ROWS = "rows"  # ColumnParallelLinear and VocabParallelEmbedding cut what comes out
COLUMNS = "columns"  # RowParallelLinear cuts what goes in
SAME = "same"


def write_consolidated(source: Path, target: Path, ranks: int, *, fused: bool = False, params: bool = True) -> None:
    """Writes consolidated.NN.pth of every rank, and params.json, from a folder that transformers can load."""
    config = json.loads((source / "config.json").read_text())
    text, vision = config.get("text_config", config), config.get("vision_config")
    tensors = {name.removeprefix("language_model."): x for name, x in load_file(source / "model.safetensors").items()}
    target.mkdir(parents=True)
    for rank in range(ranks):
        saved = {"rope.freqs": torch.zeros(3)}
        for name, tensor in tensors.items():
            add(saved, name, tensor, rank, ranks, text)
        if fused:
            fuse(saved, text["num_hidden_layers"])
        torch.save(saved, target / f"consolidated.{rank:02d}.pth")
    (target / "params.json").write_text(json.dumps(arguments(text, vision) if params else {}))


def cut(tensor: torch.Tensor, how: str, rank: int, ranks: int) -> torch.Tensor:
    if how == SAME:
        return tensor
    return tensor.chunk(ranks, dim=0 if how == ROWS else -1)[rank].clone()


def add(saved, name, tensor, rank, ranks, text):
    E, D = text["num_local_experts"], text["hidden_size"]
    layer = f"layers.{name.split('.')[2]}." if name.startswith("model.layers.") else ""
    tower = "vision_embeddings.vision_encoder."
    block = f"{tower}transformer.resblocks.{name.split('.')[3]}." if name.startswith("vision_model.model.layers.") else ""
    whole = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", ROWS),
        "model.norm.weight": ("norm.weight", SAME),
        "lm_head.weight": ("output.weight", ROWS),
        "multi_modal_projector.linear_1.weight": ("vision_projection.weight", ROWS),
        "vision_model.patch_embedding.linear.weight": (f"{tower}conv1._linear.weight", ROWS),
        "vision_model.class_embedding": (f"{tower}class_embedding", SAME),
        "vision_model.positional_embedding_vlm": (f"{tower}positional_embedding_vlm", SAME),
        "vision_model.layernorm_pre.weight": (f"{tower}ln_pre.weight", SAME),
        "vision_model.layernorm_pre.bias": (f"{tower}ln_pre.bias", SAME),
        "vision_model.layernorm_post.weight": (f"{tower}ln_post.weight", SAME),
        "vision_model.layernorm_post.bias": (f"{tower}ln_post.bias", SAME),
        "vision_model.vision_adapter.mlp.fc1.weight": ("vision_embeddings.vision_adapter.mlp.c_fc.weight", ROWS),
        "vision_model.vision_adapter.mlp.fc2.weight": ("vision_embeddings.vision_adapter.mlp.c_proj.weight", COLUMNS),
    }
    by_ending = {
        ".input_layernorm.weight": ("attention_norm.weight", SAME),
        ".post_attention_layernorm.weight": ("ffn_norm.weight", SAME),
        ".q_proj.weight": ("attention.wq.weight", ROWS),
        ".k_proj.weight": ("attention.wk.weight", ROWS),
        ".v_proj.weight": ("attention.wv.weight", ROWS),
        ".o_proj.weight": ("attention.wo.weight", COLUMNS),
        ".shared_expert.gate_proj.weight": ("feed_forward.w_in_shared_FD.weight", ROWS),
        ".shared_expert.up_proj.weight": ("feed_forward.w_swiglu_FD.weight", ROWS),
        ".shared_expert.down_proj.weight": ("feed_forward.w_out_shared_DF.weight", COLUMNS),
        ".gate_proj.weight": ("feed_forward.w1.weight", ROWS),
        ".up_proj.weight": ("feed_forward.w3.weight", ROWS),
        ".down_proj.weight": ("feed_forward.w2.weight", COLUMNS),
    }
    in_tower = {
        **{f".{x}_proj.{p}": (f"attn.w{x}.{p}", ROWS) for x in "qkv" for p in ("weight", "bias")},
        ".o_proj.weight": ("attn.wo.weight", COLUMNS),
        ".o_proj.bias": ("attn.wo.bias", SAME),
        ".fc1.weight": ("mlp.c_fc.weight", ROWS),
        ".fc1.bias": ("mlp.c_fc.bias", ROWS),
        ".fc2.weight": ("mlp.c_proj.weight", COLUMNS),
        ".fc2.bias": ("mlp.c_proj.bias", SAME),
        ".input_layernorm.weight": ("ln_1.weight", SAME),
        ".input_layernorm.bias": ("ln_1.bias", SAME),
        ".post_attention_layernorm.weight": ("ln_2.weight", SAME),
        ".post_attention_layernorm.bias": ("ln_2.bias", SAME),
    }
    if name in whole:
        key, how = whole[name]
        saved[key] = cut(tensor, how, rank, ranks)
    elif name.endswith("router.weight"):
        saved[f"{layer}feed_forward.router_DE"] = tensor.T  # strided, as a transpose is saved
    elif name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=-1)  # [E, D, F]
        saved[f"{layer}feed_forward.experts.moe_w_in_eD_F"] = cut(gate, COLUMNS, rank, ranks).reshape(E * D, -1)
        saved[f"{layer}feed_forward.experts.moe_w_swiglu_eD_F"] = cut(up, COLUMNS, rank, ranks).reshape(E * D, -1)
    elif name.endswith("experts.down_proj"):
        saved[f"{layer}feed_forward.experts.moe_w_out_eF_D"] = tensor.chunk(ranks, dim=1)[rank].reshape(-1, D)
    else:
        table, prefix = (in_tower, block) if block else (by_ending, layer)
        key, how = next(entry for ending, entry in table.items() if name.endswith(ending))
        saved[prefix + key] = cut(tensor, how, rank, ranks)


def fuse(saved, layers):
    """The older names, as in the published files."""
    for layer in range(layers):
        attention, ffn = f"layers.{layer}.attention.", f"layers.{layer}.feed_forward."
        saved[f"{attention}wqkv.weight"] = torch.cat([saved.pop(f"{attention}w{x}.weight") for x in "qkv"])
        saved[f"{attention}wqkv.layer_norm_weight"] = saved.pop(f"layers.{layer}.attention_norm.weight")
        if f"{ffn}w1.weight" in saved:
            saved[f"{ffn}mlp.fc1_weight"] = torch.cat([saved.pop(f"{ffn}w1.weight"), saved.pop(f"{ffn}w3.weight")])
            saved[f"{ffn}mlp.fc2_weight"] = saved.pop(f"{ffn}w2.weight")
            saved[f"{ffn}mlp.layer_norm_weight"] = saved.pop(f"layers.{layer}.ffn_norm.weight")
        else:
            saved[f"{ffn}norm.weight"] = saved.pop(f"layers.{layer}.ffn_norm.weight")


def arguments(text, vision):
    """params.json of the same model."""
    rope = text["rope_parameters"]
    uses_rope = text["no_rope_layers"]
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "vocab_size": -1,
        "norm_eps": text["rms_norm_eps"],
        "rope_theta": rope["rope_theta"],
        "use_scaled_rope": rope["rope_type"] == "llama3",
        "nope_layer_interval": uses_rope.index(0) + 1 if 0 in uses_rope else None,
        "attention_chunk_size": text["attention_chunk_size"],
        "use_qk_norm": text["use_qk_norm"],
        "attn_temperature_tuning": text["attn_temperature_tuning"],
        "floor_scale": text["floor_scale"],
        "attn_scale": text["attn_scale"],
        "moe_args": {
            "num_experts": text["num_local_experts"],
            "top_k": text["num_experts_per_tok"],
            "interleave_moe_layer_step": text["interleave_moe_layer_step"],
        },
    }
    if vision:
        size = {"height": vision["image_size"], "width": vision["image_size"]}
        patch = {"height": vision["patch_size"], "width": vision["patch_size"]}
        params["vision_args"] = {
            "image_size": size, "patch_size": patch, "dim": vision["hidden_size"], "n_layers": vision["num_hidden_layers"],
            "n_heads": vision["num_attention_heads"], "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "output_dim": vision["vision_output_dim"], "pixel_shuffle_ratio": vision["pixel_shuffle_ratio"],
        }  # fmt: skip
    return params

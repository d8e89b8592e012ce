"""Makes the fixtures of test_fixtures.py: tiny random Llama 4 checkpoints and what transformers computes with them.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/parity/make_fixture.py [--out tests/parity/fixtures]

Each case is a folder with config.json and model.safetensors, as transformers saves them, and ref.npz (float32, eager
attention, one row of T = 40 tokens, chunks of 8):

    tokens [1, T]                 input, and with a shift by one the targets of the loss
    layer_NN [1, T, D]            residual stream after block NN
    router_logits_NN [T, E]       of MoE layers
    experts_NN [T, X]             the chosen ones, ascending
    logits [1, T, V], loss []     loss: mean cross entropy of the T - 1 next tokens
    grad/NAME                     gradient of the loss for the tensor NAME of model.safetensors
    greedy [1, 16]                tokens that greedy decoding adds to the first 20

The case `seeing` has a vision tower, and instead of layers, routers and greedy decoding

    images [1, 3, S, S, 3]        tiles: one image of one tile, and one of two; the targets of patch tokens do not count
    patches, norm_pre, norm_post [3, P, F], vision_NN [3, P, F]    of the tower; P patches and the class token last
    adapter [3, p, A], projector [3, p, D]

The first seed is taken for which no choice is close: neither the router's k-th and next logit nor the two best tokens of
a greedy step lie within MARGIN, so that rounding cannot flip them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

T, PROMPT, NEW = 40, 20, 16
MARGIN = 5e-3

COMMON = dict(
    vocab_size=64, hidden_size=16, intermediate_size=8, intermediate_size_mlp=24, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, max_position_embeddings=128, attention_chunk_size=8, floor_scale=4, attn_scale=0.1,
    attn_temperature_tuning=True, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3,
)  # fmt: skip
CASES = {
    # Scout's: experts everywhere, top-1, QK norm, scaled RoPE with high = low; a block of two layers that repeats.
    "scout_like": dict(
        num_local_experts=3, num_experts_per_tok=1, use_qk_norm=True, no_rope_layer_interval=2,
        rope_parameters=dict(
            rope_type="llama3", rope_theta=1e4, factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0,
            original_max_position_embeddings=32,
        ),
    ),
    # Maverick's: experts in every second layer, no QK norm, plain RoPE; here top-2, and a pattern that does not repeat.
    "maverick_like": dict(
        num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=2, use_qk_norm=False,
        no_rope_layers=[1, 1, 0, 0], rope_parameters=dict(rope_type="default", rope_theta=5e5),
    ),
}  # fmt: skip
SIZE, PATCH_TOKEN, START, END = 12, 60, 61, 62  # of a tile's side, and tokens
VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vision_output_dim=10, image_size=SIZE,
    patch_size=3, pixel_shuffle_ratio=0.5, projector_input_dim=10, projector_output_dim=10,
    rope_parameters=dict(rope_type="default", rope_theta=1e4),
)  # fmt: skip


def randomise(model, generator):
    """Weights that make routing, norms and biases all matter: matrices about N(0, 1.4 / fan in), norms about 1."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            value = 0.2 * noise
        elif "embed_tokens" in name or "positional" in name:
            value = 0.7 * noise
        else:
            value = 1.2 * noise * parameter.shape[1] ** -0.5
        with torch.no_grad():
            parameter.copy_(value)


def margin(logits, k):
    """Least distance between the k-th largest logit and the next, over all places."""
    best = logits.sort(-1, descending=True).values
    return float((best[..., k - 1] - best[..., k]).min())


def make(case, seed):
    """The model and its outputs, and the smallest margin of its choices."""
    generator = torch.Generator().manual_seed(seed)
    config = Llama4TextConfig(**COMMON, **CASES[case])
    config._attn_implementation = "eager"
    model = Llama4ForCausalLM(config).float().eval()
    randomise(model, generator)
    tokens = torch.randint(4, config.vocab_size, (1, T), generator=generator)
    ref, margins = {"tokens": tokens.numpy()}, []

    def keep_layer(layer):
        def hook(module, args, output):
            ref[f"layer_{layer:02d}"] = output.detach().numpy()

        return hook

    def keep_router(layer):
        def hook(module, args, output):
            ref[f"router_logits_{layer:02d}"] = output[1].detach().numpy()
            ref[f"experts_{layer:02d}"] = output[1].topk(module.top_k, dim=-1).indices.sort(-1).values.numpy()
            margins.append(margin(output[1].detach(), module.top_k))

        return hook

    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_hook(keep_layer(i)))
        if layer.is_moe_layer:
            handles.append(layer.feed_forward.router.register_forward_hook(keep_router(i)))
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    output.loss.backward()
    ref |= {"logits": output.logits.detach().numpy(), "loss": output.loss.detach().numpy()}
    ref |= {f"grad/{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()}

    text = tokens[:, :PROMPT]
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=text, use_cache=False).logits[:, -1]
        margins.append(margin(logits, 1))
        text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    ref["greedy"] = text[:, PROMPT:].numpy()
    return model, ref, min(margins)


def make_seeing(seed):
    """The same of a model that sees."""
    generator = torch.Generator().manual_seed(seed)
    config = Llama4Config(
        text_config={**COMMON, **CASES["scout_like"]}, vision_config=VISION, image_token_index=PATCH_TOKEN,
        boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    model = Llama4ForConditionalGeneration(config).float().eval()
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation = "eager"
    randomise(model, generator)
    tokens = torch.randint(4, PATCH_TOKEN, (1, T), generator=generator)
    tile = [PATCH_TOKEN] * 4
    tokens[0, 3:9] = torch.tensor([START, *tile, END])
    tokens[0, 12:22] = torch.tensor([START, *tile, *tile, END])
    images = 0.5 * torch.randn((3, 3, SIZE, SIZE), generator=generator)  # channels first
    ref, margins = {"tokens": tokens.numpy(), "images": images.permute(0, 2, 3, 1)[None].numpy()}, []

    def keep(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            ref[name] = output.detach().numpy().reshape(3, -1, output.shape[-1])

        return hook

    tower = model.vision_model
    modules = {"patches": tower.patch_embedding, "norm_pre": tower.layernorm_pre, "norm_post": tower.layernorm_post}
    modules |= {f"vision_{i:02d}": layer for i, layer in enumerate(tower.model.layers)}
    modules |= {"adapter": tower.vision_adapter, "projector": model.multi_modal_projector}
    for name, module in modules.items():
        module.register_forward_hook(keep(name))
    for layer in model.language_model.model.layers:
        layer.feed_forward.router.register_forward_hook(
            lambda m, a, output: margins.append(margin(output[1].detach(), m.top_k))
        )
    labels = torch.where(tokens == PATCH_TOKEN, -100, tokens)
    output = model(input_ids=tokens, pixel_values=images, labels=labels, use_cache=False)
    output.loss.backward()
    ref |= {"logits": output.logits.detach().numpy(), "loss": output.loss.detach().numpy()}
    ref |= {f"grad/{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return model, ref, min(margins)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fixtures")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for case in (*CASES, "seeing"):
        for seed in range(1000):
            model, ref, least = make_seeing(seed) if case == "seeing" else make(case, seed)
            if least > MARGIN:
                break
        else:
            raise RuntimeError(f"{case}: every seed has a choice within {MARGIN}")
        folder = out / case
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        np.savez_compressed(folder / "ref.npz", **ref)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{case}: seed {seed}, least margin {least:.1e}, loss {float(ref['loss']):.4f}, {size / 1000:.0f} KB")


if __name__ == "__main__":
    main()

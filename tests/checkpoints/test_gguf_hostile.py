"""Whatever the bytes of a GGUF say, opening and reading it ends in right tensors or in one line of UserError, at small cost."""

import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama4_jax.checkpoints.gguf import GgufReader
from llama4_jax.checkpoints.gguf_config import rope_factors
from llama4_jax.checkpoints.gguf_file import NewFile, _string_bytes, _value_bytes, read_header
from llama4_jax.config import RopeScaling
from llama4_jax.errors import UserError

pytest.importorskip("gguf", reason="gguf, llama.cpp's package, is not installed: pip install 'llama4-jax[gguf]'")

WORDS = ["a", "b", "ab", "<|end|>"]
METADATA = {
    "general.architecture": "llama4",
    "llama4.block_count": 1,
    "llama4.context_length": 64,
    "llama4.embedding_length": 8,
    "llama4.feed_forward_length": 16,
    "llama4.attention.head_count": 2,
    "llama4.attention.layer_norm_rms_epsilon": 1e-5,
    "llama4.expert_count": 2,
    "llama4.expert_used_count": 1,
    "llama4.expert_feed_forward_length": 32,
    "llama4.interleave_moe_layer_step": 1,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": WORDS,
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 3,
}
ATTENTION = {f"blk.0.attn_{part}.weight": ("f32", (8, 8)) for part in ("q", "k", "v", "output")}
SHARED = {f"blk.0.ffn_{part}_shexp.weight": ("f16", (32, 8) if part != "down" else (8, 32)) for part in ("gate", "up", "down")}
TENSORS = {
    "token_embd.weight": ("f32", (4, 8)),
    "blk.0.attn_norm.weight": ("f32", (8,)),
    **ATTENTION,
    "blk.0.ffn_norm.weight": ("f32", (8,)),
    "blk.0.ffn_gate_inp.weight": ("f32", (2, 8)),
    "blk.0.ffn_gate_exps.weight": ("bf16", (2, 32, 8)),
    "blk.0.ffn_up_exps.weight": ("bf16", (2, 32, 8)),
    "blk.0.ffn_down_exps.weight": ("q8_0", (2, 8, 32)),
    **SHARED,
    "output_norm.weight": ("f32", (8,)),
}


def build(path, metadata=METADATA, tensors=TENSORS):
    rng = np.random.default_rng(0)
    file = NewFile(path, metadata, tensors)
    for name, (_, shape) in tensors.items():
        file.write(name, rng.standard_normal(shape).astype(np.float32))
    file.finish()
    return path


def everything(path):
    """What a user of the reader touches."""
    with GgufReader(path) as reader:
        return reader.config, {name: reader.read(name) for name in reader.tensors}, dict(reader.beside)


def refused(path, *words):
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises(UserError) as error:
        everything(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(error.value)
    assert "\n" not in message and str(path) in message and all(word in message for word in words), message
    assert peak < 2**22 and time.monotonic() - start < 5


def test_the_file_of_these_tests_is_a_model(tmp_path):
    config, tensors, beside = everything(build(tmp_path / "m.gguf"))
    assert config.num_experts == 2 and config.vocab_size == 4 and config.eos_token_ids == (3,)
    assert tensors["model.layers.0.feed_forward.experts.gate_up_proj"].shape == (2, 8, 64)
    assert len(tensors) == len(TENSORS) - 1 and b'"ab"' in beside["tokenizer.json"]


# ------------------------------------------------------------------------------------------------------------------------
# Headers


def raw(path, *, pairs=(), tensors=(), num_pairs=None, num_tensors=None, version=3, data=b""):
    """A file of a header as it is given, and the data."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(pairs) if num_pairs is None else num_pairs)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + data)
    return path


def pair(key, value):
    return _string_bytes(key) + (value if isinstance(value, bytes) else _value_bytes(value))


def tensor(name="x", axes=(4,), kind=0, offset=0):
    return _string_bytes(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


HUGE, LAMA = 2**64 - 1, pair("general.architecture", "llama")
HEADERS = {
    "no GGUF": (lambda path: path.write_bytes(b"PK\3\4 and so on") and path, "not a GGUF"),
    "empty": (lambda path: path.touch() or path, "not a GGUF"),
    "only the magic": (lambda path: path.write_bytes(b"GGUF") and path, "do not fit"),
    "version 1": (lambda path: raw(path, version=1), "of version 1"),
    "big-endian": (lambda path: raw(path, version=3 << 24), "big-endian"),
    "more metadata than bytes": (lambda path: raw(path, num_pairs=HUGE), "metadata do not fit"),
    "more tensors than bytes": (lambda path: raw(path, pairs=[LAMA], num_tensors=HUGE), "tensors do not fit"),
    "a long key": (lambda path: raw(path, pairs=[struct.pack("<Q", HUGE) + b"a" * 20]), "key of the metadata do not fit"),
    "a long string": (lambda path: raw(path, pairs=[pair("k", struct.pack("<IQ", 8, 2**40))]), "of k do not fit"),
    "many strings": (lambda path: raw(path, pairs=[pair("k", struct.pack("<IIQ", 9, 8, 2**60))]), "strings of k do not fit"),
    "many numbers": (lambda path: raw(path, pairs=[pair("k", struct.pack("<IIQ", 9, 0, 2**62))]), "numbers of k do not fit"),
    "arrays in arrays": (lambda path: raw(path, pairs=[pair("k", struct.pack("<IIQ", 9, 9, 1))]), "k is an array of"),
    "an unknown type of value": (
        lambda path: raw(path, pairs=[pair("k", struct.pack("<IQ", 13, 1))]),
        "k has the unknown type",
    ),
    "a key that is no UTF-8": (lambda path: raw(path, pairs=[struct.pack("<Q", 2) + b"\xff\xfe" + _value_bytes(1)]), "UTF-8"),
    "a key twice": (lambda path: raw(path, pairs=[LAMA, LAMA]), "general.architecture twice"),
    "alignment of 0": (lambda path: raw(path, pairs=[pair("general.alignment", 0)]), "general.alignment is 0"),
    "alignment of 48": (lambda path: raw(path, pairs=[pair("general.alignment", 48)]), "general.alignment is 48"),
    "alignment in words": (lambda path: raw(path, pairs=[pair("general.alignment", "32")]), "general.alignment is '32'"),
    "a name of two lines": (lambda path: raw(path, tensors=[tensor("a\nb")], data=b"0" * 32), "not printable: 'a\\nb'"),
    "a long name": (lambda path: raw(path, tensors=[tensor("a" * 999)], data=b"0" * 32), "longer than 256"),
    "no axes": (lambda path: raw(path, tensors=[tensor(axes=())]), "x has 0 axes"),
    "many axes": (lambda path: raw(path, tensors=[tensor(axes=(1,) * 5)]), "x has 5 axes"),
    "an axis of 0": (lambda path: raw(path, tensors=[tensor(axes=(4, 0))]), "shape (0, 4)"),
    "a large shape": (lambda path: raw(path, tensors=[tensor(axes=(2**40, 2**40))], data=b"0" * 32), "truncated or damaged"),
    "an unknown type": (lambda path: raw(path, tensors=[tensor(kind=4)], data=b"0" * 32), "tensor x has the unknown type 4"),
    "a type without numbers": (lambda path: raw(path, tensors=[tensor(kind=26)], data=b"0" * 32), "tensor x is I32"),
    "part of a block": (lambda path: raw(path, tensors=[tensor(axes=(33,), kind=8)], data=b"0" * 64), "x, which is Q8_0"),
    "a crooked offset": (lambda path: raw(path, tensors=[tensor(offset=4)], data=b"0" * 64), "no multiple of 32"),
    "an offset outside": (lambda path: raw(path, tensors=[tensor(offset=2**63)], data=b"0" * 64), "truncated or damaged"),
    "a tensor twice": (lambda path: raw(path, tensors=[tensor(), tensor(offset=32)], data=b"0" * 64), "x is there twice"),
    "overlap": (
        lambda path: raw(path, tensors=[tensor(axes=(9,)), tensor("y", offset=32)], data=b"0" * 64),
        "y overlaps tensor x",
    ),
    "no architecture": (lambda path: raw(path), "general.architecture is missing"),
    "another architecture": (
        lambda path: raw(path, pairs=[pair("general.architecture", "qwen3")]),
        "'qwen3', but only llama and",
    ),
    "half a part": (lambda path: raw(path, pairs=[LAMA, pair("split.count", 7)]), "split.count is 7, not 1"),
    "parts in words": (lambda path: raw(path, pairs=[LAMA, pair("split.count", "7")]), "split.count is '7'"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_hostile_header_is_refused_at_once(tmp_path, case):
    make, words = HEADERS[case]
    refused(make(tmp_path / "m.gguf"), words)


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    refused(tmp_path, "cannot be read")
    refused(tmp_path / "none.gguf", "no such file")


# ------------------------------------------------------------------------------------------------------------------------
# Contents

FACTORS = rope_factors(RopeScaling(), 500_000.0, 4)
CONTENTS = {
    "layers without end": ({"llama4.block_count": 2**31}, {}, "block_count is 2147483648, but there are 15 tensors"),
    "a missing key": ({"llama4.embedding_length": None}, {}, "llama4.embedding_length is missing"),
    "words for a number": ({"llama4.expert_count": "two"}, {}, "llama4.expert_count must be of type int, got 'two'"),
    "no heads": ({"llama4.attention.head_count": 0}, {}, "head_count must be positive"),
    "a NaN": ({"llama4.attention.layer_norm_rms_epsilon": float("nan")}, {}, "norm_eps must be positive, got nan"),
    "more experts than there are": ({"llama4.expert_used_count": 3}, {}, "experts_per_token must be 1 to"),
    "an interval of 0": ({"llama4.interleave_moe_layer_step": 0}, {}, "interleave_moe_layer_step must be 1 or more"),
    "no window": ({"llama4.attention.sliding_window": 0}, {}, "sliding_window is 0"),
    "a scaled softmax": ({"llama4.attention.scale": 0.5}, {}, "attention.scale is 0.5"),
    "YaRN": ({"llama4.rope.scaling.type": "yarn"}, {}, "rope.scaling.type is 'yarn'"),
    "a partial rotation": ({"llama4.rope.dimension_count": 2}, {}, "rope.dimension_count is 2"),
    "Mixtral": ({"general.architecture": "llama", **{k.replace("4.", "."): v for k, v in METADATA.items() if "4." in k}}, {},
                "llama.expert_count is 2: only llama4's experts"),
    "an unknown tensor": ({}, {"blk.0.attn_q_norm.weight": ("f32", (8,))}, "attn_q_norm.weight has no place"),
    "a name like a number": ({}, {"blk.99999999.attn_norm.weight": ("f32", (8,))}, "has no place"),
    "gate without up": ({}, {"blk.0.ffn_up_exps.weight": None}, "blk.0.ffn_up_exps.weight is missing"),
    "up without gate": ({}, {"blk.0.ffn_gate_exps.weight": None}, "blk.0.ffn_up_exps.weight has no place"),
    "gate unlike up": ({}, {"blk.0.ffn_up_exps.weight": ("bf16", (2, 32, 16))}, "does not continue"),
    "flat experts": ({}, {"blk.0.ffn_down_exps.weight": ("q8_0", (16, 32))}, "experts have three axes"),
    "factors of another head": ({}, {"rope_freqs.weight": ("f32", (3,))}, "rope_freqs.weight has shape (3,)"),
    "random factors": ({}, {"rope_freqs.weight": ("f32", (2,))}, "factors that no known scaling"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "b", "ab", "a"]}, {}, "holds a token twice"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["a c"]}, {}, "holds 'a c', which does not join two tokens"),
    "half a merge": ({"tokenizer.ggml.merges": ["ab"]}, {}, "holds 'ab', which does not join"),
    "too few types": ({"tokenizer.ggml.token_type": [1]}, {}, "token_type must be 4 numbers"),
    "an end outside": ({"tokenizer.ggml.eos_token_id": 4}, {}, "eos_token_id is 4, but there are 4 tokens"),
    "tokens in numbers": ({"tokenizer.ggml.tokens": [1, 2]}, {}, "tokenizer.ggml.tokens must be of type list"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_are_no_model_are_refused_by_key_or_tensor(tmp_path, case):
    metadata, tensors, words = CONTENTS[case]
    metadata = {key: value for key, value in {**METADATA, **metadata}.items() if value is not None}
    tensors = {name: kind for name, kind in {**TENSORS, **tensors}.items() if kind is not None}
    refused(build(tmp_path / "m.gguf", metadata, tensors), words)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_truncated_file_is_refused_and_names_what_is_missing(tmp_path_factory, data):
    path, content = fuzzed(tmp_path_factory)
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refused(path)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_give_a_model_or_one_line(tmp_path_factory, data):
    """Changes in the data are changes of numbers; in the header, they are refused or make another model of the same bytes."""
    path, content = fuzzed(tmp_path_factory)
    header = min(tensor.offset for tensor in read_header(path.with_name("whole.gguf")).tensors.values())
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(content) - 1))
        value = data.draw(
            st.sampled_from([b"\0", b"\xff", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\0" * 8]) | st.binary(max_size=8)
        )
        changed[at : at + len(value)] = value
    path.write_bytes(changed[: len(content)])
    tracemalloc.start()
    try:
        with warnings.catch_warnings(action="ignore"):
            _, tensors, _ = everything(path)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) < 8 * len(content)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**22


def fuzzed(tmp_path_factory):
    whole = tmp_path_factory.getbasetemp() / "whole.gguf"
    if not whole.exists():
        build(whole)
    return whole.with_name("fuzzed.gguf"), whole.read_bytes()

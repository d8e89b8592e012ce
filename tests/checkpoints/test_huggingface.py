import dataclasses
import json
import os
import weakref

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax.checkpoints import huggingface_writer
from llama4_jax.checkpoints.load import load_config, load_pretrained
from llama4_jax.checkpoints.readers import SourceReader
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params, init_model_state

# Every kind of tensor: dense and MoE layers, with and without RoPE, biases; two blocks of two layers.
CONFIG = ModelConfig(
    vocab_size=11, hidden_size=6, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=3, expert_ffn_size=5,
    dense_ffn_size=7, moe_interval=2, nope_interval=2, attention_bias=True, bos_token_id=0, eos_token_ids=(1, 2), pad_token_id=3,
)  # fmt: skip
MULTIMODAL = dataclasses.replace(
    CONFIG,
    vision=VisionConfig(
        hidden_size=8, num_layers=2, num_heads=2, mlp_size=32, image_size=8, patch_size=4, adapter_size=5, patch_token_id=9,
        image_start_token_id=8, image_end_token_id=7,
    ),
)  # fmt: skip
QUERY = "model.layers.1.self_attn.q_proj.weight"


def numbered_params(config, dtype=jnp.float32):
    """Parameters in which all numbers differ, so that every permutation shows."""
    shapes, tree = jax.tree.flatten(abstract_params(Llama4(config)))
    ends = np.cumsum([np.prod(leaf.shape) for leaf in shapes])
    return tree.unflatten(
        [
            jnp.arange(end - np.prod(leaf.shape), end).reshape(leaf.shape).astype(dtype)
            for leaf, end in zip(shapes, ends, strict=True)
        ]
    )


def assert_same(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)
    assert [x.dtype for x in jax.tree.leaves(tree)] == [x.dtype for x in jax.tree.leaves(other)]


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", CONFIG, numbered_params(CONFIG))
    return tmp_path / "model"


def edit_tensors(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def edit_json(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        load_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# Layouts


def test_each_tensor_lies_where_the_published_layout_has_it(folder):
    params, stored = numbered_params(CONFIG), load_file(folder / "model.safetensors")
    dense, moe = params["layers"]["layer_0"], params["layers"]["layer_1"]  # layers 2 and 3 are their second instances
    name = "model.layers.3."
    for d in range(CONFIG.hidden_size):
        assert stored[name + "self_attn.k_proj.weight"][1 * 4 + 2, d] == moe["attention"]["key"]["kernel"][1, d, 1, 2]
        assert stored[name + "self_attn.o_proj.weight"][d, 3 * 4 + 1] == moe["attention"]["output"]["kernel"][1, 3, 1, d]
        assert stored[name + "feed_forward.router.weight"][2, d] == moe["feed_forward"]["router"]["kernel"][1, d, 2]
        experts = moe["feed_forward"]["experts"]
        assert stored[name + "feed_forward.experts.gate_up_proj"][2, d, 4] == experts["gate_up"]["kernel"][1, 2, 0, d, 4]
        assert stored[name + "feed_forward.experts.gate_up_proj"][2, d, 5 + 1] == experts["gate_up"]["kernel"][1, 2, 1, d, 1]
        assert stored[name + "feed_forward.experts.down_proj"][2, 3, d] == experts["down"]["kernel"][1, 2, 3, d]
        shared = moe["feed_forward"]["shared_expert"]
        assert stored[name + "feed_forward.shared_expert.up_proj.weight"][4, d] == shared["gate_up"]["kernel"][1, d, 1, 4]
        feed_forward = dense["feed_forward"]
        assert stored["model.layers.2.feed_forward.gate_proj.weight"][6, d] == feed_forward["gate_up"]["kernel"][1, d, 0, 6]
        assert stored["model.layers.2.feed_forward.down_proj.weight"][d, 6] == feed_forward["down"]["kernel"][1, 6, d]
        assert stored["lm_head.weight"][9, d] == params["lm_head"]["kernel"][d, 9]
    assert stored[name + "self_attn.q_proj.bias"][2 * 4 + 3] == moe["attention"]["query"]["bias"][1, 2, 3]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_what_is_saved_loads_back_bit_for_bit_in_its_dtype(tmp_path, dtype):
    params = numbered_params(CONFIG, dtype)
    save_pretrained(tmp_path / "model", CONFIG, params)
    model, again = load_pretrained(tmp_path / "model")
    assert model.config == CONFIG
    assert_same(again, params)


def test_a_tied_model_has_no_head(tmp_path):
    config = ModelConfig(**vars(CONFIG) | {"tie_embeddings": True})
    save_pretrained(tmp_path / "model", config, numbered_params(config))
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert_same(load_pretrained(tmp_path / "model")[1], numbered_params(config))


def test_dtype_converts_on_the_way_in(folder):
    _, params = load_pretrained(folder, dtype=jnp.bfloat16)
    assert_same(params, numbered_params(CONFIG, jnp.bfloat16))


def test_a_parameter_stacked_from_layers_of_two_dtypes_takes_the_wider(folder):
    def shorten(tensors):
        tensors[QUERY] = tensors[QUERY].astype(ml_dtypes.bfloat16)

    edit_tensors(folder, shorten)
    kernel, wanted = (
        params["layers"]["layer_1"]["attention"]["query"]["kernel"]
        for params in (load_pretrained(folder)[1], numbered_params(CONFIG))
    )
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(kernel[0], wanted[0].astype(jnp.bfloat16))
    np.testing.assert_array_equal(kernel[1], wanted[1])


# Files


def test_a_large_checkpoint_is_split_under_an_index_and_loads_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_writer, "MAX_SHARD_BYTES", 1000)
    save_pretrained(tmp_path / "model", CONFIG, numbered_params(CONFIG))
    files = sorted(tmp_path.glob("model/*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    found = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(x.nbytes for file in files for x in load_file(file).values())
    assert all(sum(x.nbytes for x in load_file(file).values()) <= 1000 or len(load_file(file)) == 1 for file in files)
    assert_same(load_pretrained(tmp_path / "model")[1], numbered_params(CONFIG))


def test_a_multimodal_checkpoint_loads_whole_or_its_text_alone(tmp_path):
    params = numbered_params(MULTIMODAL)
    save_pretrained(tmp_path / "model", MULTIMODAL, params)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {name.split(".")[0] for name in stored} == {"language_model", "vision_model", "multi_modal_projector"}
    patch = stored["vision_model.patch_embedding.linear.weight"]
    assert patch[5, 2 * 4 * 4 + 3 * 4 + 1] == params["vision"]["patch_embedding"]["kernel"][3, 1, 2, 5]  # channel, row, column
    assert load_config(tmp_path / "model") == MULTIMODAL
    assert_same(load_pretrained(tmp_path / "model")[1], params)
    model, text = load_pretrained(tmp_path / "model", text_only=True)
    assert model.config == CONFIG
    assert_same(text, {name: tree for name, tree in params.items() if name != "vision"})


def test_stored_rotary_frequencies_and_a_repeated_tied_head_are_ignored(folder):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    edit_tensors(folder, add)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    model, params = load_pretrained(folder)
    assert model.config.tie_embeddings and "lm_head" not in params


# Refusals


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(QUERY))
    refused(folder, str(folder), f"tensor {QUERY} is missing;")


def test_an_extra_tensor_is_named_with_its_file(folder):
    edit_tensors(folder, lambda tensors: tensors.update(a=np.zeros(1, np.float32), b=np.zeros(1, np.float32)))
    refused(folder, "model.safetensors: tensor a (and 1 more) has no place")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros((6, 16), np.float32)}))
    refused(folder, "model.safetensors", QUERY, "(6, 16)", "(16, 6)")


def test_a_tensor_of_integers_is_refused(folder):
    edit_tensors(folder, lambda tensors: tensors.update({QUERY: np.zeros((16, 6), np.int8)}))
    refused(folder, "model.safetensors", QUERY, "I8")


def test_a_tied_head_that_differs_is_refused(folder):
    edit_json(folder / "config.json", tie_word_embeddings=True)
    refused(folder, "lm_head.weight differs from the embedding")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, str(file), "truncated or not a safetensors file")


def test_a_folder_without_weights_or_config_and_no_folder_at_all_are_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    refused(folder, "holds neither model.safetensors nor model.safetensors.index.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json: no such file")
    refused(tmp_path / "nowhere", "nowhere: no such file or folder")
    refused(folder / "generation_config.json", "is a file, and no GGUF; give the folder")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"model_type": "llama4_text", "head_dim": 3}'])
def test_a_corrupt_or_invalid_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, str(folder / "config.json"))


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (None, "weight_map must map"),
        ({}, "weight_map must map"),
        ({"lm_head.weight": 3}, "weight_map must map"),
        ({"lm_head.weight": "../other.safetensors"}, "is no file of this folder"),
        ({"lm_head.weight": "two\nlines"}, "is no file of this folder"),
        ({"lm_head.weight": "\ud800"}, "is no file of this folder"),
        ({"lm_head.weight": "gone.safetensors"}, "gone.safetensors: no such file"),
        (
            {"gone.weight": "part.safetensors"},
            "tensor gone.weight is missing, but model.safetensors.index.json places it there",
        ),
        ({"lm_head.weight": "part.safetensors"}, "tensor model.embed_tokens.weight is missing (and"),
    ],
)
def test_a_wrong_index_is_named(folder, weight_map, words):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, words)


def test_a_multimodal_configuration_must_have_all_of_its_tower(folder):
    text = json.loads((folder / "config.json").read_text())
    vision = {"hidden_size": 1408, "vision_output_dim": 4096, "image_size": 336}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": text, "vision_config": vision}))
    refused(folder, "tensor vision_model.patch_embedding.linear.weight is missing (and")
    assert load_pretrained(folder, text_only=True)[0].config == CONFIG


def test_an_unreachable_hub_is_one_line(monkeypatch, folder):
    def fail(name, allow_patterns):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("meta-llama/Llama-4-Scout-17B-16E", "no such folder, and the hub does not give it: no route")


def test_a_hub_id_is_fetched(monkeypatch, folder):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(folder))
    assert_same(load_pretrained("some/model")[1], numbered_params(CONFIG))
    assert load_config("some/model") == CONFIG and asked == ["some/model"] * 2


# Saving


def test_what_transformers_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    config = ModelConfig(**vars(CONFIG) | {"shared_expert": False})
    with pytest.raises(UserError, match="shared_expert=False"):
        save_pretrained(tmp_path / "model", config, numbered_params(config))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["final_norm"].pop("scale"), "final_norm/scale is missing"),
        (lambda p: p["final_norm"].update(bias=jnp.zeros(6)), "final_norm/bias has no place"),
        (lambda p: p["final_norm"].update(scale=jnp.zeros(5)), r"final_norm/scale has shape \(5,\)"),
        (lambda p: p["final_norm"].update(scale=jnp.zeros(6, jnp.int8)), "final_norm/scale is int8"),
    ],
)
def test_parameters_of_another_model_are_refused_by_name(tmp_path, change, words):
    params = numbered_params(CONFIG)
    change(params)
    with pytest.raises(UserError, match=words):
        save_pretrained(tmp_path / "model", CONFIG, params)
    assert not list(tmp_path.iterdir())


def test_a_router_bias_is_refused_by_name_unless_zero_or_dropped(tmp_path):
    config = dataclasses.replace(CONFIG, router_bias=True)
    params, state = numbered_params(CONFIG), init_model_state(Llama4(config))
    layer = next(iter(state["router_bias"]["layers"]))
    moved = jax.tree.map(lambda x: x, state)
    moved["router_bias"]["layers"][layer]["feed_forward"]["router"]["bias"] -= 0.125
    with pytest.raises(UserError, match="router_bias is true: give model_state"):
        save_pretrained(tmp_path / "model", config, params)
    with pytest.raises(
        UserError, match=rf"router_bias/layers/{layer}/.* reaches 0.125, and published .*anneal.*drop_router_bias"
    ):
        save_pretrained(tmp_path / "model", config, params, moved)
    assert not list(tmp_path.iterdir())
    save_pretrained(tmp_path / "zero", config, params, state)
    save_pretrained(tmp_path / "dropped", config, params, moved, drop_router_bias=True)
    save_pretrained(tmp_path / "never", CONFIG, params)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "zero" / name).read_bytes() == (tmp_path / "never" / name).read_bytes()
        assert (tmp_path / "dropped" / name).read_bytes() == (tmp_path / "never" / name).read_bytes()


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="used: already holds files"):
        save_pretrained(tmp_path / "used", CONFIG, numbered_params(CONFIG))
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_pretrained(tmp_path / "empty", CONFIG, numbered_params(CONFIG))
    assert sorted(os.listdir(tmp_path / "empty")) == ["config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, error):
    write, writes = os.pwrite, []

    def fail_halfway(descriptor, content, offset):
        writes.append(len(content))
        if len(writes) > 10:
            raise error
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", fail_halfway)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        save_pretrained(tmp_path / "model", CONFIG, numbered_params(CONFIG))
    if isinstance(error, OSError):
        assert "model: cannot be written" in str(raised.value) and "No space left" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_pretrained(tmp_path / "file" / "model", CONFIG, numbered_params(CONFIG))


def test_reading_holds_one_tensor_beside_the_result(folder, monkeypatch):
    """By counting what is alive: each tensor is dropped before the next is read."""
    alive, most = weakref.WeakSet(), 0
    read = SourceReader.read

    class Tracked(np.ndarray):
        __hash__ = object.__hash__

    def tracked(self, *args):
        nonlocal most
        array = read(self, *args).view(Tracked)
        alive.add(array)
        most = max(most, len(alive))
        return array

    monkeypatch.setattr(SourceReader, "read", tracked)
    load_pretrained(folder)
    assert most == 1

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llama4_jax.checkpoints import conversion, huggingface_writer
from llama4_jax.checkpoints.conversion import convert
from llama4_jax.checkpoints.load import load_pretrained
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.checkpoints.orbax_writer import OrbaxWriter
from llama4_jax.checkpoints.partial_folder import verify
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params

TEXT = ModelConfig(
    vocab_size=12, hidden_size=8, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4, num_experts=3, expert_ffn_size=6,
    dense_ffn_size=8, moe_interval=2, nope_interval=2, bos_token_id=0, eos_token_ids=(1,), pad_token_id=2,
)  # fmt: skip
VISION = VisionConfig(
    hidden_size=8, num_layers=2, num_heads=2, mlp_size=32, image_size=8, patch_size=4, adapter_size=5, patch_token_id=9,
    image_start_token_id=8, image_end_token_id=7,
)  # fmt: skip
CONFIG = dataclasses.replace(TEXT, vision=VISION)
NORM = "language_model.model.norm.weight"


def random_params(config, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32), abstract_params(Llama4(config)))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    save_pretrained(folder, CONFIG, random_params(CONFIG))
    (folder / "tokenizer.json").write_text('{"of": "the user"}')
    (folder / "LICENSE").write_text("terms")
    (folder / "modeling.py").write_text("import os")  # code, which is not carried
    return folder


@pytest.fixture
def source(original, tmp_path):
    shutil.copytree(original, tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(huggingface_writer, "MAX_SHARD_BYTES", 2000)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_model(one, other):
    (first, params), (second, again) = load_pretrained(one), load_pretrained(other)
    assert first.config == second.config
    jax.tree.map(np.testing.assert_array_equal, params, again)


def edit(source, name, value):
    tensors = load_file(source / "model.safetensors")
    tensors[name] = value(tensors[name])
    save_file(tensors, source / "model.safetensors")


def refused(*words, **call):
    with pytest.raises(UserError) as error:
        convert(**call)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


# What is written


@pytest.mark.parametrize("way", [("hf",), ("orbax", "hf"), ("orbax", "orbax")])
def test_every_format_holds_the_same_model_and_its_words(source, tmp_path, way):
    last = source
    for step, format in enumerate(way):
        converted = convert(last, tmp_path / f"step_{step}", format=format)
        last = converted.path
        assert verify(last) == len(contents(last)) - 1
    assert_same_model(source, last)
    assert (last / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (last / "LICENSE").exists() and not (last / "modeling.py").exists()


def test_what_comes_back_to_hugging_face_is_the_same_file(source, tmp_path):
    convert(source, tmp_path / "orbax", format="orbax")
    convert(tmp_path / "orbax", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_orbax_itself_restores_what_is_written(source, tmp_path):
    import orbax.checkpoint as ocp

    convert(source, tmp_path / "orbax", format="orbax")
    _, params = load_pretrained(source)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    restored = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "params", target)
    jax.tree.map(np.testing.assert_array_equal, restored, params)


@pytest.mark.parametrize(("format", "dtype"), [("hf", "bfloat16"), ("hf", "float16"), ("orbax", "bfloat16")])
def test_a_dtype_is_rounded_to(source, tmp_path, dtype, format):
    convert(source, tmp_path / "target", format=format, dtype=dtype)
    wanted = jax.tree.map(lambda x: x.astype(dtype), load_pretrained(source)[1])
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "target")[1], wanted)
    if format == "hf":
        assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == dtype


def test_the_tower_can_be_left_out(source, tmp_path):
    convert(source, tmp_path / "target", text_only=True)
    assert load_pretrained(tmp_path / "target")[0].config == TEXT


def test_a_parameter_of_layers_of_two_dtypes_needs_one_for_orbax(source, tmp_path):
    edit(source, "language_model.model.layers.0.self_attn.q_proj.weight", lambda x: x.astype(np.float16))
    refused(
        "layers/layer_0/attention/query/kernel", "float16 and float32", source=source, target=tmp_path / "a", format="orbax"
    )
    convert(source, tmp_path / "b", format="orbax", dtype="float32")
    assert_same_model(source, tmp_path / "b")


# What is refused


def test_a_tensor_that_is_not_finite_is_named_unless_allowed(source, tmp_path):
    edit(source, NORM, lambda x: np.where(np.arange(len(x)) == 5, np.nan, x).astype(np.float32))
    refused(f"model.safetensors: tensor {NORM} holds NaN or infinity", source=source, target=tmp_path / "target")
    assert not (tmp_path / "target").exists()
    with pytest.raises(UserError, match=NORM):
        load_pretrained(source)
    convert(source, tmp_path / "target", allow_nonfinite=True)
    assert np.isnan(load_pretrained(tmp_path / "target", allow_nonfinite=True)[1]["final_norm"]["scale"][5])


def test_a_number_that_the_dtype_cannot_hold_is_named(source, tmp_path):
    edit(source, NORM, lambda x: x * 0 + 70_000)
    refused(NORM, "as float16, holds NaN or infinity", source=source, target=tmp_path / "a", dtype="float16")
    convert(source, tmp_path / "b", dtype="bfloat16")


def test_a_missing_tensor_is_named_before_anything_is_written(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, source / "model.safetensors")
    refused("tensor model.norm.weight is missing", source=source, target=tmp_path / "target")
    assert os.listdir(tmp_path) == ["source"]


def test_no_room_no_format_and_a_place_in_use_are_said(source, tmp_path, monkeypatch):
    refused("format 'gptq' must be one of", source=source, target=tmp_path / "a", format="gptq")
    refused("dtype 'int3' of hf must be", source=source, target=tmp_path / "a", dtype="int3")
    refused("already holds files", source=source, target=source)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: usage)
    refused("but the disk has 1,000 free", source=source, target=tmp_path / "deep" / "a")


# Interruptions


class Stopped(Exception):
    pass


def stop_after(monkeypatch, writer, count):
    """The writer takes so many tensors and then stops, once."""
    write, written = writer.write, []

    def counted(self, name, tensor):
        if len(written) == count:
            raise Stopped
        written.append(name)
        write(self, name, tensor)

    monkeypatch.setattr(writer, "write", counted)
    return written


@pytest.mark.parametrize(("format", "count"), [("hf", 0), ("hf", 1), ("hf", 30), ("hf", 60), ("orbax", 30)])
def test_what_is_whole_is_kept_and_the_end_is_the_same(source, tmp_path, monkeypatch, small_files, format, count):
    writer = {"hf": huggingface_writer.HuggingFaceWriter, "orbax": OrbaxWriter}[format]
    convert(source, tmp_path / "straight", format=format)
    with monkeypatch.context() as patch:
        written = stop_after(patch, writer, count)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "target", format=format)
        assert not (tmp_path / "target").exists()
        written.clear()
        written += [None] * (count + 1)  # the rest is counted, and not stopped
        converted = convert(source, tmp_path / "target", format=format)
    again = written[count + 1 :]
    assert converted.kept == converted.tensors - len(again)
    assert converted.kept > count // 2 - 1 if format == "hf" else converted.kept == count
    assert contents(tmp_path / "target") == contents(tmp_path / "straight")
    assert sorted(os.listdir(tmp_path)) == ["source", "straight", "target"]


def test_a_kept_file_that_was_damaged_meanwhile_is_written_again(source, tmp_path, monkeypatch, small_files):
    convert(source, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, huggingface_writer.HuggingFaceWriter, 40)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "target")
    partial = tmp_path / ".target.partial"
    first = min(partial.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    (partial / "stray").write_text("left over")
    convert(source, tmp_path / "target")
    assert contents(tmp_path / "target") == contents(tmp_path / "straight")


def test_what_another_conversion_left_is_not_gone_on_with(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, huggingface_writer.HuggingFaceWriter, 40)
        with pytest.raises(Stopped):
            convert(source, tmp_path / "target")
    refused("holds an unfinished conversion of something else", source=source, target=tmp_path / "target", dtype="bfloat16")
    edit(source, NORM, lambda x: x + 1)
    refused("holds an unfinished conversion of something else", source=source, target=tmp_path / "target")


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from llama4_jax.checkpoints import huggingface_writer
from llama4_jax.checkpoints.conversion import convert

huggingface_writer.MAX_SHARD_BYTES = 2000
source, target, format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def child():
    pid = os.fork()
    if pid == 0:
        try:
            convert(source, target, format=format)
        finally:
            os._exit(0 if target.exists() else 1)
    return pid

start = time.time()
os.waitpid(child(), 0)  # how long it takes
took, kills = time.time() - start, 0
target.rename(target.with_name("straight"))
moments = random.Random(0)
for _ in range(20):
    pid = child()
    time.sleep(moments.uniform(0, took))
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    if target.exists():
        target.rename(target.with_name(f"done_{_}"))
    if kills >= 8:
        break
while not target.exists():
    os.waitpid(child(), 0)
print(kills)
"""


@pytest.mark.parametrize("format", ["hf", pytest.param("orbax", marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_the_same_byte_for_byte(source, tmp_path, format):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(source), str(tmp_path / "target"), format],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 5
    wanted = contents(tmp_path / "straight")
    for folder in tmp_path.glob("done*"):
        assert contents(folder) == wanted
    assert contents(tmp_path / "target") == wanted
    assert not list(tmp_path.glob(".*"))


# Verifying


def test_verifying_names_what_is_missing_or_not_what_was_written(source, tmp_path):
    target = convert(source, tmp_path / "target").path
    sums = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=target, capture_output=True, text=True)
    assert (sums.returncode, sums.stdout) == (0, "")
    file = target / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors: is not what was written"):
        verify(target)
    file.unlink()
    with pytest.raises(UserError, match=r"model.safetensors: is missing"):
        verify(target)
    with pytest.raises(UserError, match="has no SHA256SUMS"):
        verify(source)


def test_an_open_checkpoint_says_what_it_is(source, tmp_path):
    with pytest.raises(UserError, match="only consolidated files are given a configuration by name"):
        open_checkpoint(source, config_name="scout-17b-16e")
    (tmp_path / "file").write_text("text")
    with pytest.raises(UserError, match="is a file, and no GGUF"):
        open_checkpoint(tmp_path / "file")

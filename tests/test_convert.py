"""The command line around conversion, which has its own tests in tests/checkpoints."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

import llama4_jax as l4
from llama4_jax.config import ModelConfig
from llama4_jax.model.llama4 import Llama4, init_params

CONFIG = ModelConfig(
    vocab_size=12, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, dense_ffn_size=8, moe_interval=0,
    bos_token_id=0, eos_token_ids=(1,), pad_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    l4.save_pretrained(folder / "dense", CONFIG, init_params(Llama4(CONFIG), jax.random.key(0)))
    return folder


def run(*arguments):
    command = [sys.executable, "-m", "llama4_jax.convert", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)


def test_a_dense_model_becomes_a_mixture_and_is_verified(folder):
    made = run(f"--from={folder / 'dense'}", f"--to={folder / 'mixture'}", "--upcycle=experts:3", "--dtype=bfloat16")
    assert (made.returncode, made.stderr) == (0, "")
    assert f"{folder / 'mixture'}: 27 tensors of " in made.stdout
    config = l4.load_config(folder / "mixture")
    assert (config.num_experts, config.moe_interval) == (3, 1)
    verified = run(f"--verify={folder / 'mixture'}")
    assert verified.returncode == 0 and "3 files are what was written" in verified.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--from=PATH and --to=PATH are both needed"),
        (["--from=x"], "--from=PATH and --to=PATH are both needed"),
        (["--from=x", "--to=y", "--verify=z"], "or --verify=PATH alone"),
        (["--from=/nowhere", "--to=y"], "/nowhere: no such file or folder"),
        (["--from={dense}", "--to=y", "--upcycle=widgets:3"], "widgets:3"),
        (["--from={dense}", "--to=y", "--format=zip"], "--format"),
        (["--form=x"], "did you mean --"),
        (["--verify={dense}"], "has no SHA256SUMS"),
        (["--config.model.num_layers=3"], "a conversion has no experiment"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(folder, arguments, words):
    result = run(*(argument.format(dense=folder / "dense") for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr

"""The app that writes text: prompts, batches, conversations and pictures from the command line, and its refusals in one line."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.inference.generator import Limits, load_generator
from llama4_jax.model.llama4 import Llama4, init_params
from llama4_jax.processing.processor import Processor
from llama4_jax.processing.ranks import named_special_tokens
from llama4_jax.processing.tokenizer import Tokenizer

TOKEN = {name: token for token, name in enumerate(named_special_tokens())}
CONFIG = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=2,
    expert_ffn_size=32,
    attention_chunk_size=64,
    initializer_range=0.3,
    max_position_embeddings=512,
    bos_token_id=TOKEN["<|begin_of_text|>"],
    eos_token_ids=(TOKEN["<|end_of_text|>"],),
    pad_token_id=TOKEN["<|finetune_right_pad|>"],
    vision=VisionConfig(
        hidden_size=16, num_layers=1, num_heads=2, mlp_size=64, image_size=12, patch_size=3, adapter_size=8,
        patch_token_id=TOKEN["<|patch|>"], image_start_token_id=TOKEN["<|image_start|>"],
        image_end_token_id=TOKEN["<|image_end|>"],
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint's folder with a tokenizer, beside it a picture and a conversation about it."""
    folder = tmp_path_factory.mktemp("generate")
    save_pretrained(folder / "model", CONFIG, init_params(Llama4(CONFIG), jax.random.key(0)))
    tokenizer = Tokenizer.train_bpe(["the cat sat on the mat " * 20], 320, named_special_tokens())
    Processor(tokenizer, CONFIG).save(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    parts = [{"type": "image", "path": str(folder / "picture.png")}, {"type": "text", "text": "the cat"}]
    (folder / "conversation.json").write_text(json.dumps([{"role": "user", "content": parts}]))
    return folder


def run(*arguments, text=None):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "llama4_jax.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=text, timeout=300, env=environment)


def test_a_prompt_goes_on_as_the_library_has_it(model):
    done = run(f"--model={model}/model", "--prompt=the cat", "--max_new_tokens=6")
    assert done.returncode == 0, done.stderr
    want = load_generator(f"{model}/model").complete(["the cat"], limits=Limits(6))[0].text
    assert done.stdout.rstrip("\n") == want.rstrip("\n")


def test_a_picture_and_a_conversation_from_files_are_the_same_prompt(model):
    """Each is answered, and pictures change the answer's prompt: three tiles of four patches here."""
    flags = [f"--model={model}/model", "--max_new_tokens=6"]
    spoken = run(*flags, "--chat", "--prompt=the cat", f"--image={model}/picture.png")
    written = run(*flags, f"--messages={model}/conversation.json")
    assert spoken.returncode == written.returncode == 0, spoken.stderr + written.stderr
    assert spoken.stdout == written.stdout
    processor = load_generator(f"{model}/model").processor
    prompt = processor.chat(json.loads((model / "conversation.json").read_text()))
    assert prompt.tokens.count(TOKEN["<|patch|>"]) == 4 * len(prompt.tiles) > 4


def test_a_conversation_in_the_terminal_reads_every_turn(model):
    done = run(f"--model={model}/model", "--chat", "--system=sat", "--max_new_tokens=3", text="the\ncat\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 3  # the third finds the end of the input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt=x"], "--model=DIR is needed"),
        (["--model=nowhere", "--prompt=x"], "nowhere"),
        (["--model=MODEL"], "nothing to go on from"),
        (["--model=MODEL", "--promt=x"], "did you mean --prompt"),
        (["--model=MODEL", "--prompt=x", "--video=v.mp4"], "--video needs --chat"),
        (["--model=MODEL", "--prompt=x", "--prompt=y", "--image=a.png"], "pictures go with one prompt, got 2"),
        (["--model=MODEL", "--prompt=x", "--image=missing.png"], "missing.png"),
        (["--model=MODEL", "--prompt=x", "--top_p=2"], r"top_p must lie in (0, 1], got 2.0"),
        (["--model=MODEL", "--prompt=x", "--max_new_tokens=511"], "exceed the model's 512 positions"),
    ],
)
def test_bad_input_is_one_line(model, arguments, message):
    done = run(*(argument.replace("MODEL", f"{model}/model") for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr

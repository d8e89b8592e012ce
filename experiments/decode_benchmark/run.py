r"""Greedy decoding of one small Llama 4 on a CPU, by us and by transformers, from the same weights and one after another.

    python experiments/decode_benchmark/run.py --transformers=PYTHON

PYTHON is the interpreter of an environment with torch and transformers; without it ours runs alone, and the table says so. A dense
model that works as hard on each token runs beside the mixture. The table also says how many of the tokens are the same.
README.md beside this file has the results.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import shape as s

import llama4_jax as l4

FOLDER = pathlib.Path(__file__).parent
SHAPE = {
    "vocab_size": s.VOCAB, "hidden_size": s.HIDDEN, "num_layers": s.LAYERS, "num_heads": s.HEADS, "num_kv_heads": s.KV_HEADS,
    "head_dim": s.HEAD_DIM, "attention_chunk_size": s.CHUNK, "initializer_range": 0.1, "max_position_embeddings": 8192,
    "bos_token_id": 0, "eos_token_ids": (1,), "pad_token_id": 2,
}  # fmt: skip
MODELS = {
    "mixture": l4.ModelConfig(**SHAPE, num_experts=s.EXPERTS, experts_per_token=s.TOP_K, expert_ffn_size=s.EXPERT_FFN),
    "dense": l4.ModelConfig(**SHAPE, moe_interval=0, dense_ffn_size=s.DENSE_FFN),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", metavar="PYTHON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        prompts = f"{scratch}/prompts.npy"
        np.save(prompts, np.random.default_rng(0).integers(3, s.VOCAB, (s.BATCH, s.PROMPT)).astype(np.int32))
        for name, config in MODELS.items():
            l4.save_pretrained(f"{scratch}/{name}", config, l4.init_params(l4.Llama4(config), jax.random.key(0)))
        print(f"batch {s.BATCH}, prompts of {s.PROMPT}, {s.NEW} new tokens, float32, {os.cpu_count()} cores")
        print(f"{'':24s} {'tokens/s':>9s} {'ms a step':>10s} {'prefill ms':>11s}")
        for name in MODELS:
            ours = run(sys.executable, "llama4_jax_decode.py", f"{scratch}/{name}", prompts)
            report(f"llama4-jax, {name}", ours)
            if arguments.transformers:
                theirs = run(arguments.transformers, "transformers_decode.py", f"{scratch}/{name}", prompts)
                report(f"transformers, {name}", theirs)
                same = np.mean(np.array(ours["tokens"]) == np.array(theirs["tokens"]))
                print(f"{'':24s} {theirs['decode'] / ours['decode']:.1f} times as fast; {same:.1%} of the tokens are the same")
    if not arguments.transformers:
        print("transformers was not run; name its interpreter with --transformers=PYTHON")


def run(interpreter: str, script: str, *arguments: str) -> dict:
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(FOLDER.parents[1])
    command = [interpreter, str(FOLDER / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"{script} failed:\n{(done.stderr or done.stdout)[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(name: str, result: dict) -> None:
    step = result["decode"] / s.NEW
    print(f"{name:24s} {s.BATCH / step:9,.0f} {step * 1e3:10.2f} {result['prefill'] * 1e3:11.1f}  {result['versions']}")


if __name__ == "__main__":
    main()

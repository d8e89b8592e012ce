"""Run by test_generator.py in a process of its own: greedy decoding on one device and on meshes of four, as JSON."""

import json
import sys

import jax

from llama4_jax.config import AttentionTemperature, ExecutionConfig, MeshConfig, ModelConfig
from llama4_jax.inference.generator import Generator, Limits
from llama4_jax.model.llama4 import Llama4, init_params, logical_axes
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import named_shardings
from llama4_jax.processing.processor import Processor, Prompt
from llama4_jax.processing.tokenizer import Tokenizer

CONFIG = ModelConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, expert_ffn_size=16,
    nope_interval=2, attention_chunk_size=8, temperature=AttentionTemperature(floor=4, scale=0.5), initializer_range=0.3,
    max_position_embeddings=128,
)  # fmt: skip
PROMPTS = [Prompt([5, 9, 200]), Prompt([7] * 30 + [11, 13, 17, 19, 23])]
MESHES = ({"context": 4}, "contiguous"), ({"data": 2, "context": 2}, "zigzag")


def main() -> None:
    processor = Processor(Tokenizer.train_bpe(["the cat sat on the mat " * 20], 300), CONFIG, stop_ids=[])
    params = init_params(Llama4(CONFIG), jax.random.key(0))
    found = [drawn(Generator(Llama4(CONFIG), params, processor))]
    for sizes, layout in MESHES:
        model = Llama4(CONFIG, ExecutionConfig(context_layout=layout))
        mesh = make_mesh(MeshConfig(**{"data": 1} | sizes), jax.devices()[:4])
        placed = jax.device_put(params, named_shardings(params, logical_axes(model), mesh))
        found.append(drawn(Generator(model, placed, processor, mesh=mesh)))
    json.dump(found, sys.stdout)


def drawn(generator: Generator) -> list[list[int]]:
    return [completion.tokens for completion in generator.complete(PROMPTS, limits=Limits(12))]


if __name__ == "__main__":
    main()

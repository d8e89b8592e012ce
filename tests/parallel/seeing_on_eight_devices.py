"""Run by test_seeing_on_eight_devices.py: images, and text generation, on meshes of eight devices against one device."""

import dataclasses
import json
import sys

import eight_devices as common
import jax
import numpy as np

from llama4_jax.config import ExecutionConfig, ObjectiveConfig, VisionConfig
from llama4_jax.inference.generator import Generator, Limits
from llama4_jax.model.llama4 import Llama4, init_params, logical_axes
from llama4_jax.parallel.rules import named_shardings, put_batch, use_mesh
from llama4_jax.processing.processor import Prompt
from llama4_jax.training.objective import cross_entropy_objective

PATCH = 63
VISION = VisionConfig(
    hidden_size=16, num_layers=2, num_heads=2, mlp_size=64, image_size=12, patch_size=3, adapter_size=16, patch_token_id=PATCH
)  # fmt: skip
CONFIG = dataclasses.replace(common.CONFIG, vision=VISION, max_position_embeddings=256)


def seeing_batch():
    """The batch of the other cases with a tile in every row, and two in some, wherever the mesh cuts the row."""
    batch, generator = common.packed_batch(), np.random.default_rng(1)
    tokens = np.where(batch.tokens == PATCH, 1, batch.tokens)
    for row in tokens[::2]:
        row[13:17] = PATCH
    tokens[:, 30:34] = PATCH  # across the edge of two shards of a row
    images = generator.integers(0, 256, (len(tokens), 2, 12, 12, 3), np.uint8)
    return batch.replace(tokens=tokens, images=images)


class Ids:
    """Stands in for a processor: this test knows no text."""

    stop_ids = (5,)

    def stream(self):
        return self

    def push(self, token):
        return ""

    def finish(self):
        return ""


def outcome(mesh, execution):
    """Loss, gradients, and greedy tokens after ragged prompts of which some show pictures."""
    model = Llama4(CONFIG, execution)
    objective, batch = cross_entropy_objective(model, ObjectiveConfig()), seeing_batch()
    with use_mesh(mesh):
        params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
        params = jax.device_put(params, named_shardings(params, logical_axes(model), mesh))
        run = jax.value_and_grad(lambda p, b: objective(p, b, jax.random.key(3))[0])
        numbers = jax.device_get(jax.jit(run, compiler_options=common.OPTIONS)(params, put_batch(batch, mesh)))
    prompts = [
        Prompt(row[: 20 + 4 * i].tolist(), image[:1] if i % 2 == 0 else None)
        for i, (row, image) in enumerate(zip(np.where(batch.tokens == PATCH, 1, batch.tokens), batch.images, strict=True))
    ]
    for prompt in prompts[::2]:
        prompt.tokens[3:7] = [PATCH] * 4
    completions = Generator(model, params, Ids(), mesh=mesh).complete(prompts, limits=Limits(12))
    return numbers, [completion.tokens for completion in completions]


def main(cases):
    numbers, tokens = outcome(common.mesh_of({"data": 1}), ExecutionConfig())
    for case in cases:
        sizes, execution = common.CASES[case]
        got, generated = outcome(common.mesh_of(sizes), ExecutionConfig(**execution))
        error = max(jax.tree.leaves(jax.tree.map(common.relative_error, got, numbers)))
        print(json.dumps({"case": case, "error": error, "same_text": generated == tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

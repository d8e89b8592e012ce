"""Run by test_with_kernels.py: a block of layers through the TPU kernels, interpreted, against their definitions.

    python with_kernels.py MESH...     such as one_device or expert_and_context

Writes a JSON line for each: relative errors of loss and gradients, the largest of any parameter's.
"""

import contextlib
import dataclasses
import json
import os
import sys

# More than are used: there are as many threads, and the interpreter's devices wait for each other in them.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16"

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import llama4_jax as l4
from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4, init_params
from llama4_jax.parallel import expert_parallel
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import use_mesh
from llama4_jax.training.objective import cross_entropy_objective

MESHES = {"one_device": {}, "expert_and_context": {"expert": 2, "context": 2}}
CHUNK, T = 128, 512
MODEL = dataclasses.replace(
    l4.named_config("scout-17b-16e"),
    vision=None,
    vocab_size=64,
    hidden_size=256,
    num_layers=4,  # three with RoPE and one without
    num_heads=2,
    num_kv_heads=1,
    num_experts=4,
    expert_ffn_size=128,
    attention_chunk_size=CHUNK,
)


def batch(rows: int) -> Batch:
    """Documents that keep the packer's promise, and padding."""
    rng = np.random.default_rng(0)
    segments = np.zeros((rows, T), np.int32)
    segments[:, :100], segments[:, CHUNK : CHUNK + 200], segments[:, 3 * CHUNK :] = 1, 2, 3
    positions = np.concatenate([np.arange(CHUNK), np.arange(2 * CHUNK), np.arange(CHUNK)]).astype(np.int32)
    tokens = rng.integers(0, 64, (rows, T), dtype=np.int32)
    weights = (segments > 0).astype(np.float32)
    targets = np.roll(tokens, -1, axis=1)
    return Batch(tokens, targets, weights, np.tile(positions, (rows, 1)), segments, document_window=CHUNK)


def loss_and_gradients(kind: str, sizes: dict[str, int], params, data: Batch):
    names = {"tpu": ("tpu", "tpu"), "reference": ("reference", "reference")}[kind]
    execution = l4.ExecutionConfig(attention=names[0], expert_ffn=names[1], context_exchange="ring")
    objective = cross_entropy_objective(Llama4(MODEL, execution), l4.ObjectiveConfig())
    count = int(np.prod(list(sizes.values()) or [1]))
    mesh = make_mesh(l4.MeshConfig(**sizes), jax.devices()[:count])
    with contextlib.ExitStack() as stack:
        if kind == "tpu":
            stack.enter_context(pltpu.force_tpu_interpret_mode())
        stack.enter_context(use_mesh(mesh))
        step = jax.jit(jax.value_and_grad(lambda p: objective(p, data, jax.random.key(0), {}, None), has_aux=True))
        (loss, _), gradients = step(params)
        return jax.device_get((loss, gradients))


def main(names: list[str]) -> None:
    # All rows fit into the first round. The interpreter has all devices wait for each other in each kernel, so it hangs where
    # one group of experts goes on to another round and another does not; a TPU has no such meeting.
    expert_parallel.SPARE = 2.0
    params = jax.device_get(init_params(Llama4(MODEL, l4.ExecutionConfig()), jax.random.key(0)))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)  # so that no layer is nearly the identity
    data = batch(2)
    want_loss, want = loss_and_gradients("reference", {}, params, data)
    for name in names:
        loss, got = loss_and_gradients("tpu", MESHES[name], params, data)
        errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)), got, want)
        worst = max(jax.tree.leaves(errors))
        print(
            json.dumps({"mesh": name, "loss": abs(float(loss - want_loss)) / float(want_loss), "gradients": worst}), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])

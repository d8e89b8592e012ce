"""Run by test_eight_devices.py in a process of its own: loss and gradients on eight virtual devices against one.

Writes a JSON line for each mesh, and one for a state that moved between two meshes through a checkpoint.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import ExecutionConfig, MeshConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import put_batch, use_mesh
from llama4_jax.training.objective import cross_entropy_objective
from llama4_jax.training.optimizer import make_optimizer
from llama4_jax.training.state import abstract_state, create_state

MODEL = Llama4(
    ModelConfig(
        vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, num_experts=4, expert_ffn_size=16,
        dense_ffn_size=32, moe_interval=2, nope_interval=2, attention_chunk_size=8, initializer_range=0.1,
    ),
    ExecutionConfig(),
)  # fmt: skip
OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
MESHES = {
    "data8": MeshConfig(data=8),
    "fsdp8": MeshConfig(data=1, fsdp=8),
    "data2_fsdp2_tensor2": MeshConfig(data=2, fsdp=2, tensor=2),
    "context2_expert2_dcn2": MeshConfig(dcn_data=2, data=1, context=2, expert=2),
}


def ragged_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 17)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (8, 16)), axis=1).astype(np.int32)
    segments[:, -2:] = 0
    positions = np.array([[sum(row[:i] == row[i]) for i in range(16)] for row in segments], np.int32)
    weights = (segments > 0).astype(np.float32)
    return Batch(tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_weights=weights, positions=positions, segment_ids=segments)


def loss_and_gradients(mesh):
    state = create_state(MODEL, OPTIMIZER, ".*", mesh, seed=0)
    objective = cross_entropy_objective(MODEL, ObjectiveConfig())
    with use_mesh(mesh):
        run = jax.jit(
            jax.value_and_grad(lambda p, b: objective(p, b, None), has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},  # five compilations: half a minute less
        )
        (loss, metrics), gradients = run(state.params, put_batch(ragged_batch(), mesh))
    return jax.device_get((loss, metrics["expert_load"], gradients)), state


def relative_error(a, b) -> float:
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def main(folder: str) -> None:
    expected, _ = loss_and_gradients(make_mesh(MeshConfig(), jax.devices()[:1]))
    for name, config in MESHES.items():
        got, state = loss_and_gradients(make_mesh(config))
        errors = jax.tree.map(relative_error, got, expected)
        split = sum(not x.is_fully_replicated for x in jax.tree.leaves(state.params))
        same = jax.tree.map(lambda m, p: m.sharding == p.sharding, state.opt_state[1][0].mu, state.params)
        record = {
            "mesh": name,
            "error": max(jax.tree.leaves(errors)),
            "split": split,
            "moments_follow": all(jax.tree.leaves(same)),
        }
        print(json.dumps(record), flush=True)

    checkpoints = RunCheckpoints(folder, keep=1)
    state = create_state(MODEL, OPTIMIZER, ".*", make_mesh(MESHES["fsdp8"]), seed=1)
    state = state.replace(step=jnp.int32(3))
    checkpoints.save(3, state, {}, {})
    checkpoints.wait()
    target = abstract_state(MODEL, OPTIMIZER, ".*", make_mesh(MESHES["data2_fsdp2_tensor2"]))
    restored = checkpoints.restore_newest(target).state
    equal = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), restored, state)
    placed = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, target)
    print(json.dumps({"mesh": "restored", "equal": all(jax.tree.leaves(equal)), "placed": all(jax.tree.leaves(placed))}))


if __name__ == "__main__":
    main(sys.argv[1])

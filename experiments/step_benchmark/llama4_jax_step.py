"""Our own training step on the benchmark's shape, by the code that trains: prints one JSON line."""

import time

START = time.time()

import json  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import shape as s  # noqa: E402

from llama4_jax import config as c  # noqa: E402
from llama4_jax.data.batch import Batch  # noqa: E402
from llama4_jax.model.llama4 import Llama4  # noqa: E402
from llama4_jax.parallel.mesh import make_mesh  # noqa: E402
from llama4_jax.parallel.rules import put_batch, use_mesh  # noqa: E402
from llama4_jax.training.objective import cross_entropy_objective  # noqa: E402
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer  # noqa: E402
from llama4_jax.training.state import create_state  # noqa: E402
from llama4_jax.training.step import make_train_step  # noqa: E402

MODEL = c.ModelConfig(
    vocab_size=s.VOCAB,
    hidden_size=s.HIDDEN,
    num_layers=s.LAYERS,
    num_heads=s.HEADS,
    num_kv_heads=s.KV_HEADS,
    head_dim=s.HEAD_DIM,
    num_experts=s.EXPERTS,
    experts_per_token=s.TOP_K,
    expert_ffn_size=s.EXPERT_FFN,
    attention_chunk_size=s.CHUNK,
)
OPTIMIZER = c.OptimizerConfig(learning_rate=s.LEARNING_RATE, warmup_steps=0, clip_norm=s.CLIP_NORM)


def random_batch() -> Batch:
    """One document a row, the same batch every step."""
    rows = np.random.default_rng(0).integers(0, s.VOCAB, (s.BATCH, s.LENGTH + 1), dtype=np.int32)
    return Batch(
        tokens=rows[:, :-1],
        targets=rows[:, 1:],
        loss_weights=np.ones((s.BATCH, s.LENGTH), np.float32),
        positions=np.tile(np.arange(s.LENGTH, dtype=np.int32), (s.BATCH, 1)),
        segment_ids=np.ones((s.BATCH, s.LENGTH), np.int32),
        document_window=s.CHUNK,
    )


def main() -> None:
    mesh, model, optimizer = make_mesh(c.MeshConfig()), Llama4(MODEL), make_optimizer(OPTIMIZER, s.STEPS)
    with use_mesh(mesh):
        state = create_state(model, optimizer, OPTIMIZER.trainable, mesh, seed=0)
        objective = cross_entropy_objective(model, c.ObjectiveConfig())
        schedule = learning_rate_schedule(OPTIMIZER, s.STEPS)
        step = make_train_step(objective, optimizer, schedule, state=state, mesh=mesh, seed=0)
        batch, seconds, start_up = put_batch(random_batch(), mesh), [], None
        for _ in range(s.STEPS):
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - began)
            start_up = start_up or time.time() - START
    result = s.summary("llama4-jax", f"jax {jax.__version__}", seconds, start_up)
    print(json.dumps(result | {"loss": float(metrics["cross_entropy"])}))


if __name__ == "__main__":
    main()

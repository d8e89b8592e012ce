"""What a run shows of itself."""

import jax
import jax.numpy as jnp

from llama4_jax.config import ProfileConfig
from llama4_jax.training.visibility import TensorBoard, TraceWindow, memory_summary, scalars_of


def test_a_record_becomes_scalars_by_layer_and_source():
    record = {
        "step": 7, "loss": 2.5, "expert_load": [[0.25, 0.75], [0.5, 0.5]], "router_entropy": [0.1, 0.2], "epochs": {"a": 0.5},
    }  # fmt: skip
    assert scalars_of(record) == {
        "loss": 2.5, "busiest_expert_load/layer_0": 1.5, "busiest_expert_load/layer_1": 1.0, "router_entropy/layer_0": 0.1,
        "router_entropy/layer_1": 0.2, "epochs/a": 0.5,
    }  # fmt: skip
    assert scalars_of({"step": 7, "evaluation": "heldout", "bits_per_byte": 2.0}) == {"heldout/bits_per_byte": 2.0}


def test_tensorboard_holds_the_records(tmp_path):
    board = TensorBoard(tmp_path, first_step=1)
    board.write({"step": 3, "loss": 1.25})
    board.close()
    (events,) = tmp_path.iterdir()
    assert b"loss" in events.read_bytes()


def test_a_trace_holds_the_window_alone(tmp_path):
    window = TraceWindow(ProfileConfig(start=2, steps=2), tmp_path)
    for step in range(1, 6):
        assert window.at_edge(step) == (step in (2, 4))
        window.before(step)
        assert window._open == (step in (2, 3))
        jax.block_until_ready(jnp.ones(3) + step)
    window.close()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_without_a_start_nothing_is_traced(tmp_path):
    window = TraceWindow(ProfileConfig(), tmp_path)
    assert not any(window.at_edge(step) for step in range(9))


def test_memory_is_that_of_the_compiled_program():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((500, 500))).compile()
    assert "0.001 GB of state and batch" in memory_summary(compiled, jax.devices()[0])

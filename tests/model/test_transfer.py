"""Initial scales and learning rates that hold from one size to another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from llama4_jax.config import DataConfig, ExecutionConfig, Experiment, ModelConfig, OptimizerConfig, Transfer
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, init_params
from llama4_jax.model.transfer import initial_stddev, learning_rate_factors
from llama4_jax.training.optimizer import make_optimizer

BASE = ModelConfig(
    vocab_size=32, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, num_experts=2, expert_ffn_size=64,
    nope_interval=2, attention_chunk_size=8, initializer_range=0.1, transfer=Transfer(base_width=32, base_depth=2),
)  # fmt: skip


def grown(width: int, depth: int = 2, transfer: Transfer | None = BASE.transfer) -> ModelConfig:
    heads = width // 16
    return dataclasses.replace(
        BASE,
        hidden_size=width,
        num_layers=depth,
        num_heads=heads,
        num_kv_heads=heads,
        expert_ffn_size=2 * width,
        transfer=transfer,
    )


@pytest.mark.parametrize("role", ["table", "matrix", "residual", "readout"])
def test_at_the_base_size_nothing_changes(role):
    assert initial_stddev(BASE, role) == pytest.approx(initial_stddev(grown(32, transfer=None), role))


def test_every_parameter_gets_the_factor_of_its_role():
    config = grown(64, depth=8)
    shapes = jax.eval_shape(lambda: init_params(Llama4(config), jax.random.key(0)))
    factors = flatten_dict(learning_rate_factors(config, shapes), sep="/")
    block = {path.removeprefix("layers/layer_0/"): value for path, value in factors.items()}
    assert block["embed/embedding"] == block["final_norm/scale"] == block["attention_norm/scale"] == 1
    assert block["attention/query/kernel"] == block["feed_forward/experts/gate_up/kernel"] == 1 / 2
    assert block["attention/output/kernel"] == block["feed_forward/shared_expert/down/kernel"] == 1 / 8
    assert block["feed_forward/router/kernel"] == block["lm_head/kernel"] == 1 / 2


def logits_moved(config: ModelConfig) -> float:
    """Root mean square of what four Adam updates change in the logits."""
    model = Llama4(config, ExecutionConfig())
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 32)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup_steps=0, weight_decay=0.0), 1000, config)

    @jax.jit
    def run(params):
        def loss(p):
            return -model.apply({"params": p}, tokens, targets=jnp.roll(tokens, -1, 1)).log_probs.mean()

        def update(carry, _):
            p, state = carry
            updates, state = optimizer.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        (moved, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), length=4)
        return [model.apply({"params": p}, tokens).logits for p in (params, moved)]

    before, after = run(init_params(model, jax.random.key(0)))
    return float(np.sqrt(np.mean(np.square(after - before))))


@pytest.mark.slow
def test_logits_move_alike_at_every_width_and_apart_without():
    """The coordinate check of arXiv 2203.03466, appendix D.1."""
    narrow, wide, unscaled = (logits_moved(c) for c in (BASE, grown(256), grown(256, transfer=None)))
    assert 0.5 < wide / narrow < 1.5
    assert unscaled / narrow > 2


def test_transfer_is_refused_where_it_has_no_rule():
    with pytest.raises(UserError, match="tie_embeddings"):
        dataclasses.replace(BASE, tie_embeddings=True)
    with pytest.raises(UserError, match="adamw"):
        Experiment(model=BASE, data=DataConfig(sequence_length=8), optimizer=OptimizerConfig(rule="muon"))

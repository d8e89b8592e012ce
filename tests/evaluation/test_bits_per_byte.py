from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import EvaluationConfig, MeshConfig
from llama4_jax.data.batch import Batch
from llama4_jax.evaluation import EvaluationContext
from llama4_jax.evaluation.bits_per_byte import bits_per_byte
from llama4_jax.parallel.mesh import make_mesh

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


class TargetModel:
    """Gives target t the probability 2**-t."""

    def apply(self, variables, tokens, *, targets, **inputs):
        return SimpleNamespace(log_probs=-targets * jnp.log(2.0))


def batch_of(targets, weights):
    targets = np.array(targets, np.int32)
    return Batch(targets, targets, np.array(weights, np.float32), positions=targets, segment_ids=np.ones_like(targets))


def evaluate(batches, heldout_bytes, max_batches=None):
    corpus = SimpleNamespace(heldout_bytes=heldout_bytes)
    context = EvaluationContext(TargetModel(), MESH, corpus, batches, EvaluationConfig(max_batches=max_batches))
    return bits_per_byte(context)({}, {})


BATCHES = [batch_of([[1, 2], [3, 9]], [[1, 1], [1, 0]]), batch_of([[4, 9], [9, 9]], [[1, 0], [0, 0]])]


def test_bits_of_all_tokens_over_bytes_of_all_text():
    values = evaluate(BATCHES, heldout_bytes=8)
    assert values["bits_per_byte"] == pytest.approx((1 + 2 + 3 + 4) / 8)
    assert values["nats_per_token"] == pytest.approx(10 * np.log(2) / 4)


def test_a_part_is_estimated_with_the_bytes_that_a_token_holds_on_average():
    assert evaluate(BATCHES, heldout_bytes=8, max_batches=1)["bits_per_byte"] == pytest.approx((1 + 2 + 3) / (8 * 3 / 4))

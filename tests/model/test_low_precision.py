"""Projections in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama4_jax.config import ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.linear import project
from llama4_jax.model.llama4 import Llama4, init_params
from llama4_jax.model.low_precision import check_hardware

# Half a step of rounding on each side, of values up to the largest of a row or an output.
STEP = {"int8": 0.5 / 127, "fp8": 2.0**-4}


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
@pytest.mark.parametrize(("x_shape", "w_shape", "in_axes"), [((3, 5, 8), (8, 2, 6), 1), ((2, 7, 4, 8), (4, 8, 5), 2)])
def test_products_are_within_the_rounding_of_their_rows_and_outputs(matmul, x_shape, w_shape, in_axes):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=x_shape).astype(np.float32), rng.normal(size=w_shape).astype(np.float32)
    x[0] *= 1e4  # a large row does not spoil the small ones
    x[1, 0] = 0
    exact = np.tensordot(x.astype(np.float64), w.astype(np.float64), in_axes)
    x_axes, w_axes = tuple(range(-in_axes, 0)), tuple(range(in_axes))
    row = np.abs(x).max(axis=x_axes).reshape(*x_shape[:-in_axes], *[1] * (len(w_shape) - in_axes))
    output = np.abs(w).max(axis=w_axes)
    contracted = np.prod(w_shape[:in_axes])
    got = project(jnp.asarray(x), jnp.asarray(w), (None,) * w.ndim, in_axes=in_axes, matmul=matmul)
    error = np.abs(got - exact)
    assert (error <= 2.2 * STEP[matmul] * contracted * row * output + 1e-6).all()
    assert error.max() > 0  # it did round
    np.testing.assert_array_equal(np.asarray(got)[1, 0], 0)


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_gradients_are_those_of_the_plain_product(matmul):
    x, w = jax.random.normal(jax.random.key(0), (5, 8)), jax.random.normal(jax.random.key(1), (8, 3))
    dy = jax.random.normal(jax.random.key(2), (5, 3))
    gradients = [jax.vjp(lambda x, w, m=m: project(x, w, (None,) * w.ndim, matmul=m), x, w)[1](dy) for m in ("plain", matmul)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)


@pytest.mark.parametrize("matmul", ["int8", "fp8"])
def test_a_models_projections_all_go_through_it(matmul):
    """Counted in the program: query, key, value, output, and gate-up and down of the dense FFN and of the shared expert."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, num_experts=2, expert_ffn_size=16,
        dense_ffn_size=16, moe_interval=2, nope_interval=2,
    )  # fmt: skip
    model, tokens = Llama4(config, ExecutionConfig(matmul=matmul)), jnp.zeros((1, 4), jnp.int32)
    params = init_params(Llama4(config), jax.random.key(0))
    program = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, tokens).logits)(params))
    assert program.count("preferred_element_type=" + {"int8": "int32", "fp8": "float32"}[matmul]) >= 2 * 6
    plain = Llama4(config).apply({"params": params}, tokens).logits
    rounded = model.apply({"params": params}, tokens).logits
    assert 0 < np.abs(plain - rounded).max() < 0.1 * np.abs(plain).max()


def test_fp8_is_refused_where_no_multiplier_has_it():
    with pytest.raises(UserError, match="TPU v5 multiplies no fp8"):
        check_hardware("fp8", "TPU v5")
    check_hardware("fp8", "NVIDIA H200")
    check_hardware("int8", "TPU v5")

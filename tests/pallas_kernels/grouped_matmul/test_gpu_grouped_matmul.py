"""Grouped products on GPU equal the loop over all groups in result and gradients: compiled where there is a GPU, else interpreted.

And they lower for CUDA everywhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import gpu, reference
from pallas_kernels.lowering import lower_for_gpu

INTERPRET = jax.default_backend() != "gpu"
OPERATIONS = ["grouped_matmul", "grouped_swiglu"]
TILING = gpu.Tiling(rows=16, columns=32, piece=16, warps=4, stages=2)
M, D, F = 40, 48, 96


def with_gradients(function, lhs, rhs, sizes, first, dout):
    out, back = jax.vjp(lambda lhs, rhs: function(lhs, rhs, sizes, first), lhs, rhs)
    return out, *back(dout)


ours = {
    op: jax.jit(lambda *x, op=op: with_gradients(lambda *y: getattr(gpu, op)(*y, tiling=TILING, interpret=INTERPRET), *x))
    for op in OPERATIONS
}
expected = {op: jax.jit(lambda *x, op=op: with_gradients(getattr(reference, op), *x)) for op in OPERATIONS}


def check(op, sizes, offset, G, rows=M, seed=0):
    draw = lambda key, *shape: jax.random.normal(jax.random.key(seed + key), shape)  # noqa: E731
    matrices = (G, 2, D, F) if op == "grouped_swiglu" else (G, D, F)
    operands = draw(0, rows, D), draw(1, *matrices) / D**0.5, jnp.array(sizes, jnp.int32), jnp.int32(offset), draw(2, rows, F)
    for got, want in zip(ours[op](*operands), expected[op](*operands), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("op", OPERATIONS)
class TestGroupedProducts:
    @settings(max_examples=8, deadline=None)
    @given(st.lists(st.integers(0, M), min_size=4, max_size=4), st.integers(0, 2), st.integers(0, 99))
    def test_groups_of_any_size_of_any_shard_with_rows_left_over(self, op, cuts, offset, seed):
        edges = sorted(cuts)
        check(op, np.diff([0, *edges]), offset, 2, seed=seed)

    @pytest.mark.parametrize("sizes", [[16, 16, 0, 8], [0, 0, 40, 0], [0, 0, 0, 0], [3, 7, 2, 1]])
    def test_groups_that_end_on_tiles_that_hold_all_or_nothing_and_tails(self, op, sizes):
        check(op, sizes, 0, 4)

    def test_a_single_row(self, op):
        check(op, [1], 0, 1, rows=1)

    @pytest.mark.parametrize("groups", [16, 128], ids=["scout", "maverick"])
    def test_lowers_for_cuda_at_real_shapes(self, op, groups):
        abstract = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        matrices = abstract(groups, *[2] * (op == "grouped_swiglu"), 5120, 8192)

        def function(lhs, rhs, sizes, dout):
            return with_gradients(getattr(gpu, op), lhs, rhs, sizes, jnp.int32(0), dout)

        text = lower_for_gpu(function, abstract(8192, 5120), matrices, abstract(groups, dtype=jnp.int32), abstract(8192, 8192))
        assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == (5 if op == "grouped_swiglu" else 3)

    def test_refuses_what_it_cannot_take_with_the_reason(self, op):
        matrices = jnp.zeros((1, *[2] * (op == "grouped_swiglu"), 24, 16))
        with pytest.raises(NotImplementedError, match=r"multiples of 16, not \(24, 16\)"):
            getattr(gpu, op)(jnp.zeros((4, 24)), matrices, jnp.array([4]), jnp.int32(0))
        with pytest.raises(NotImplementedError, match="float32 x bfloat16"):
            getattr(gpu, op)(jnp.zeros((4, 16)), matrices.astype(jnp.bfloat16), jnp.array([4]), jnp.int32(0))

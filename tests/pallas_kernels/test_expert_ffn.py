"""Every implementation of the routed experts equals the reference, forward and in every gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import aot, routing
from pallas_kernels.expert_ffn import api, blocks, expert_ffn, ragged
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.tiling import Tiling

IMPLEMENTATIONS = [name for name in api.IMPLEMENTATIONS if name not in ("reference", "tpu", "gpu")]


def inputs(M, X, E, D=8, F=12, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    scores = jnp.asarray(rng.uniform(0.1, 1, (M, X)), jnp.float32)
    return normal(M, D), scores, normal(E, 2, D, F) / D**0.5, normal(E, F, D) / F**0.5


@functools.partial(jax.jit, static_argnames="implementation")
def output_and_gradients(experts, x, scores, gate_up, down, *, implementation):
    cotangent = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    def loss(x, scores, gate_up, down):
        y = expert_ffn(x, experts, scores, gate_up, down, implementation=implementation)
        return jnp.vdot(y, cotangent), y

    grads, y = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(x, scores, gate_up, down)
    return y, *grads


def assert_equal_to_reference(implementation, experts, E):
    arrays = jnp.asarray(experts, jnp.int32), *inputs(*experts.shape, E)
    got = output_and_gradients(*arrays, implementation=implementation)
    want = output_and_gradients(*arrays, implementation="reference")
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5 * max(1.0, float(jnp.abs(w).max())))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestExpertFFN:
    def test_every_pattern_of_empty_experts(self, implementation):
        """Three experts, seven non-empty subsets of them in use."""
        rng = np.random.default_rng(0)
        for size in (1, 2, 3):
            for used in itertools.combinations(range(3), size):
                assert_equal_to_reference(implementation, rng.choice(used, (40, 1)), E=3)

    @pytest.mark.parametrize("M", [1, 31, 32, 33, 127, 128, 129, 1024])
    def test_all_tokens_on_one_expert_around_a_block(self, implementation, M):
        assert_equal_to_reference(implementation, np.full((M, 1), 2), E=4)

    @pytest.mark.parametrize("M", [20, 200])
    def test_an_empty_choice_adds_nothing_and_takes_nobodys_place(self, implementation, M):
        experts = np.random.default_rng(0).permuted(np.tile(np.arange(4), (M, 1)), axis=1)[:, :2]  # 3: no expert
        assert_equal_to_reference(implementation, experts, E=3)
        assert_equal_to_reference(implementation, np.full((M, 1), 3), E=3)

    def test_one_expert(self, implementation):
        assert_equal_to_reference(implementation, np.zeros((5, 1), int), E=1)

    def test_every_expert_chosen_by_every_token(self, implementation):
        assert_equal_to_reference(implementation, np.tile(np.arange(4), (30, 1)), E=4)

    @settings(max_examples=20, deadline=None)
    @given(M=st.sampled_from([7, 200]), X=st.sampled_from([1, 3]), skew=st.floats(0.05, 5), seed=st.integers(0, 99))
    def test_ragged_groups(self, implementation, M, X, skew, seed):
        rng = np.random.default_rng(seed)
        weights = rng.dirichlet(np.full(6, skew)) + 1e-9
        experts = np.stack([rng.choice(6, X, replace=False, p=weights / weights.sum()) for _ in range(M)])
        assert_equal_to_reference(implementation, experts, E=6)

    def test_the_score_scales_what_the_expert_reads(self, implementation):
        """Halving a score is not halving the output: SwiGLU is not linear (Llama 4, Q11)."""
        x, scores, gate_up, down = inputs(6, 1, 2)
        experts = jnp.zeros((6, 1), jnp.int32)
        got = expert_ffn(x, experts, scores / 2, gate_up, down, implementation=implementation)
        want = expert_ffn(x / 2, experts, scores, gate_up, down, implementation="reference")
        np.testing.assert_allclose(got, want, atol=1e-5)
        full = expert_ffn(x, experts, scores, gate_up, down, implementation=implementation)
        assert not np.allclose(got, full / 2, atol=1e-3)

    def test_bfloat16_stays_bfloat16(self, implementation):
        x, scores, gate_up, down = inputs(50, 2, 4, dtype=jnp.bfloat16)
        experts = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(4), (50, 1)), axis=1)[:, :2], jnp.int32)
        got = expert_ffn(x, experts, scores, gate_up, down, implementation=implementation)
        want = expert_ffn(*(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in (x, experts, scores, gate_up, down)), implementation="reference")  # fmt: skip
        assert got.dtype == jnp.bfloat16
        assert float(jnp.median(jnp.abs(got.astype(jnp.float32) - want))) < 0.02


def test_the_layout_gives_each_block_one_expert_and_each_pair_one_row():
    experts = jnp.asarray(np.random.default_rng(0).integers(0, 5, (300, 1)), jnp.int32)
    layout = blocks.plan(experts, 7)
    size = blocks.block_size(300, 7)
    assert layout.shape[1] == size
    rows = np.asarray(layout.row_of_pair)
    assert len(set(rows)) == 300
    np.testing.assert_array_equal(np.asarray(layout.expert_of_block)[rows // size], experts[:, 0])
    np.testing.assert_array_equal(np.asarray(layout.pair_of_row)[rows], np.arange(300))
    assert int(layout.blocks_in_use) == sum(-(-n // size) for n in np.bincount(experts[:, 0]))


@pytest.mark.parametrize("X", [1, 2])
def test_the_tpu_kernels_interpreted(X):
    """Output and every gradient, with an expert that nobody chose."""
    experts = jnp.stack([jnp.arange(37) % 2, jnp.full(37, 3)], axis=1)[:, :X].astype(jnp.int32)
    x, scores, gate_up, down = inputs(37, X, 4, D=128, F=128)
    dout = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    tiled = functools.partial(ragged.expert_ffn_tpu, tiling=Tiling(16, 128, 128), interpret=True)

    def gradients(function, dout, *arguments):
        y, back = jax.vjp(lambda x, s, g, d: function(x, experts, s, g, d), *arguments)
        return y, *back(dout)

    reference = functools.partial(expert_ffn, implementation="reference")
    both = (jax.jit(functools.partial(gradients, function))(dout, x, scores, gate_up, down) for function in (tiled, reference))
    for got, want in zip(*both, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.parametrize("implementation", ["ragged", "tpu"])
def test_an_order_that_is_known_already_is_taken(implementation):
    """The same output as when it is computed anew, and nothing for tokens that it gives no place."""
    x, scores, gate_up, down = inputs(30, 2, 4, D=128, F=128)
    route = routing.reference.route(jax.random.normal(jax.random.key(0), (30, 4)), 2, None, jnp.arange(30) % 5 > 0)
    function = ragged.expert_ffn if implementation == "ragged" else functools.partial(ragged.expert_ffn_tpu, interpret=True)
    got = jax.jit(function)(x, route.experts, scores, gate_up, down, (route.place, route.group_sizes))
    want = expert_ffn(x, route.experts, scores, gate_up, down, implementation="reference")
    np.testing.assert_allclose(got, jnp.where((jnp.arange(30) % 5 > 0)[:, None], want, 0), atol=2e-4)


def test_the_tpu_kernels_refuse_narrow_experts():
    x, scores, gate_up, down = inputs(4, 1, 2, D=128, F=64)
    with pytest.raises(NotImplementedError, match="D and F must be multiples of 128, not 128 and 64"):
        ffn = functools.partial(expert_ffn, implementation="tpu")
        jax.eval_shape(ffn, x, jnp.zeros((4, 1), jnp.int32), scores, gate_up, down)


def test_an_unknown_implementation_is_named():
    x, scores, gate_up, down = inputs(2, 1, 2)
    with pytest.raises(ValueError, match="no implementation 'fast'; choose from auto, blocks"):
        expert_ffn(x, jnp.zeros((2, 1), jnp.int32), scores, gate_up, down, implementation="fast")


@pytest.mark.slow
@pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")
@pytest.mark.parametrize("chip", aot.TOPOLOGIES)
def test_no_copy_of_the_weights_stands_before_the_tpu_kernels(chip):
    """Scout's are 4 GB in bfloat16; what 8,192 tokens need besides, forward and backward, is a tenth of that."""
    requests = [aot.Request("pallas_kernels.expert_ffn.shapes:case", {"gradients": g}) for g in (False, True)]
    for outcome in aot.compile_for(chip, requests):
        assert outcome.error is None, (outcome.request, outcome.error)
        assert outcome.temporary_bytes < 0.4e9, outcome


def test_the_gpu_kernels_interpreted():
    rng = np.random.default_rng(0)
    experts = jnp.asarray(np.stack([rng.permutation(4)[:2] for _ in range(30)]), jnp.int32)
    x, scores, gate_up, down = inputs(30, 2, 4, D=16, F=32)

    def with_gradients(function):
        y, back = jax.vjp(function, x, scores, gate_up, down)
        return y, *back(jnp.cos(y))

    tiling = gpu.Tiling(rows=16, columns=16, piece=16, warps=4, stages=2)
    ours = functools.partial(ragged.expert_ffn_gpu, tiling=tiling, interpret=True)
    got = jax.jit(lambda: with_gradients(lambda x, *rest: ours(x, experts, *rest)))()
    want = with_gradients(lambda x, *rest: expert_ffn(x, experts, *rest, implementation="reference"))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=5e-5)

"""The whole model: what may influence what, and that cache, padding, packing and blocks change no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, tiny_model, tokens

from llama4_jax.config import ExecutionConfig
from llama4_jax.model.cache import Cache
from llama4_jax.model.llama4 import Llama4, abstract_params, init_params, logical_axes

VARIANTS = {
    "two repeats of four": {"num_layers": 8},
    "maverick": {"qk_norm": False, "rope_scaling": None, "experts_per_token": 1},
    "dense, no chunk, two repeats of two": {"moe_interval": 0, "attention_chunk_size": None, "nope_interval": 2},
    "no shared expert, no temperature, biases, tied": {
        "num_layers": 2, "moe_interval": 1, "nope_interval": 2, "shared_expert": False, "temperature": None, "attention_bias": True, "tie_embeddings": True,
    },
}  # fmt: skip
LENGTH = 30  # three chunks and a part


def forward(model):
    return jax.jit(lambda params, tokens, **kwargs: model.apply({"params": params}, tokens, **kwargs))


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def variant(request):
    """A model, its parameters (biases made non-zero), its jitted forward pass, two rows and their logits."""
    model, params = tiny_model(**VARIANTS[request.param])
    noise = iter(jax.random.split(jax.random.key(2), 999))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(next(noise), x.shape), params)
    run, rows = forward(model), tokens(2, LENGTH)
    return model, params, run, rows, run(params, rows).logits


def test_decoding_over_chunk_edges_equals_one_pass(variant):
    """A prefill that ends inside a chunk, a second one across two edges, then token by token over another."""
    model, params, run, rows, want = variant
    cache, got = Cache.create(model.config, 2, LENGTH + 2), []
    for part in (rows[:, :13], rows[:, 13:22], *(rows[:, i : i + 1] for i in range(22, LENGTH))):
        output = run(params, part, cache=cache)
        cache = output.cache
        got.append(output.logits)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=5e-5)
    np.testing.assert_array_equal(cache.lengths, LENGTH)


def test_left_padded_rows_equal_rows_alone(variant):
    """In one pass, and as a ragged prefill with decoding after it."""
    model, params, run, rows, want = variant
    padded = jnp.concatenate([tokens(2, 5, seed=9), rows], axis=1)
    segments = (jnp.arange(LENGTH + 5) >= jnp.array([[5], [0]])).astype(jnp.int32)
    padded = padded.at[1].set(jnp.concatenate([rows[1], rows[1, :5]]))
    got = run(params, padded, segment_ids=segments).logits
    np.testing.assert_allclose(got[0, 5:], want[0], atol=5e-5)
    np.testing.assert_allclose(got[1, :LENGTH], want[1], atol=5e-5)

    cache = Cache.create(model.config, 2, 40)
    output = run(params, padded[:, :20], segment_ids=segments[:, :20], cache=cache)
    np.testing.assert_array_equal(output.cache.lengths, [15, 20])
    np.testing.assert_allclose(output.logits[0, 5:], want[0, :15], atol=5e-5)
    for i in range(5):
        following = jnp.stack([rows[0, 15 + i], rows[1, 20 + i]])[:, None]
        output = run(params, following, cache=output.cache)
        np.testing.assert_allclose(output.logits[:, 0], jnp.stack([want[0, 15 + i], want[1, 20 + i]]), atol=5e-5)


def test_packed_documents_equal_documents_alone(variant):
    """Positions, chunks and temperature restart with each document, whether or not positions are given."""
    _, params, run, rows, _ = variant
    segments = jnp.repeat(jnp.array([[1, 2, 3, 0]]), jnp.array([3, 17, 9, 1]), axis=1)
    packed = run(params, rows[:1], segment_ids=segments).logits
    for start, stop in ((0, 3), (3, 20), (20, 29)):
        np.testing.assert_allclose(packed[:, start:stop], run(params, rows[:1, start:stop]).logits, atol=5e-5)
    positions = jnp.concatenate([jnp.arange(n) for n in (3, 17, 9, 1)])[None]
    np.testing.assert_array_equal(run(params, rows[:1], segment_ids=segments, positions=positions).logits, packed)


def test_the_window_promise_changes_no_number(variant):
    _, params, run, _, _ = variant
    row = tokens(1, 32)
    segments = jnp.repeat(jnp.array([[1, 2, 3, 0]]), jnp.array([3, 5, 20, 4]), axis=1)
    model = variant[0]
    promised = jax.jit(lambda p, t, s: model.apply({"params": p}, t, segment_ids=s, document_window=8).logits)
    np.testing.assert_allclose(
        promised(params, row, segments)[:, :28], run(params, row, segment_ids=segments).logits[:, :28], atol=5e-5
    )


def test_log_probs_of_targets_equal_those_of_the_logits(variant):
    """Over blocks that do not divide the row, with the gradients."""
    model, params, _, rows, _ = variant
    blocked = Llama4(model.config, ExecutionConfig(loss_block_size=7))
    inputs, targets = rows[:, :-1], rows[:, 1:]

    def from_logits(params):
        logits = model.apply({"params": params}, inputs).logits
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    def from_blocks(params):
        return blocked.apply({"params": params}, inputs, targets=targets).log_probs

    np.testing.assert_allclose(from_blocks(params), from_logits(params), atol=2e-5)
    weights = jnp.cos(jnp.arange(targets.size)).reshape(targets.shape)
    got, want = (jax.jit(jax.grad(lambda p, f=f: jnp.vdot(f(p), weights)))(params) for f in (from_blocks, from_logits))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5 * float(jnp.abs(w).max() + 1))


def test_remat_changes_no_gradient():
    _, params = tiny_model()
    row = tokens(1, 12)

    def grad(remat):
        model = Llama4(TINY, ExecutionConfig(remat=remat))
        return jax.jit(jax.grad(lambda p: model.apply({"params": p}, row[:, :-1], targets=row[:, 1:]).log_probs.sum()))(params)

    for a, b in zip(jax.tree.leaves(grad("layer")), jax.tree.leaves(grad("none")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def influenced(run, params, source):
    """The places whose logits change at all when the token at `source` does."""
    row = tokens(1, 32)
    before, after = (run(params, row.at[0, source].set(token)).logits[0] for token in (0, 1))
    return set(np.flatnonzero(np.any(np.asarray(before != after), axis=-1)))


def test_chunked_layers_alone_let_nothing_cross_a_chunk_edge():
    """The test that needs no reference: it shows chunks on the wrong layers, and any look into the future."""
    local, params = tiny_model(nope_interval=0)
    run = forward(local)
    for source in (0, 7, 8, 29):
        assert influenced(run, params, source) == set(range(source, 8 * (source // 8) + 8))
    mixed, params = tiny_model()
    run = forward(mixed)
    for source in (0, 29):
        assert influenced(run, params, source) == set(range(source, 32))


def test_positions_far_away_stay_exact():
    """At ten million tokens float32 angles would be off by half a radian; counted from the chunk's start they are exact."""
    model, params = tiny_model(nope_interval=0, attention_chunk_size=16)
    run, rows = forward(model), tokens(1, 16)
    far = 16 * 655_359 + jnp.arange(16)[None]
    np.testing.assert_allclose(run(params, rows, positions=far).logits, run(params, rows).logits, atol=1e-5)


def test_stats_come_in_layer_order_and_ignore_padding():
    model, params = tiny_model(num_layers=8, moe_layers=(0, 1, 3, 4, 5, 7), nope_interval=4)
    run, row = forward(model), tokens(1, 16)
    _, state = model.apply({"params": params}, row, capture_intermediates=True)
    stats = run(params, row).router_stats
    assert stats.load.shape == (6, TINY.num_experts)
    routers = {
        4 * b + j: state["intermediates"]["layers"][f"layer_{j}"]["feed_forward"]["router"]["__call__"][0].experts[b]
        for j in (0, 1, 3)
        for b in (0, 1)
    }
    for load, layer in zip(stats.load, sorted(routers), strict=True):
        np.testing.assert_allclose(load, np.bincount(np.ravel(routers[layer]), minlength=4) / 32, atol=1e-6)
    padded = run(
        params, jnp.concatenate([row, row], axis=1), segment_ids=jnp.repeat(jnp.array([[1, 0]]), 16, axis=1)
    ).router_stats
    for got, want in zip(jax.tree.leaves(padded), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bfloat16_compute_keeps_parameters_and_logits_float32():
    _, params = tiny_model()
    rows = tokens(2, LENGTH)
    logits = {
        d: Llama4(TINY, ExecutionConfig(compute_dtype=d)).apply({"params": params}, rows).logits
        for d in ("bfloat16", "float32")
    }
    assert logits["bfloat16"].dtype == jnp.float32
    assert float(jnp.median(jnp.abs(logits["bfloat16"] - logits["float32"]))) < 0.1


def test_every_parameter_names_its_axes():
    model = Llama4(TINY)
    shapes, axes = abstract_params(model), logical_axes(model)
    assert jax.tree.structure(shapes) == jax.tree.structure(init_params(model, jax.random.key(0)))
    for shape, spec in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes), strict=True):
        assert len(spec) == len(shape.shape)

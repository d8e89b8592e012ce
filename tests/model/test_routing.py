"""Who goes to which expert: the bias, the capacity and the noise, each by itself and through a whole model."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_model, tokens

from llama4_jax.config import ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model import moe
from llama4_jax.model.cache import Cache
from llama4_jax.model.context import make_context
from llama4_jax.model.llama4 import Llama4, abstract_params, init_model_state
from llama4_jax.model.moe import MoE, Router, within_capacity

EVERY_LAYER = {"num_layers": 2, "moe_interval": 1, "nope_interval": 0}  # two repeats of one MoE layer


CONTEXT = make_context(TINY, (1, 50), None, None, None, None)


def bias_state(*biases):
    """model_state of EVERY_LAYER, from the bias of each layer."""
    return {"router_bias": {"layers": {"layer_0": {"feed_forward": {"router": {"bias": jnp.array(biases, jnp.float32)}}}}}}


def router(X=1, **changes):
    """A router of four experts, its parameters and 50 tokens."""
    config = ModelConfig(**vars(TINY) | {"experts_per_token": X} | changes)
    x = jax.random.normal(jax.random.key(0), (1, 50, TINY.hidden_size))
    return Router(config, ExecutionConfig()), {"kernel": jax.random.normal(jax.random.key(1), (TINY.hidden_size, 4)) / 8}, x


def test_the_bias_changes_the_choice_and_nothing_else():
    module, params, x = router(X=2, router_bias=True)
    route = lambda bias: module.apply({"params": params, "router_bias": {"bias": bias}}, x, CONTEXT)  # noqa: E731
    bias = np.array([0.0, 0.3, -9.0, 9.0], np.float32)
    plain, biased = route(jnp.zeros(4)), route(jnp.asarray(bias))
    np.testing.assert_array_equal(biased.logits, plain.logits)
    want = np.argsort(-(np.asarray(plain.logits) + bias), axis=-1, kind="stable")[:, :2]
    np.testing.assert_array_equal(biased.experts, want)
    logits = np.take_along_axis(np.asarray(plain.logits), want, axis=-1)
    np.testing.assert_allclose(biased.scores, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    gradient = jax.grad(lambda bias: jnp.sum(route(bias).scores))(jnp.zeros(4))
    np.testing.assert_array_equal(gradient, 0)


def test_a_zero_bias_changes_no_bit_and_no_tie():
    for X in (1, 2):
        module, params, x = router(X=X, router_bias=True)
        plain = router(X=X)[0].apply({"params": params}, x, CONTEXT)
        zero = module.apply({"params": params, "router_bias": {"bias": jnp.zeros(4)}}, x, CONTEXT)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(zero), strict=True):
            np.testing.assert_array_equal(a, b)
        tied = module.apply({"params": params, "router_bias": {"bias": jnp.zeros(4)}}, 0 * x, CONTEXT)
        np.testing.assert_array_equal(tied.experts, np.tile(np.arange(X), (50, 1)))


def test_each_layer_reads_its_own_bias_and_so_does_the_cache():
    model, params = tiny_model(router_bias=True, experts_per_token=1, **EVERY_LAYER)
    assert jax.tree.map(jnp.shape, init_model_state(model)) == jax.tree.map(jnp.shape, bias_state([0] * 4, [0] * 4))
    variables = {"params": params} | bias_state([0, 99, 0, 0], [0, 0, 0, 99])
    row = tokens(1, 6)
    apply = jax.jit(model.apply)
    whole = apply(variables, row)
    np.testing.assert_array_equal(whole.router_stats.load, [[0, 1, 0, 0], [0, 0, 0, 1]])
    cache = apply(variables, row[:, :5], cache=Cache.create(model.config, 1, 8, "float32")).cache
    last = apply(variables, row[:, 5:], cache=cache)
    np.testing.assert_array_equal(last.router_stats.load, whole.router_stats.load)
    np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, 5], atol=1e-4)


def test_a_model_with_a_bias_is_not_run_without():
    model = Llama4(dataclasses.replace(TINY, router_bias=True))
    with pytest.raises(UserError, match="router bias: give it model_state"):
        jax.eval_shape(model.apply, {"params": abstract_params(model)}, tokens(1, 2))
    assert init_model_state(Llama4(TINY)) == {}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_an_expert_takes_its_first_choices_and_padding_takes_no_room(data):
    E = data.draw(st.integers(1, 5))
    X = data.draw(st.integers(1, E))
    M = data.draw(st.sampled_from([1, 2, 7, 16]))
    factor = data.draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 2.0]))
    experts = [data.draw(st.permutations(range(E)))[:X] for _ in range(M)]
    valid = data.draw(st.none() | st.lists(st.booleans(), min_size=M, max_size=M))
    real = valid or [True] * M
    capacity = math.ceil(factor * sum(real) * X / E)
    used, want = [0] * E, np.zeros((M, X), bool)
    for m in range(M):
        for x, expert in enumerate(experts[m]):
            if real[m]:
                used[expert] += 1
                want[m, x] = used[expert] <= capacity
    valid = None if valid is None else jnp.array(valid)
    got = within_capacity(jnp.array(experts, jnp.int32), valid, E, factor)
    np.testing.assert_array_equal(got, want)


def test_a_dropped_token_still_passes_through_the_shared_expert():
    """Twelve tokens, the first four padding, all to one expert with room for two: tokens 4 and 5 are served."""
    module = MoE(ModelConfig(**vars(TINY) | {"experts_per_token": 1}), ExecutionConfig())
    segments = jnp.array([[0] * 4 + [1] * 8], jnp.int32)
    context = make_context(TINY, (1, 12), None, segments, None, None)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (1, 12, TINY.hidden_size)))
    params = nn.unbox(module.init(jax.random.key(1), x, context)["params"])
    params["router"]["kernel"] = jnp.zeros_like(params["router"]["kernel"]).at[:, 2].set(0.1)
    run = jax.jit(lambda params, x, context: module.apply({"params": params}, x, context))
    dropless, stats = run(params, x, context)
    assert stats.drop_share == 0
    limited = context.replace(capacity_factor=1.0)
    y, stats = run(params, x, limited)
    np.testing.assert_allclose(stats.drop_share, 6 / 8)
    np.testing.assert_allclose(stats.load, [0, 0, 1, 0])
    np.testing.assert_allclose(y[:, 4:6], dropless[:, 4:6], atol=1e-6)
    no_expert = params | {"experts": jax.tree.map(jnp.zeros_like, params["experts"])}
    np.testing.assert_allclose(y[:, 6:], run(no_expert, x, context)[0][:, 6:], atol=1e-6)
    pull, shared_pull = (
        jax.jit(jax.grad(lambda x, params, context: jnp.sum(run(params, x, context)[0])))(x, *given)
        for given in ((params, limited), (no_expert, context))
    )
    assert np.isfinite(pull).all()
    np.testing.assert_allclose(pull[:, 6:], shared_pull[:, 6:], atol=1e-5)


def test_jitter_scales_what_the_router_reads_by_at_most_its_size():
    module, params, x = router()
    noisy = lambda key: module.apply({"params": params}, x, CONTEXT.replace(router_jitter=0.1), rngs={"jitter": key}).logits  # noqa: E731
    plain = module.apply({"params": params}, x, CONTEXT).logits
    moved = np.abs(noisy(jax.random.key(0)) - plain)
    assert (moved <= 0.1 * np.abs(x[0]) @ np.abs(params["kernel"]) + 1e-5).all() and moved.mean() > 0.01
    np.testing.assert_array_equal(noisy(jax.random.key(0)), noisy(jax.random.key(0)))
    assert not np.array_equal(noisy(jax.random.key(0)), noisy(jax.random.key(1)))


def test_each_layer_draws_its_own_jitter():
    """Two layers with the same weights and, the residual stream being all that they add to, the same input."""
    model, params = tiny_model(experts_per_token=1, **EVERY_LAYER)
    params["layers"] = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), params["layers"])
    for path in (("attention", "output"), ("feed_forward", "experts", "down"), ("feed_forward", "shared_expert", "down")):
        part = params["layers"]["layer_0"]
        for name in path:
            part = part[name]
        part["kernel"] = 0 * part["kernel"]
    rngs = {"jitter": jax.random.key(0)}
    run = partial(jax.jit(model.apply, static_argnames="router_jitter"), {"params": params}, tokens(1, 16), rngs=rngs)
    same, other = run(router_jitter=0.0).router_stats.z_loss, run(router_jitter=0.2).router_stats.z_loss
    assert same[0] == same[1] and other[0] != other[1]


def test_the_tpu_kernel_routes_one_device_and_is_refused_on_a_mesh(monkeypatch):
    assert moe._routing(ExecutionConfig(routing="tpu")) == "tpu"
    monkeypatch.setattr(moe, "current_mesh", lambda: object())
    assert moe._routing(ExecutionConfig()) == "reference"
    with pytest.raises(UserError, match="routing=tpu works on one device"):
        moe._routing(ExecutionConfig(routing="tpu"))

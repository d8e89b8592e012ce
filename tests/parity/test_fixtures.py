"""Our model against what transformers computed on the checkpoints of tests/parity/fixtures (see make_fixture.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama4_jax.checkpoints.load import load_config, load_pretrained
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.model.cache import Cache

FIXTURES = Path(__file__).parent / "fixtures"


class Case:
    def __init__(self, folder):
        self.folder = folder
        self.model, self.params = load_pretrained(folder)
        self.config = self.model.config
        self.ref = dict(np.load(folder / "ref.npz"))
        self.tokens = jnp.asarray(self.ref["tokens"])

    def apply(self, *args, **kwargs):
        return jax.jit(lambda params: self.model.apply({"params": params}, *args, **kwargs))(self.params)


@pytest.fixture(scope="module", params=["scout_like", "maverick_like"])
def case(request):
    return Case(FIXTURES / request.param)


@pytest.fixture(scope="module")
def inner(case):
    """The output, and for each layer the outputs of its modules, unstacked."""
    output, state = case.apply(case.tokens, capture_intermediates=True, mutable=["intermediates"])
    period = len(case.config.block_kinds)
    stacked = state["intermediates"]["layers"]

    def layer(i):
        return jax.tree.map(lambda x: x[i // period], stacked[f"layer_{i % period}"])

    return output, [layer(i) for i in range(case.config.num_layers)]


def test_every_layers_hidden_state_equals_transformers(case, inner):
    _, layers = inner
    for i, layer in enumerate(layers):
        np.testing.assert_allclose(layer["__call__"][0][0], case.ref[f"layer_{i:02d}"], atol=2e-5, rtol=0, err_msg=f"layer {i}")


def test_every_router_chooses_the_same_experts(case, inner):
    _, layers = inner
    moe_layers = [i for i, kind in enumerate(case.config.layer_kinds) if kind.is_moe]
    assert [f"experts_{i:02d}" for i in moe_layers] == sorted(key for key in case.ref if key.startswith("experts"))
    for i in moe_layers:
        routing = layers[i]["feed_forward"]["router"]["__call__"][0]
        np.testing.assert_allclose(routing.logits, case.ref[f"router_logits_{i:02d}"], atol=2e-5, rtol=0)
        np.testing.assert_array_equal(np.sort(routing.experts, axis=-1), case.ref[f"experts_{i:02d}"])


def test_logits_equal_transformers(case, inner):
    np.testing.assert_allclose(inner[0].logits, case.ref["logits"], atol=2e-5, rtol=0)


def test_gradients_of_every_tensor_equal_transformers(case, tmp_path):
    inputs, targets = case.tokens[:, :-1], case.tokens[:, 1:]

    def loss(params):
        return -case.model.apply({"params": params}, inputs, targets=targets).log_probs.mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(case.params)
    np.testing.assert_allclose(value, case.ref["loss"], atol=1e-5)
    save_pretrained(tmp_path / "grads", case.config, grads)  # under the checkpoint's names and in its layouts
    grads = load_file(tmp_path / "grads" / "model.safetensors")
    wanted = {key.removeprefix("grad/"): value for key, value in case.ref.items() if key.startswith("grad/")}
    assert grads.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(grads[name], wanted[name], atol=1e-4 * np.abs(wanted[name]).max(), rtol=0, err_msg=name)


def test_greedy_decoding_with_the_cache_gives_transformers_tokens(case):
    wanted = case.ref["greedy"]
    prompt = case.tokens[:, : case.tokens.shape[1] // 2]

    @jax.jit
    def step(params, tokens, cache):
        output = case.model.apply({"params": params}, tokens, cache=cache)
        return output.logits[:, -1:].argmax(-1), output.cache

    new, cache = step(case.params, prompt, Cache.create(case.config, 1, prompt.shape[1] + wanted.shape[1]))
    generated = [new]
    while len(generated) < wanted.shape[1]:
        new, cache = step(case.params, new, cache)
        generated.append(new)
    np.testing.assert_array_equal(np.concatenate(generated, axis=1), wanted)


def test_packed_documents_and_padded_rows_equal_each_document_alone(case):
    """Also where transformers differs: it takes the temperature from the place in the row, not in the document."""
    T = case.tokens.shape[1]
    first, second = case.tokens[:, :13], case.tokens[:, 13 : T - 4]
    alone = [case.apply(document).logits for document in (first, second)]
    row = jnp.concatenate([jnp.full((1, 2), 3), first, second, jnp.full((1, 2), 3)], axis=1)
    segments = jnp.concatenate([jnp.full((1, n), s) for n, s in ((2, 0), (13, 1), (T - 17, 2), (2, 0))], axis=1)
    logits = case.apply(row, segment_ids=segments).logits
    np.testing.assert_allclose(logits[:, 2:15], alone[0], atol=2e-5, rtol=0)
    np.testing.assert_allclose(logits[:, 15:-2], alone[1], atol=2e-5, rtol=0)


def test_saving_gives_the_same_tensors_back(case, tmp_path):
    save_pretrained(tmp_path / "again", case.config, case.params)
    original, again = (load_file(folder / "model.safetensors") for folder in (case.folder, tmp_path / "again"))
    assert original.keys() == again.keys()
    for name in original:
        np.testing.assert_array_equal(original[name], again[name], err_msg=name)
    assert load_config(tmp_path / "again") == case.config

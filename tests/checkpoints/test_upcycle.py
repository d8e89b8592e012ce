import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama4_jax.checkpoints.layout import layout
from llama4_jax.checkpoints.load import load_params, load_pretrained
from llama4_jax.checkpoints.readers import ParametersReader
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.checkpoints.upcycle import Upcycle, UpcycledReader, parse_upcycle
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params

DENSE = ModelConfig(
    vocab_size=19, hidden_size=12, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=4, dense_ffn_size=20, moe_interval=0,
    nope_interval=0, attention_chunk_size=None, qk_norm=False, temperature=None, tie_embeddings=True,
)  # fmt: skip
TOKENS = jnp.arange(14).reshape(2, 7)


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), abstract_params(Llama4(config)))


DENSE_PARAMS = random_params(DENSE)


def upcycled(upcycle, config=DENSE, params=DENSE_PARAMS):
    return UpcycledReader(ParametersReader(config, params, {"tokenizer.json": b"{}"}), upcycle)


IROPE = dataclasses.replace(DENSE, nope_interval=2, qk_norm=True, attention_chunk_size=4)


@pytest.mark.parametrize(
    ("config", "upcycle"),
    [
        (DENSE, Upcycle()),
        (DENSE, Upcycle(3, 2)),
        (DENSE, Upcycle(1)),
        (DENSE, Upcycle(4, 4, every=4)),
        (IROPE, Upcycle(3, every=2)),
    ],
)
def test_logits_are_the_dense_model_s(config, upcycle):
    dense_params = random_params(config)
    with upcycled(upcycle, config, dense_params) as reader:
        params = load_params(reader)
        assert reader.beside == {"tokenizer.json": b"{}"}
        kinds = [kind.is_moe for kind in reader.config.layer_kinds]
        assert kinds == [(layer + 1) % upcycle.every == 0 for layer in range(4)]
        assert [*reader.tensors] == [placed.name for placed in layout(reader.config)]
    dense = Llama4(config).apply({"params": dense_params}, TOKENS).logits
    logits = Llama4(reader.config).apply({"params": params}, TOKENS).logits
    np.testing.assert_allclose(logits, dense, rtol=1e-6, atol=1e-6)


def test_every_chosen_expert_learns_from_the_first_step_and_no_two_alike():
    """An output projection of zero has a gradient, and the router sends different tokens to different experts."""
    with upcycled(Upcycle(3)) as reader:
        params, model = load_params(reader), Llama4(reader.config)

    def loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, TOKENS).logits)
        return -jnp.take_along_axis(log_p, jnp.roll(TOKENS, -1, axis=1)[..., None], axis=-1).mean()

    routing = model.apply({"params": params}, TOKENS).router_stats.load  # [layers, E]
    assert (routing > 0).sum() > len(routing)
    gradient = jax.grad(loss)(params)["layers"]["layer_0"]["feed_forward"]["experts"]["down"]["kernel"]  # [layers, E, F, D]
    moved = np.abs(gradient).max(axis=(2, 3)) > 0
    np.testing.assert_array_equal(moved, routing > 0)
    for layer in np.asarray(gradient):
        chosen = [expert for expert in layer if expert.any()]
        assert all(not np.allclose(a, b) for i, a in enumerate(chosen) for b in chosen[:i])


def test_experts_are_copies_and_the_router_depends_on_seed_and_name_alone():
    first, again, other = (upcycled(Upcycle(3, seed=seed)) for seed in (0, 0, 1))
    names = [f"model.layers.{layer}.feed_forward.router.weight" for layer in range(4)]
    routers = [first.read(name) for name in names]
    assert 0.5 * DENSE.initializer_range < np.std(routers) < 2 * DENSE.initializer_range
    assert len({router.tobytes() for router in routers}) == 4
    for name, router in zip(names, routers, strict=True):
        np.testing.assert_array_equal(again.read(name), router)
        assert not np.array_equal(other.read(name), router)
    prefix = "model.layers.2.feed_forward."
    gate, up = (first.read(f"{prefix}shared_expert.{part}_proj.weight") for part in ("gate", "up"))
    for expert in first.read(f"{prefix}experts.gate_up_proj"):
        np.testing.assert_array_equal(expert, np.concatenate([gate, up]).T)
    assert not first.read(f"{prefix}experts.down_proj").any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_part_is_the_part_of_the_whole(data):
    reader = upcycled(Upcycle(3))
    name = data.draw(st.sampled_from([name for name in reader.tensors if ".0.feed_forward" in name]))
    shape = reader.tensors[name].shape
    index = tuple(slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape)
    index = index[: data.draw(st.integers(0, len(shape)))]
    np.testing.assert_array_equal(reader.read(name, index), reader.read(name)[index])


def test_it_is_an_ordinary_checkpoint_once_written(tmp_path):
    with upcycled(Upcycle(3, every=2)) as reader:
        params = load_params(reader)
    save_pretrained(tmp_path / "m", reader.config, params)
    model, again = load_pretrained(tmp_path / "m")
    assert model.config.layer_kinds == reader.config.layer_kinds and model.config.num_experts == 3
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["moe_layers"] == [1, 3]


def test_the_other_reader_is_closed_with_this_one():
    closed = []
    source = ParametersReader(DENSE, DENSE_PARAMS)
    source.__class__ = type("Closing", (ParametersReader,), {"__exit__": lambda self, *exception: closed.append(self)})
    with UpcycledReader(source, Upcycle()):
        assert not closed
    assert closed == [source]


@pytest.mark.parametrize(
    ("text", "upcycle"),
    [("experts:8", Upcycle()), ("experts:4, top_k:2", Upcycle(4, 2)), ("seed:7,every:6,experts:16", Upcycle(16, 1, 6, 7))],
)
def test_the_flag_is_parsed(text, upcycle):
    assert parse_upcycle(text) == upcycle


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not one of experts:NUMBER"),
        ("8", "'8' is not one of"),
        ("expert:8", "'expert:8' is not one of experts:NUMBER, top_k:NUMBER"),
        ("experts:8,experts:9", "'experts:9' is not one of"),
        ("experts:eight", "'experts:eight' is not one of"),
        ("experts:" + "9" * 5000, "is not one of"),
        ("experts:0", "experts must be 1 or more, got 0"),
        ("experts:8,top_k:9", "top_k=9 is more than experts=8"),
        ("every:0", "every must be 1 or more"),
        ("seed:-1", "seed must be 0 or more"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(text, words):
    with pytest.raises(UserError, match=words) as error:
        parse_upcycle(text)
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_cannot_be_upcycled_is_refused():
    moe = dataclasses.replace(DENSE, moe_interval=2, num_experts=2, expert_ffn_size=8)
    with pytest.raises(UserError, match="has 2 experts already; only a dense one"):
        upcycled(Upcycle(), moe, random_params(moe))
    with pytest.raises(UserError, match="every=5 gives experts to none of 4 layers"):
        upcycled(Upcycle(every=5))
    source = ParametersReader(DENSE, DENSE_PARAMS)
    del source.tensors["model.layers.1.feed_forward.gate_proj.weight"]
    with pytest.raises(UserError, match=r"gate_proj.weight is missing"):
        UpcycledReader(source, Upcycle())

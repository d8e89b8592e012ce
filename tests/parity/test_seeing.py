"""Our vision tower and early fusion against what transformers computed on the checkpoint `seeing` (see make_fixture.py)."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from llama4_jax.checkpoints.load import load_pretrained
from llama4_jax.checkpoints.save import save_pretrained

FOLDER = Path(__file__).parent / "fixtures" / "seeing"


@pytest.fixture(scope="module")
def seeing():
    """Model, parameters, reference."""
    reference = {key: jnp.asarray(value) for key, value in np.load(FOLDER / "ref.npz").items()}
    return *load_pretrained(FOLDER), reference


def test_every_state_of_the_tower_and_the_logits_equal_transformers(seeing):
    model, params, ref = seeing
    run = jax.jit(
        lambda params: model.apply({"params": params}, ref["tokens"], images=ref["images"], capture_intermediates=True)
    )
    output, state = run(params)
    tower = state["intermediates"]["vision"]
    got = {"patches": tower["patch_embedding"], "projector": tower["projector"]}
    got |= {name: tower[name] for name in ("norm_pre", "norm_post")}
    got = {name: module["__call__"][0] for name, module in got.items()}
    layers = tower["layers"]["__call__"][0][0]
    got |= {f"vision_{i:02d}": layer for i, layer in enumerate(layers)}
    got["adapter"] = nn.gelu(tower["adapter_out"]["__call__"][0], approximate=False)
    for name, value in got.items():
        np.testing.assert_allclose(value, ref[name], atol=2e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(output.logits, ref["logits"], atol=2e-5, rtol=0)


def test_gradients_of_every_tensor_equal_transformers(seeing, tmp_path):
    model, params, ref = seeing
    targets = ref["tokens"][:, 1:]
    weights = jnp.asarray(targets != model.config.vision.patch_token_id, jnp.float32)

    def loss(params):
        log_probs = model.apply({"params": params}, ref["tokens"][:, :-1], images=ref["images"], targets=targets).log_probs
        return -jnp.sum(log_probs * weights) / weights.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, ref["loss"], atol=1e-5)
    save_pretrained(tmp_path / "grads", model.config, grads)  # under the checkpoint's names and in its layouts
    grads = load_file(tmp_path / "grads" / "model.safetensors")
    wanted = {key.removeprefix("grad/"): value for key, value in ref.items() if key.startswith("grad/")}
    assert {name.removeprefix("model.") for name in grads} == {name.removeprefix("model.") for name in wanted}
    for name, want in wanted.items():
        got = grads[name] if name in grads else grads[name.removeprefix("model.")]
        np.testing.assert_allclose(got, want, atol=1e-4 * max(np.abs(want).max(), 1e-3), rtol=0, err_msg=name)

"""Run by test_routing_on_eight_devices.py: bias, capacity and jitter on meshes of eight devices against one device."""

import dataclasses
import json
import sys

import eight_devices as common
import jax
import jax.numpy as jnp

from llama4_jax.config import ExecutionConfig, ObjectiveConfig
from llama4_jax.model.llama4 import Llama4, init_model_state, logical_axes
from llama4_jax.parallel.rules import named_shardings, put_batch, use_mesh
from llama4_jax.training.balancing import bias_balancing
from llama4_jax.training.objective import cross_entropy_objective

CONFIG = dataclasses.replace(common.CONFIG, router_bias=True)
OBJECTIVE = ObjectiveConfig(capacity_factor=0.75, router_jitter=0.1, bias_update_rate=0.1)


def outcome(mesh, execution):
    """Loss, metrics, gradients and the bias after a step."""
    model = Llama4(CONFIG, execution)
    objective, balance = cross_entropy_objective(model, OBJECTIVE), bias_balancing(CONFIG, OBJECTIVE, 10)
    params = common.skewed_params(model)
    state = jax.tree.map(lambda bias: bias + jnp.linspace(-0.3, 0.3, CONFIG.num_experts), init_model_state(model))

    def run(params, batch):
        value = jax.value_and_grad(lambda p: objective(p, batch, jax.random.key(3), state), has_aux=True)
        (loss, metrics), gradients = value(params)
        return loss, metrics, gradients, balance(state, metrics["expert_load"], jnp.int32(0))

    with use_mesh(mesh):
        params = jax.device_put(params, named_shardings(params, logical_axes(model), mesh))
        batch = put_batch(common.packed_batch(), mesh)
        return jax.device_get(jax.jit(run, compiler_options=common.OPTIONS)(params, batch))


def main(cases):
    expected = outcome(common.mesh_of({"data": 1}), ExecutionConfig())
    for case in cases:
        sizes, execution = common.CASES[case]
        got = outcome(common.mesh_of(sizes), ExecutionConfig(**execution))
        error = max(jax.tree.leaves(jax.tree.map(common.relative_error, got, expected)))
        print(json.dumps({"case": case, "error": error, "dropped": got[1]["router_drop_share"].tolist()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The programs of a run as the compiler gets them: without data, weights, or the devices that will run them."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama4_jax.app import load_experiment
from llama4_jax.config import Experiment
from llama4_jax.data.batch import Batch
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import BATCH_AXES, batch_sharding, use_mesh
from llama4_jax.training.balancing import bias_balancing
from llama4_jax.training.objective import cross_entropy_objective
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama4_jax.training.state import abstract_state
from llama4_jax.training.step import make_train_step
from pallas_kernels.aot import Case


def train_step(experiment: Experiment, devices: Sequence[jax.Device]) -> Case:
    """One update of `experiment` over `devices`, its state and batch as shapes with shardings.

    Raises:
        UserError: the mesh does not fit the devices, or does not divide the model.
    """
    mesh = make_mesh(experiment.mesh, devices)
    model = Llama4(experiment.model, experiment.execution)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps, experiment.model)
    state = abstract_state(model, optimizer, experiment.optimizer.trainable, mesh)
    step = make_train_step(
        cross_entropy_objective(model, experiment.objective),
        optimizer,
        learning_rate_schedule(experiment.optimizer, experiment.steps),
        state=state,
        mesh=mesh,
        seed=experiment.seed,
        balance=bias_balancing(experiment.model, experiment.objective, experiment.steps),
        microbatches=experiment.execution.microbatches,
    )
    return Case(step, (state, abstract_batch(experiment, mesh)), partial(use_mesh, mesh))


def abstract_batch(experiment: Experiment, mesh) -> Batch:
    """A training batch as shapes with shardings."""
    data, vision = experiment.data, experiment.model.vision
    shape = data.batch_size, data.sequence_length
    places = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in {
            "tokens": jnp.int32,
            "targets": jnp.int32,
            "loss_weights": jnp.float32,
            "positions": jnp.int32,
            "segment_ids": jnp.int32,
        }.items()
    }
    images = None
    if data.image_slots:
        tiles = (data.batch_size, data.image_slots, vision.image_size, vision.image_size, 3)
        images = jax.ShapeDtypeStruct(tiles, jnp.uint8, sharding=NamedSharding(mesh, P(BATCH_AXES)))
    return Batch(**places, images=images, document_window=experiment.model.attention_chunk_size)


def case(devices: Sequence[jax.Device], config: str, settings: dict[str, str], model: dict[str, Any] | None = None) -> Case:
    """The training step of a config file, for `aot.compile_for`.

    Args:
        settings: fields to override, as on the command line: {"mesh.expert": "8"}.
        model: fields of the model to replace.
    """
    experiment = load_experiment(config, settings)
    return train_step(dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, **(model or {}))), devices)

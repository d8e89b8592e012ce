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
from llama4_jax.inference import decoding
from llama4_jax.inference.generator import DECODE_ROOM
from llama4_jax.inference.sampling import Sampling
from llama4_jax.model.llama4 import Llama4, abstract_params, logical_axes
from llama4_jax.parallel.cache_parallel import rows_axes
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import make_mesh, resolved
from llama4_jax.parallel.rules import BATCH_AXES, batch_sharding, named_shardings, use_mesh
from llama4_jax.planning.caches import abstract_cache
from llama4_jax.planning.model_flops import tokens_of
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
    check_fit(mesh, experiment.model, experiment.execution, experiment.data)
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


def prefill(experiment: Experiment, devices: Sequence[jax.Device]) -> Case:
    """The last piece of `data.batch_size` prompts of `data.sequence_length` tokens, as the generator reads it: of prompts over
    `context` all of them."""
    mesh, model, variables = _for_inference(experiment, devices)
    experiment = dataclasses.replace(experiment, mesh=resolved(experiment.mesh, len(devices)))
    rows, length = experiment.data.batch_size, experiment.data.sequence_length
    whole = mesh.shape["context"] > 1
    shape = rows, tokens_of(experiment, "prefill") // rows
    sharding = NamedSharding(mesh, P(rows_axes(mesh, rows), "context" if whole else None))
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    cache = abstract_cache(experiment.model, rows, length, experiment.execution.compute_dtype, mesh).replace(is_empty=whole)

    def read(variables, cache, tokens, segment_ids):
        return decoding.prefill(model, variables, cache, tokens, segment_ids)

    return Case(jax.jit(read, donate_argnums=1), (variables, cache, tokens, tokens), partial(use_mesh, mesh))


def decode(experiment: Experiment, devices: Sequence[jax.Device]) -> Case:
    """Decoding of `data.batch_size` rows with a cache of `data.sequence_length` tokens; a turn of its loop draws a token of
    each row."""
    mesh, model, variables = _for_inference(experiment, devices)
    rows, length = experiment.data.batch_size, experiment.data.sequence_length
    cache = abstract_cache(experiment.model, rows, length, experiment.execution.compute_dtype, mesh)
    sharding = NamedSharding(mesh, P(rows_axes(mesh, rows)))
    replicated = NamedSharding(mesh, P())
    state = decoding.State(
        cache=cache.replace(is_empty=False),
        logits=jax.ShapeDtypeStruct((rows, experiment.model.vocab_size), jnp.float32, sharding=sharding),
        keys=jax.ShapeDtypeStruct((rows,), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=sharding),
        drawn=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        finished=jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=sharding),
    )
    stop_ids = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=replicated)
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)

    def draw(variables, state, stop_ids, steps):
        return decoding.decode(model, variables, state, stop_ids, steps, sampling=Sampling(), room=DECODE_ROOM)

    return Case(jax.jit(draw, donate_argnums=1), (variables, state, stop_ids, steps), partial(use_mesh, mesh))


PROGRAMS = {"train": train_step, "prefill": prefill, "decode": decode}


def _for_inference(experiment: Experiment, devices: Sequence[jax.Device]):
    """The mesh, the model and its variables in the compute dtype."""
    mesh = make_mesh(experiment.mesh, devices)
    model = Llama4(experiment.model, experiment.execution)
    shapes = abstract_params(model)
    shardings = named_shardings(shapes, logical_axes(model), mesh)
    dtype = jnp.dtype(experiment.execution.compute_dtype)
    params = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding), shapes, shardings)
    return mesh, model, {"params": params}


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

"""Everything that a training step changes, and how it lies on the mesh."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from llama4_jax.parallel.rules import named_shardings, use_mesh
from llama4_jax.training.anomalies import Usual
from llama4_jax.training.trainable import split, trainable_paths

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """The state of a run between two steps. Random keys follow from seed and step, so none is stored.

    Attributes:
        step: updates done.
        params: all parameters of the model.
        opt_state: of the parameters that train.
        model_state: what the model carries that no gradient touches (a router's bias, ranges of quantisation).
        usual: what sound steps have lately been like, by which the next is judged.
        trainable: paths of the parameters that train.
    """

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    usual: Usual
    trainable: frozenset[str] = flax.struct.field(pytree_node=False)


def abstract_state(model, optimizer: optax.GradientTransformation, trainable: str, mesh: Mesh) -> TrainState:
    """A TrainState of ShapeDtypeStructs with shardings: parameters by the table of rules, moments like their parameters.

    Raises:
        UserError: the mesh does not divide a parameter, or `trainable` matches none.
    """
    from llama4_jax.model.llama4 import logical_axes

    with use_mesh(mesh):
        initialize = _initializer(model, optimizer, trainable)
        shapes = jax.eval_shape(lambda: initialize(jax.random.key(0)))  # makes no key: the mesh's devices may not be here
    replicated = NamedSharding(mesh, P())
    params = named_shardings(shapes.params, logical_axes(model), mesh)
    trained, _ = split(params, shapes.trainable)
    masked = optax.MaskedNode  # where one of several update rules keeps nothing for a parameter of another
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, sharding: moment if isinstance(moment, masked) else sharding,
        shapes.opt_state,
        trained,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, masked),
    )
    model_state, usual = jax.tree.map(lambda _: replicated, (shapes.model_state, shapes.usual))
    shardings = shapes.replace(step=replicated, params=params, opt_state=opt_state, model_state=model_state, usual=usual)
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings)


def shardings_of(state: TrainState) -> TrainState:
    """The same tree of shardings, of an abstract or a real state."""
    return jax.tree.map(lambda x: x.sharding, state)


def create_state(model, optimizer: optax.GradientTransformation, trainable: str, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step, each shard made where it lives."""
    shardings = shardings_of(abstract_state(model, optimizer, trainable, mesh))
    # XLA:CPU would spend seconds on optimising random numbers that are drawn once; at this level they run as fast.
    options = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else {}
    with use_mesh(mesh):
        initialize = jax.jit(_initializer(model, optimizer, trainable), out_shardings=shardings, compiler_options=options)
        return initialize(jax.random.key(seed))


def _initializer(model, optimizer, trainable: str):
    from llama4_jax.model.llama4 import init_model_state, init_params

    def initialize(key) -> TrainState:
        params = init_params(model, key)
        paths = trainable_paths(params, trainable)
        opt_state = optimizer.init(split(params, paths)[0])
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state, init_model_state(model), Usual.at_start(), paths)

    return initialize

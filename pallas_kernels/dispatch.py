"""How an operation finds its implementation."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.sharding import AxisType


def platform() -> str:
    """Where what is now traced will run: on the devices of the mesh that is set, or on jax's default backend. The two differ
    in ahead-of-time compilation."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _axes_left_to_xla() -> list[str]:
    """The axes of the mesh over which XLA splits what is now traced: none inside a `shard_map` over all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return [name for name, size, kind in axes if size > 1 and kind != AxisType.Manual]


def choose(operation: str, implementations: Mapping[str, Callable], auto: Mapping[str, Sequence[str]], name: str) -> Callable:
    """The implementation called `name`; or for "auto" those that `auto` gives to the platform, the best first.

    Of these the first is used that does not refuse its arguments (NotImplementedError). Where XLA has to split the operation over
    a mesh it is the last, since XLA cannot split a kernel. A UserWarning says why, where it is not the best.

    Raises:
        ValueError: no implementation has that name, or "auto" has none for this platform.
    """
    if name != "auto":
        if name not in implementations:
            raise ValueError(
                f"{operation} has no implementation {name!r}; choose from auto, {', '.join(sorted(implementations))}"
            )
        return implementations[name]
    here = platform()
    if here not in auto:
        raise ValueError(f"{operation} has no default implementation on {here!r}; name one of {sorted(implementations)}")
    *others, last = auto[here]

    def first_that_takes_them(*args, **kwargs):
        for other in others:
            try:
                if split := _axes_left_to_xla():
                    raise NotImplementedError(f"{operation}: XLA cannot split a kernel over the mesh's {', '.join(split)}")
                return implementations[other](*args, **kwargs)
            except NotImplementedError as reason:
                warnings.warn(f"{reason}; computed by XLA instead, which is slower", stacklevel=3)
        return implementations[last](*args, **kwargs)

    return first_that_takes_them if others else implementations[last]

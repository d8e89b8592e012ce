"""How an operation finds its implementation."""

from collections.abc import Callable, Mapping

import jax


def platform() -> str:
    """Where what is now traced will run: on the devices of the mesh that is set, or on jax's default backend. The two differ
    in ahead-of-time compilation."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def choose(operation: str, implementations: Mapping[str, Callable], auto: Mapping[str, str], name: str) -> Callable:
    """The implementation called `name`, or for "auto" the one that `auto` gives to the platform.

    Raises:
        ValueError: no implementation has that name, or "auto" has none for this platform.
    """
    if name == "auto":
        backend = platform()
        if backend not in auto:
            raise ValueError(f"{operation} has no default implementation on {backend!r}; name one of {sorted(implementations)}")
        name = auto[backend]
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; choose from auto, {', '.join(sorted(implementations))}")
    return implementations[name]

"""How an operation finds its implementation."""

from collections.abc import Callable, Mapping

import jax


def choose(operation: str, implementations: Mapping[str, Callable], auto: Mapping[str, str], name: str) -> Callable:
    """The implementation called `name`, or for "auto" the one that `auto` gives to jax's default backend.

    Raises:
        ValueError: no implementation has that name, or "auto" has none for this backend.
    """
    if name == "auto":
        backend = jax.default_backend()
        if backend not in auto:
            raise ValueError(f"{operation} has no default implementation on {backend!r}; name one of {sorted(implementations)}")
        name = auto[backend]
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; choose from auto, {', '.join(sorted(implementations))}")
    return implementations[name]

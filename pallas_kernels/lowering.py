"""Lowering for a GPU that is not there: as far as a kernel can be checked without one."""

from collections.abc import Callable

import jax
from jax.sharding import AbstractDevice, AbstractMesh

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def lower_for_gpu(function: Callable, *arguments) -> str:
    """The StableHLO text of `function(*arguments)` for CUDA, with each Triton kernel as a custom call that holds its code."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

"""What the compiler is told beyond its defaults."""

from jax.sharding import Mesh


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """For `jax.jit` of a program over `mesh`.

    On TPU with `expert`: all-to-all runs beside other work, as the shared expert's on the tokens that are on their way to
    the routed ones. By default it runs alone.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return {"xla_tpu_enable_async_all_to_all": True} if on_tpu and mesh.shape["expert"] > 1 else {}

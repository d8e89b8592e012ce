"""What is wrong with a job is said before it waits in a queue."""

from jax.sharding import AbstractMesh

from llama4_jax.config import Experiment
from llama4_jax.errors import UserError
from llama4_jax.launching.job import Job
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import AXES, axis_sizes


def check_mesh(job: Job, experiment: Experiment) -> None:
    """Raises UserError, in one line with the numbers, when the config's mesh does not fit the job's devices, or the model it."""
    if job.devices is None:
        return
    sizes = axis_sizes(experiment.mesh, job.devices)
    if job.slice_count > 1 and sizes["dcn_data"] != job.slice_count:
        raise UserError(
            f"mesh dcn_data={sizes['dcn_data']} does not span {job.slice_count} slices; add --config.mesh.dcn_data={job.slice_count}"
        )
    check_fit(AbstractMesh(tuple(sizes.values()), AXES), experiment.model, experiment.execution, experiment.data)

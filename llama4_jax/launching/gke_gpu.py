"""GPU machines on Google Kubernetes Engine: one Job, a pod for each machine, one process that drives its GPUs."""

import dataclasses
from typing import Any

from llama4_jax.errors import UserError
from llama4_jax.launching import jobset
from llama4_jax.launching.accelerators import GPUS
from llama4_jax.launching.job import Submission, require_at_least

_GROUP = "node"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeGpuJob(jobset.KubernetesJob):
    """Attributes:
    gpu: a name of `accelerators.GPUS`.
    nodes: machines.
    """

    gpu: str
    nodes: int = 1

    def __post_init__(self):
        super().__post_init__()
        require_at_least(1, self, "nodes")
        if self.gpu not in GPUS:
            raise UserError(f"--gpu={self.gpu}: must be one of {', '.join(GPUS)}")

    @property
    def devices(self) -> int:
        return self.nodes * GPUS[self.gpu].per_node


def manifest(job: GkeGpuJob) -> dict[str, Any]:
    gpu = GPUS[job.gpu]
    nodes = jobset.Nodes(
        group=_GROUP,
        groups=1,
        count=job.nodes,
        selector={"cloud.google.com/gke-accelerator": gpu.gke_name},
        limits={"nvidia.com/gpu": gpu.per_node},
    )
    index = {"fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
    container = {
        "ports": [{"containerPort": jobset.COORDINATOR_PORT}],
        "env": [
            {"name": "LLAMA4_COORDINATOR", "value": f"{job.name}-{_GROUP}-0-0.{job.name}:{jobset.COORDINATOR_PORT}"},
            {"name": "LLAMA4_PROCESS_COUNT", "value": str(job.nodes)},
            {"name": "LLAMA4_PROCESS_ID", "valueFrom": index},
            {"name": "LD_LIBRARY_PATH", "value": "/usr/local/nvidia/lib64"},  # where GKE mounts the driver
        ],
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "securityContext": {"fsGroup": 1000},  # the image's user may write to the storage
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],  # NCCL's, between GPUs of a machine
    }
    return jobset.manifest(job, nodes, container=container, pod=pod)


def submission(job: GkeGpuJob) -> Submission:
    return jobset.submission(job, manifest(job), _GROUP)

"""TPU slices on Google Kubernetes Engine: a Job for each slice, a pod for each of its machines.

GKE tells the pods of such a JobSet who they are (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, with several slices,
MEGASCALE_*): "Deploy TPU Multislices in GKE".
"""

import dataclasses
from typing import Any

from llama4_jax.errors import UserError
from llama4_jax.launching import jobset
from llama4_jax.launching.job import OnSlices, Submission

_GROUP = "slice"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GkeTpuJob(OnSlices, jobset.KubernetesJob):
    def __post_init__(self):
        super().__post_init__()
        if self.slices > 1 and self.slice.hosts == 1:
            raise UserError(f"--slices={self.slices}: GKE joins slices of several machines; {self.topology} has one")


def manifest(job: GkeTpuJob) -> dict[str, Any]:
    nodes = jobset.Nodes(
        group=_GROUP,
        groups=job.slices,
        count=job.slice.hosts,
        selector={
            "cloud.google.com/gke-tpu-accelerator": job.slice.type.gke_name,
            "cloud.google.com/gke-tpu-topology": job.slice.topology,
        },
        limits={"google.com/tpu": job.slice.chips_per_host},
    )
    container = {
        "ports": [{"containerPort": port} for port in (8471, 8080, jobset.COORDINATOR_PORT)],  # chips, slices, processes
        "securityContext": {"privileged": True, "runAsUser": 0},  # the chips are devices of the machine's root
    }
    pod = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # between slices at the machine's own speed
    one_pool_each = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}  # a slice is a node pool
    return jobset.manifest(job, nodes, container=container, pod=pod, annotations=one_pool_each)


def submission(job: GkeTpuJob) -> Submission:
    return jobset.submission(job, manifest(job), _GROUP)

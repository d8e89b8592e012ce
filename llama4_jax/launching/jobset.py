"""What JobSets for TPUs and for GPUs have in common.

A JobSet (jobset.sigs.k8s.io, 0.10.1 or newer for the patterns below) is a group of Kubernetes Jobs that start, fail and
restart together.
"""

import dataclasses
from typing import Any

import yaml

from llama4_jax import exit_codes
from llama4_jax.launching.job import STORAGE, ContainerJob, Submission

COORDINATOR_PORT = 8482
_CONTAINER = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KubernetesJob(ContainerJob):
    """Attributes:
    namespace: of the cluster.
    queue: a Kueue LocalQueue that the job waits in; empty: none.
    max_restarts: many, for a machine that is lost without a word reads as a failure of the pods that miss it.
    """

    max_restarts: int = 50
    namespace: str = "default"
    queue: str = ""


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The machines of a JobSet.

    Attributes:
        group: name of the replicated Job.
        groups, count: Jobs, and machines of each.
        selector: labels of the machines.
        limits: what a pod takes of its machine.
    """

    group: str
    groups: int
    count: int
    selector: dict[str, str]
    limits: dict[str, int]


def manifest(
    job: KubernetesJob,
    nodes: Nodes,
    *,
    container: dict[str, Any],
    pod: dict[str, Any],
    annotations: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The JobSet; `container`, `pod` and `annotations` add to what all have."""
    metadata = {"name": job.name, "namespace": job.namespace}
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    if annotations:
        metadata["annotations"] = annotations
    volumes = [{"name": "storage", "persistentVolumeClaim": {"claimName": job.storage}}, *pod.pop("volumes", [])]
    mounts = [{"name": "storage", "mountPath": STORAGE}, *container.pop("volumeMounts", [])]
    pod_spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "nodeSelector": nodes.selector,
        **pod,
        "containers": [
            {
                "name": _CONTAINER,
                "image": job.image,
                "args": list(job.program),
                **container,
                "resources": {"limits": nodes.limits},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    job_spec = {
        "parallelism": nodes.count,
        "completions": nodes.count,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": _pod_failure_policy(),
        "template": {"spec": pod_spec},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": _failure_policy(job.max_restarts),
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": nodes.group, "replicas": nodes.groups, "template": {"spec": job_spec}}],
        },
    }


def _pod_failure_policy() -> dict[str, Any]:
    """Makes a Job fail with a message that tells why: by an exit status that has a meaning, or by a machine that is taken."""
    codes = sorted((exit_codes.FAILED, exit_codes.PREEMPTED))
    return {
        "rules": [
            {"action": "FailJob", "onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": codes}},
            {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        ]
    }


def _failure_policy(max_restarts: int) -> dict[str, Any]:
    """Reads those messages. A failure that no rule knows restarts the JobSet and counts."""
    return {
        "maxRestarts": max_restarts,
        "restartStrategy": "BlockingRecreate",  # all old processes are gone before new ones start
        "rules": [
            _rule("failedForGood", "FailJobSet", f"exit code {exit_codes.FAILED} "),
            _rule("preempted", "RestartJobSetAndIgnoreMaxRestarts", f"exit code {exit_codes.PREEMPTED} "),
            _rule("machineLost", "RestartJobSetAndIgnoreMaxRestarts", "condition DisruptionTarget "),
        ],
    }


def _rule(name: str, action: str, message: str) -> dict[str, Any]:
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [message],
    }


def submission(job: KubernetesJob, made: dict[str, Any], group: str) -> Submission:
    """kubectl, with the manifest as its input. It refuses what the cluster's schema does not know, and a name that exists."""
    where = f"--namespace={job.namespace}"
    first = f"batch.kubernetes.io/job-name={job.name}-{group}-0,batch.kubernetes.io/job-completion-index=0"
    return Submission(
        command=("kubectl", "create", "--validate=strict", "--filename=-"),
        document=yaml.safe_dump(made, sort_keys=False, width=120),
        afterwards=(
            (f"kubectl get jobset {job.name} {where}", "its state and restarts"),
            (f"kubectl logs --follow {where} --selector={first}", "what it prints"),
            (f"kubectl delete jobset {job.name} {where}", "saves and ends it"),
        ),
    )

"""JobSets hold what their API knows, and nothing else: the Job inside by Kubernetes' own schema (kubernetes-validate has it), the
JobSet around it by the models that kubeflow-trainer-api generates from JobSet's API. Broken manifests show that this notices."""

import copy
import dataclasses

import pytest
import yaml

from llama4_jax import exit_codes
from llama4_jax.launching import gke_gpu, gke_tpu
from llama4_jax.launching.gke_gpu import GkeGpuJob
from llama4_jax.launching.gke_tpu import GkeTpuJob

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jobset_api = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")

KUBERNETES = "1.33"
# What the API lists as comments or annotations, which the generated models do not carry (v1alpha2, JobSet 0.10 to 0.12).
NAMES = {
    "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"},
    "action": {
        "FailJobSet",
        "RestartJobSet",
        "RestartJobSetAndIgnoreMaxRestarts",
        "RestartJob",
        "RestartJobAndIgnoreMaxRestarts",
    },
}

COMMON = {"config": "experiments/pretrain_scout.py", "workdir": "/storage/run", "image": "registry/image:1", "storage": "claim"}
JOBS = {
    "one slice": GkeTpuJob(**COMMON, topology="v5p:4x4x8"),
    "several slices in a queue": GkeTpuJob(
        **COMMON, topology="v6e:16x16", slices=4, queue="tpus", overrides=("--config.steps=5",)
    ),
    "one chip": GkeTpuJob(**COMMON, topology="v5e:1x1"),
    "GPUs": GkeGpuJob(**COMMON, gpu="h200", nodes=4),
    "no restarts": GkeGpuJob(**COMMON, gpu="a100", max_restarts=0),
}


def made(job) -> dict:
    """As kubectl reads it."""
    text = (gke_gpu if isinstance(job, GkeGpuJob) else gke_tpu).submission(job).document
    return yaml.safe_load(text)


def problems(manifest: dict) -> list[str]:
    found = []
    for part in manifest["spec"]["replicatedJobs"]:
        inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": part["template"]["spec"]}
        try:
            kubernetes_validate.validate(inner, KUBERNETES, strict=True)
        except Exception as error:
            found.append(str(error).splitlines()[0])
    try:
        known = jobset_api.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest)).to_dict()
    except ValueError as error:
        found.append(str(error))
    else:
        found += unknown(manifest, known)
    return found


def unknown(given, known, path: str = "") -> list[str]:
    """What did not come back from the models, or has a name that the API does not list."""
    if isinstance(given, dict):
        found = [
            f"{path}/{key}={value}"
            for key, value in given.items()
            if key in NAMES and path.count("/") < 5 and value not in NAMES[key]
        ]
        for key, value in given.items():
            found += unknown(value, known[key], f"{path}/{key}") if key in known else [f"{path}/{key}"]
        return found
    if isinstance(given, list):
        return [text for i, (a, b) in enumerate(zip(given, known, strict=True)) for text in unknown(a, b, f"{path}/{i}")]
    return [] if given == known else [f"{path}: {given!r} is not {known!r}"]


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_manifest_is_what_the_api_knows(job):
    assert problems(made(job)) == []


def inner(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(manifest: dict) -> dict:
    return inner(manifest)["template"]["spec"]["containers"][0]


BROKEN = {
    "misspelt key of the JobSet": lambda m: m["spec"].update(failurePolicies={}),
    "misspelt key of the failure policy": lambda m: m["spec"]["failurePolicy"].update(maxRestart=1),
    "misspelt key of a rule": lambda m: m["spec"]["failurePolicy"]["rules"][0].update(onJobFailureMessages=["x"]),
    "unknown action": lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="StopJobSet"),
    "unknown restart strategy": lambda m: m["spec"]["failurePolicy"].update(restartStrategy="Restart"),
    "number as text": lambda m: m["spec"]["replicatedJobs"][0].update(replicas="2"),
    "misspelt key of the Job": lambda m: inner(m).update(backofLimit=0),
    "unknown action for a pod": lambda m: inner(m)["podFailurePolicy"]["rules"][0].update(action="Fail"),
    "exit status as text": lambda m: inner(m)["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=["42"]),
    "misspelt key of the pod": lambda m: inner(m)["template"]["spec"].update(nodeSelectors={}),
    "no containers": lambda m: inner(m)["template"]["spec"].pop("containers"),
    "number as an environment value": lambda m: container(m).update(env=[{"name": "N", "value": 3}]),
    "port as text": lambda m: container(m)["ports"][0].update(containerPort="8482"),
    "mount without a path": lambda m: container(m)["volumeMounts"][0].pop("mountPath"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_noticed(damage):
    manifest = made(JOBS["several slices in a queue"])
    damage(manifest)
    assert problems(manifest)


def test_pods_and_machines_agree():
    """As many pods as machines, each with all chips of its machine; the address of process 0 is the name of its pod."""
    slices = made(JOBS["several slices in a queue"])
    (part,) = slices["spec"]["replicatedJobs"]
    assert part["replicas"] == 4 and inner(slices)["parallelism"] == inner(slices)["completions"] == 64
    assert container(slices)["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container(made(JOBS["one chip"]))["resources"] == {"limits": {"google.com/tpu": 1}}

    gpus = made(JOBS["GPUs"])
    told = {variable["name"]: variable.get("value") for variable in container(gpus)["env"]}
    job, (group,) = gpus["metadata"]["name"], [part["name"] for part in gpus["spec"]["replicatedJobs"]]
    assert told["LLAMA4_COORDINATOR"] == f"{job}-{group}-0-0.{job}:8482"  # POD.SUBDOMAIN, as JobSet names them
    assert told["LLAMA4_PROCESS_COUNT"] == "4" == str(inner(gpus)["completions"])


def test_machines_lost_without_a_word_do_not_soon_use_up_the_restarts():
    """Their peers end with a status that no rule knows, and JobSet counts."""
    assert made(JOBS["one slice"])["spec"]["failurePolicy"]["maxRestarts"] >= 50
    assert made(JOBS["GPUs"])["spec"]["failurePolicy"]["maxRestarts"] >= 50
    assert made(JOBS["no restarts"])["spec"]["failurePolicy"]["maxRestarts"] == 0


def test_exit_statuses_are_told_apart_by_the_messages_of_kubernetes():
    """The Job controller's words (pod_failure_policy.go), matched by the rules in their order as JobSet does."""
    import re

    policy = made(JOBS["GPUs"])["spec"]["failurePolicy"]

    def action(message: str, reason: str = "PodFailurePolicy") -> str:
        for rule in policy["rules"]:
            if reason in rule["onJobFailureReasons"] and re.search(rule["onJobFailureMessagePatterns"][0], message):
                return rule["action"]
        return "RestartJobSet"

    exited = "Container train for pod default/run-node-0-2-x7k2q failed with exit code {} matching FailJob rule at index 0"
    assert action(exited.format(exit_codes.FAILED)) == "FailJobSet"
    assert action(exited.format(exit_codes.PREEMPTED)) == "RestartJobSetAndIgnoreMaxRestarts"
    lost = "Pod default/run-node-0-2-x7k2q has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(lost) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action("Job has reached the specified backoff limit", "BackoffLimitExceeded") == "RestartJobSet"
    codes = inner(made(JOBS["GPUs"]))["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert codes == [exit_codes.FAILED, exit_codes.PREEMPTED]  # the others have no rule: they end as a reached backoff limit


def test_the_same_job_is_the_same_manifest():
    job = JOBS["several slices in a queue"]
    assert gke_tpu.manifest(job) == gke_tpu.manifest(dataclasses.replace(job))

"""How a process finds its job, joins it, and ends with it."""

import contextlib
import os
import socket
import subprocess
import sys

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

from llama4_jax import exit_codes
from llama4_jax.errors import UserError
from llama4_jax.parallel.processes import Job, find

EXPLICIT = {"LLAMA4_COORDINATOR": "10.0.0.1:1234", "LLAMA4_PROCESS_COUNT": "4", "LLAMA4_PROCESS_ID": "3"}
STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[007-015,020],login",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "99",  # the job's, not the step's
}


def test_without_a_launcher_a_process_is_alone():
    assert find({}) == Job(count=1, index=0, coordinator=None)
    assert find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).count == 1, "a batch script outside of srun"


def test_explicit_variables_come_first():
    assert find(STEP | EXPLICIT) == Job("LLAMA4_*", "10.0.0.1:1234", 4, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"LLAMA4_PROCESS_ID": None}, "LLAMA4_PROCESS_ID must be set too: a process needs all of LLAMA4_COORDINATOR, "),
        ({"LLAMA4_PROCESS_ID": None, "LLAMA4_PROCESS_COUNT": ""}, "LLAMA4_PROCESS_COUNT and LLAMA4_PROCESS_ID must be set too"),
        ({"LLAMA4_PROCESS_ID": "4"}, "LLAMA4_*: process 4 of 4 does not exist; they count from 0 to 3"),
        ({"LLAMA4_PROCESS_COUNT": "many"}, "LLAMA4_PROCESS_COUNT must be a whole number, got 'many'"),
        ({"LLAMA4_COORDINATOR": "node7"}, "LLAMA4_*: the coordinator must be host:port of process 0, got 'node7'"),
    ],
)
def test_a_contradiction_is_one_line(change, message):
    environment = {name: value for name, value in (EXPLICIT | change).items() if value is not None}
    with pytest.raises(UserError) as error:
        find(environment)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("gpu[007-015,020],login", "gpu007"),
        ("gpu[007,009-015]", "gpu007"),
        ("login,gpu[1-2]", "login"),
        ("node3", "node3"),
        ("rack-a[12-13]-ib,rack-b1", "rack-a12-ib"),
    ],
)
def test_the_first_host_of_a_slurm_step_is_where_process_0_runs(nodes, host):
    assert find(STEP | {"SLURM_STEP_NODELIST": nodes}).coordinator.split(":")[0] == host


def test_steps_and_jobs_of_one_machine_have_ports_of_their_own():
    """JAX's choice is one port for all steps of a job, and again for jobs 4,096 apart."""
    places = [("7", "0"), ("7", "1"), ("8", "0"), ("4103", "0")]
    ports = [int(find(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).coordinator.split(":")[1]) for job, step in places]
    assert len(set(ports)) == len(ports) and all(1024 < port < 32768 for port in ports)


def test_a_requeued_job_takes_another_port():
    """Its ids stay; what holds the port may hold it still."""
    turns = [{}, *({"SLURM_RESTART_COUNT": str(count)} for count in range(20))]
    first, *ports = [find(STEP | turn).coordinator for turn in turns]
    assert first == ports[0] and len(set(ports)) == len(ports)
    with pytest.raises(UserError, match="SLURM_RESTART_COUNT must be a whole number, got 'x'"):
        find(STEP | {"SLURM_RESTART_COUNT": "x"})


@pytest.mark.parametrize(
    "change, devices",
    [
        ({}, (1,)),  # eight tasks of a machine see its eight GPUs: one each
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "1"}, None),  # bound by --gpus-per-task
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # alone: it takes all
    ],
)
def test_slurm_tasks_share_the_gpus_of_their_machine(change, devices):
    job = find(STEP | change)
    assert (job.count, job.index, job.local_devices) == (16, 9, devices)


@pytest.fixture
def on_tpu(monkeypatch):
    """jax as it is on a machine with TPUs."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", lambda key: None)
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "tpu,cpu")
    yield
    jax.config.update("jax_platforms", platforms)


def test_gke_tells_of_workers_and_slices(on_tpu, monkeypatch):
    """Two slices of four machines; this is the third machine of the second."""
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost,b,c,d",
        "TPU_WORKER_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert find({}) == Job("GKE", "localhost:8482", 8, 6)


# ------------------------------------------------------------------------------------------------------------------------
# Processes

TOGETHER = """
import sys, time
import jax, numpy as np
from llama4_jax.config import MeshConfig
from llama4_jax.data.batch import Batch
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import places_here, put_batch

job = processes.start()
def refuse():
    raise UserError("no such thing")

calls = []
assert processes.from_first("a list", lambda: calls.append(1) or [3, 2]) == [3, 2]
assert len(calls) == (job.index == 0), "made once"
assert processes.first_then_others("an index", lambda: job.index) == job.index
try:
    processes.from_first("nothing", refuse)
except UserError as error:
    print(error)

# The global batch is the same wherever its rows are read. Devices of a process hold the rows that the mesh gives them.
whole = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
for sizes in ({"data": 8}, {"data": 2, "expert": 2, "context": 2}, {"context": 8, "data": 1}, {"tensor": 4, "data": 2}):
    for order in (jax.devices(), [jax.devices()[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)]):
        mesh = make_mesh(MeshConfig(**sizes), order)
        places = places_here(mesh, 8)
        own = whole[places]
        batch = put_batch(Batch(own, own, own, own, own, images=np.broadcast_to(own[:, :1, None, None, None], (len(own), 1, 2, 2, 3))), mesh)
        for array, expected in ((batch.tokens, whole), (batch.images, np.broadcast_to(whole[:, :1, None, None, None], (8, 1, 2, 2, 3)))):
            assert array.shape == expected.shape
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[shard.index])
    print(sizes, len(places))
"""


def test_processes_answer_refuse_and_hold_the_parts_of_one_batch(start_job):
    job = start_job(2, "-c", TOGETHER)
    assert [process.ended(60) for process in job] == [0, 0], [process.output() for process in job]
    for process in job:
        assert "no such thing" in process.output() and "{'tensor': 4, 'data': 2} 8" in process.output()


ENDING = """
import sys, time
import jax
from llama4_jax import app, exit_codes
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes

def main(overrides):
    job = processes.start()
    if job.index == int(sys.argv[1]):
        {fault}
    time.sleep(60)

app.run(main)
"""


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "fault, status, line",
    [
        ("raise UserError('no such tokenizer')", exit_codes.FAILED, "error: no such tokenizer"),
        ("raise ValueError('a bug')", exit_codes.RETRY, "ValueError: a bug"),
    ],
)
def test_a_fault_of_one_process_ends_all_within_seconds_and_all_say_why(start_job, index, fault, status, line):
    job = start_job(2, "-c", ENDING.replace("{fault}", fault).replace("int(sys.argv[1])", str(index)))
    assert [process.ended(30) for process in job] == [status] * 2, [process.output() for process in job]
    assert line in job[index].output()
    other = 1 - index
    assert f"process {other} of 2 ends, for process {index} failed: {line}" in job[other].output()


def start_alone(*, index, port, host="127.0.0.1", limit=2):
    told = {"LLAMA4_COORDINATOR": f"{host}:{port}", "LLAMA4_PROCESS_COUNT": "2", "LLAMA4_PROCESS_ID": str(index)}
    return start(told, limit)


def start(environment, limit=2):
    script = f"from llama4_jax.parallel import processes; processes.start(limit_seconds={limit})"
    command = [sys.executable, "-c", f"from llama4_jax import app\ndef main(_):\n    {script}\napp.run(main)"]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("index, reason", [(0, "others have not come"), (1, "process 0 does not answer: Connection refused")])
def test_a_process_that_does_not_come_is_told_and_worth_a_retry(index, reason):
    port = free_port()
    alone = start_alone(index=index, port=port)
    assert alone.returncode == exit_codes.RETRY
    assert alone.stderr == f"process {index} of 2 waited 2 s at 127.0.0.1:{port} (LLAMA4_*), but {reason}\n"


def test_a_taken_port_is_told():
    """jax would listen beside the other, and take its processes."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        alone = start_alone(index=0, port=port)
    assert alone.returncode == exit_codes.FAILED
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use; choose another port" in alone.stderr


def test_a_taken_port_that_nobody_chose_is_worth_a_retry():
    step = STEP | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for job in range(100):  # until a port of this machine is free for the test itself
        environment = step | {"SLURM_JOB_ID": str(job)}
        coordinator = find(environment).coordinator
        with socket.socket() as other, contextlib.suppress(OSError):
            other.bind(("", int(coordinator.split(":")[1])))
            other.listen()
            alone = start(environment)
            break
    assert alone.returncode == exit_codes.RETRY
    assert alone.stderr == f"SLURM: process 0 cannot listen at {coordinator}: Address already in use\n"

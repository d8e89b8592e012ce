"""A SLURM of two nodes on one machine for tests: its daemons are children of this process, in one folder, on loopback.

Needs Debian's packages slurm-wlm and munge, and nothing of their set-up.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")

# Both nodes are this machine: their names have to be ones that it finds itself by.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=30
InactiveLimit=0
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def missing() -> list[str]:
    """Of the programs, those that are not on this machine."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """The environment for sbatch and its like, while the daemons run."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", f"spool-{host}", "spool-localhost"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(host=host, ports=_free_ports(3), user=getpass.getuser(), folder=folder, cpus=os.cpu_count())
    )
    environment = os.environ | {"SLURM_CONF": str(configuration), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    with contextlib.ExitStack() as stack:
        _start(stack, munged, folder, environment)
        _wait_for("munged", (folder / "munge.socket").exists)
        _start(stack, ["slurmctld", "-D", "-f", str(configuration)], folder, environment)
        for node in (host, "localhost"):
            _start(stack, ["slurmd", "-D", "-N", node, "-f", str(configuration)], folder, environment)
        _wait_for(
            "idle nodes", lambda: _output(["sinfo", "--noheader", "--Node", "--format=%T"], environment).split() == ["idle"] * 2
        )
        stack.callback(_end_jobs, environment)
        yield environment


def _end_jobs(environment: dict[str, str]) -> None:
    _output(["scancel", "--signal=KILL", "--full", "--user", getpass.getuser()], environment)
    _output(["scancel", "--user", getpass.getuser()], environment)
    _wait_for("an empty queue", lambda: not _output(["squeue", "--noheader"], environment).strip())


def _start(stack: contextlib.ExitStack, command: list[str], folder: Path, environment: dict[str, str]) -> None:
    with open(folder / f"{command[0]}.log", "w") as log:
        daemon = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
    stack.callback(_end, daemon)


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()


def _output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout


def _wait_for(what: str, happens, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} in {seconds} s")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()

"""The generated scripts, run by bash with stand-ins for the cluster's commands: each exit status leads where it should."""

import subprocess
from pathlib import Path

import pytest

from llama4_jax.launching.slurm import SlurmJob, sbatch_file
from llama4_jax.launching.tpu_vm import TpuVmJob, startup_script

# Ends with the next of the statuses that it is to give, and with 0 when there is none left.
GIVES_STATUSES = """
read -r status rest <statuses
echo "$rest" >statuses
exit "${status:-0}"
"""
KEEPS_ARGUMENTS = 'printf "%s\\n" "$(basename "$0") $*" >>calls\n'


def run_script(folder: Path, text: str, statuses: str, stand_ins: dict[str, str]) -> tuple[int, list[str]]:
    """The script's status and the commands that it gave."""
    (folder / "statuses").write_text(statuses + "\n")
    for name, body in stand_ins.items():
        (folder / name).write_text("#!/bin/bash\n" + KEEPS_ARGUMENTS + body)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    ran = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, timeout=20, capture_output=True)
    return ran.returncode, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    "before, status, ends_with, another_turn",
    [
        ([], 0, 0, False),
        ([], 2, 2, False),
        ([], 42, 0, True),
        ([], 1, 0, True),
        ([], 134, 0, True),
        ([42, 42, 42, 1], 42, 0, True),
        ([1], 134, 0, True),
        ([1, 42, 134], 1, 1, False),
    ],
)
def test_sbatch(tmp_path, before, status, ends_with, another_turn):
    """Two failures are worth another turn; preemptions do not count. Every turn is a run of the script."""
    text = sbatch_file(SlurmJob(config="c.py", workdir="the run", max_restarts=2))
    (tmp_path / "the run").mkdir()
    for earlier in (*before, status):
        (tmp_path / "calls").unlink(missing_ok=True)
        ended, calls = run_script(tmp_path, text, str(earlier), {"srun": GIVES_STATUSES, "scontrol": ""})
    assert ended == ends_with
    assert calls[0] == "srun --kill-on-bad-exit=0 --wait=300 python -m llama4_jax.train --config=c.py --workdir=the run"
    assert calls[1:] == (["scontrol requeue 7"] if another_turn else [])


def test_sbatch_that_may_not_be_requeued_ends_as_its_program(tmp_path):
    (tmp_path / "w").mkdir()
    text = sbatch_file(SlurmJob(config="c.py", workdir="w"))
    assert run_script(tmp_path, text, "42", {"srun": GIVES_STATUSES, "scontrol": "exit 1"})[0] == 42


@pytest.mark.parametrize(
    "statuses, runs",
    [("0", 1), ("2", 1), ("42 42 42 42 0", 5), ("1 134 0", 3), ("1 42 134 2", 4), ("1 1 1 1 1", 3)],
)
def test_startup_script(tmp_path, statuses, runs):
    """The container runs again after a preemption, and after two failures; the storage is mounted and the image there first."""
    job = TpuVmJob(
        **{"config": "c.py", "workdir": "/storage/run", "topology": "v5e:4x4", "zone": "z", "max_restarts": 2},
        image="host/image:1",
        storage="server:/my path",
    )
    docker = f'[ "$1" = run ] || exit 0\n{GIVES_STATUSES}'
    commands = {"mountpoint": "exit 1", "apt-get": "", "mkdir": "", "mount": "", "gcloud": "", "docker": docker, "sleep": ""}
    ended, calls = run_script(tmp_path, startup_script(job), statuses, commands)
    assert ended == 0
    assert calls[:6] == [
        "mountpoint --quiet /storage",
        "apt-get install --yes --quiet nfs-common",
        "mkdir -p /storage",
        "mount -t nfs server:/my path /storage",
        "gcloud auth configure-docker host --quiet",
        "docker pull --quiet host/image:1",
    ]
    run = (
        "docker run --name train --privileged --user 0 --network host --stop-timeout 300 --volume /storage:/storage "
        "host/image:1 -m llama4_jax.train --config=c.py --workdir=/storage/run"
    )
    assert [call for call in calls if call.startswith("docker run")] == [run] * runs

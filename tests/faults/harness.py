"""Breaks real runs, and compares what becomes of them with a run that nothing broke.

    bench = Bench(folder)
    run = bench.run(workdir, processes=2)
    job = run.start(faults=[Fault("kill", "llama4_jax.checkpoints.run_checkpoints:RunCheckpoints.save", call=3)])
    job.ended()
    run.finish()                # starts it again until it is done
    assert run.compare().right  # every bit of the final state, every line of metrics.jsonl

A run is `python -m llama4_jax.train` in as many processes as asked for, with a model so small that a step takes milliseconds.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama4_jax import exit_codes

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
EXPERIMENT = HERE.parent / "fixtures/tiny_experiment.py"
STEPS, EVERY = 24, 4
SETTINGS = {
    "steps": STEPS,
    "checkpoint.every": EVERY,
    "checkpoint.keep": 2,
    "evaluations.heldout.every": 12,
    "model.num_layers": 1,
    "model.nope_interval": 1,
}
BATCHES = "llama4_jax.data.pipeline:TrainBatches.__next__"
TIMES = ("step_seconds", "tokens_per_second", "model_tflops_per_second", "mfu")  # the only numbers that may differ
LIMIT = 240  # seconds that one start may take; on two idle cores it takes ten


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to a process at a call of one of its functions.

    Attributes:
        action: kill, freeze, sleep, raise, full (a full disk's error), bound (files grow no larger than `argument` bytes from
            here on); skip: the function is not called, `argument` is its answer; nan, spike: of batches, those that `argument`
            numbers are poisoned; flip: of a sitting, a bit of the last device's copy of a parameter.
        target: module:name of the function, or module:class.name.
        call: the how manieth call of it, from 1; None: each.
        after: when the function has returned, instead of before it is called.
        argument: of sleep, the seconds; of skip, what the function is said to return.
    """

    action: str
    target: str
    call: int | None = None
    after: bool = False
    argument: Any = None


SLOWLY = Fault("sleep", BATCHES, argument=0.04)  # a step takes long enough for saves to end between two, and for kills to hit
# What takes seconds at each start and has no part in what is tested: pictures, and the speed of this machine.
BRIEFLY = (
    Fault("skip", "llama4_jax.training.sitting:write_report"),
    Fault("skip", "llama4_jax.training.flops:_measured_matmul_flops", argument=1e9),
)


class Job:
    """The processes of one start."""

    def __init__(self, processes: list[subprocess.Popen], logs: list[Path]):
        self.processes, self.logs = processes, logs

    def output(self, index: int = 0) -> str:
        return self.logs[index].read_text(errors="replace")

    def outputs(self) -> str:
        """The end of what each has said, for messages."""
        return "\n".join(f"--- process {i}\n{self.output(i)[-2500:]}" for i in range(len(self.logs)))

    def alive(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def signal(self, number: int, index: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.processes[index].send_signal(number)

    def kill(self, index: int = 0) -> None:
        self.signal(signal.SIGKILL, index)

    def wait_until(self, condition: Callable[[], bool], limit: float = LIMIT) -> bool:
        """Whether `condition` came true before all processes ended. Raises TimeoutError."""
        deadline = time.monotonic() + limit
        while self.alive():
            if condition():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(self.outputs())
            time.sleep(0.005)
        return bool(condition())

    def ended(self, limit: float = LIMIT) -> list[int]:
        """The exit statuses; a signal's number is negative. Raises TimeoutError."""
        deadline = time.monotonic() + limit
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise TimeoutError(self.outputs()) from None

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@dataclasses.dataclass
class Comparison:
    """A run beside an unbroken one: what is wrong with it, a line each."""

    wrong: list[str]

    @property
    def right(self) -> bool:
        return not self.wrong


class Bench:
    """A folder with data, a cache of compiled programs, runs, and unbroken ones to compare with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = folder / "data"
        self.runs: list[Run] = []
        self._jobs: list[Job] = []
        self._unbroken: dict[str, Run] = {}
        self.data.mkdir(parents=True)
        numbers = np.random.default_rng(0)
        for i in range(12):
            words = numbers.integers(0, 400, 300)
            (self.data / f"{i:02}.txt").write_text(" ".join(f"word{word}" for word in words))

    def run(self, name: str, *, processes: int = 1, devices: int | None = None, **settings: Any) -> "Run":
        """A run in the folder `name`. `devices` are of each process. In settings, __ is the dot: data__batch_size=4."""
        self.runs.append(Run(self, self.folder / name, processes, devices or 2 // processes or 1, _dotted(settings)))
        return self.runs[-1]

    def unbroken(self, run: "Run") -> "Run":
        """A finished run of the same settings that nothing has broken."""
        key = json.dumps([run.processes, run.devices, run.settings])
        if key not in self._unbroken:
            straight = Run(self, self.folder / f"unbroken-{len(self._unbroken)}", run.processes, run.devices, run.settings)
            straight.finish(starts=1)
            self._unbroken[key] = straight
        return self._unbroken[key]

    def start(self, count: int, devices: int, arguments: Sequence[Any]) -> Job:
        """`count` Python processes of one job."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
        processes, logs = [], []
        for index in range(count):
            together = {"COORDINATOR": coordinator, "PROCESS_COUNT": count, "PROCESS_ID": index} if count > 1 else {}
            told = {f"LLAMA4_{name}": str(value) for name, value in (together | {"LOCAL_DEVICES": devices}).items()}
            logs.append(self.folder / f"log-{len(self._jobs)}-{index}.txt")
            with logs[-1].open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, arguments[index])],
                        env=os.environ | self._environment() | told,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=REPOSITORY,
                    )
                )
        self._jobs.append(Job(processes, logs))
        return self._jobs[-1]

    def _environment(self) -> dict[str, str]:
        return {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def close(self) -> None:
        """Ends what still runs."""
        for job in self._jobs:
            job.end()


class Run:
    """One run, broken and started again at will.

    Attributes:
        checkpoints, metrics: its folder of checkpoints, and metrics.jsonl.
        jobs: its starts.
    """

    def __init__(self, bench: Bench, workdir: Path, processes: int, devices: int, settings: dict[str, Any]):
        self.bench, self.workdir, self.processes, self.devices, self.settings = bench, workdir, processes, devices, settings
        self.checkpoints, self.metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
        self.jobs: list[Job] = []

    def start(self, faults: Sequence[Fault] | dict[int, Sequence[Fault]] = (), **settings: Any) -> Job:
        """Starts it, with faults in every process, or in those that a dict numbers; `settings` are of this start alone."""
        changed = SETTINGS | {"data.sources": self.bench.data} | self.settings | _dotted(settings)
        overrides = [f"--config.{name}={value}" for name, value in changed.items()]
        training = [f"--config={EXPERIMENT}", f"--workdir={self.workdir}", "--prompt=", *overrides]
        by_process = faults if isinstance(faults, dict) else dict.fromkeys(range(self.processes), faults)
        arguments = [
            [HERE / "child.py", json.dumps([dataclasses.asdict(f) for f in (*BRIEFLY, *by_process.get(i, ()))]), *training]
            for i in range(self.processes)
        ]
        job = self.bench.start(self.processes, self.devices, arguments)
        self.jobs.append(job)
        return job

    def finish(self, *, starts: int = 4, faults: Sequence[Fault] = (SLOWLY,), **settings: Any) -> None:
        """Starts it until it is done. Raises AssertionError when it gives up, or has not come to the end in so many starts."""
        for _ in range(starts):
            job = self.start(faults, **settings)
            statuses = job.ended()
            if statuses == [exit_codes.DONE] * self.processes:
                return
            assert exit_codes.FAILED not in statuses, job.outputs()
        raise AssertionError(f"not done after {starts} starts: {statuses}\n{job.outputs()}")

    def whole_steps(self) -> list[int]:
        """The steps whose checkpoints count."""
        return sorted(int(path.parent.name) for path in self.checkpoints.glob("*/manifest.json") if path.parent.name.isdigit())

    @staticmethod
    def went_on(job: Job) -> tuple[int, int] | None:
        """The step that the run had come to, and the one from which this start went on; None where it went on from nothing."""
        said = re.search(r"had come to step (\d+); it goes on from (?:the checkpoint of )?step (\d+)", job.output())
        return None if said is None else (int(said[1]), int(said[2]))

    def step(self) -> int:
        """The last one that is logged."""
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            return json.loads(self.metrics.read_text().splitlines()[-1])["step"]
        return 0

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without times."""
        records = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        return [{name: value for name, value in record.items() if name not in TIMES} for record in records]

    def compare(self, other: "Run | None" = None) -> Comparison:
        """This finished run beside an unbroken one (None: of its own settings): all arrays of the final state, all lines."""
        other = other or self.bench.unbroken(self)
        wrong = []
        mine, its = self.final_state(), other.final_state()
        if mine.keys() != its.keys():
            return Comparison([f"the final state has other arrays: {sorted(mine.keys() ^ its.keys())}"])
        for name, array in its.items():
            if mine[name].dtype != array.dtype or mine[name].tobytes() != array.tobytes():
                wrong.append(f"{name} differs")
        if len(self.records()) != len(other.records()):
            wrong.append(f"metrics.jsonl has {len(self.records())} lines, not {len(other.records())}")
        for one, two in zip(self.records(), other.records(), strict=False):
            if one != two:
                differing = [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
                wrong.append(f"metrics.jsonl, step {two['step']}: {', '.join(sorted(differing))} differ")
        return Comparison(wrong)

    def final_state(self) -> dict[str, np.ndarray]:
        """Every array of the last step's checkpoint, by path."""
        return read_arrays(self.checkpoints / str(self.settings.get("steps", STEPS)) / "state")


def read_arrays(folder: Path) -> dict[str, np.ndarray]:
    """What Orbax wrote there, read by Orbax itself."""
    import jax
    import orbax.checkpoint as ocp

    with contextlib.closing(ocp.PyTreeCheckpointer()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        arrays = checkpointer.restore(folder, restore_args=restore_args)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(arrays)}


def _dotted(settings: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in settings.items()}

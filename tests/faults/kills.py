"""kill -9: at random moments, and at each moment at which a checkpoint is half made."""

import dataclasses
import random
import signal
import time
from collections.abc import Iterable, Iterator

from tests.faults.harness import SLOWLY, STEPS, Bench, Fault, Job, Run
from tests.faults.rows import Row

CHECKPOINTS = "llama4_jax.checkpoints.run_checkpoints"

# What is under way when the process dies: the function, which call of it, and whether it has returned.
MOMENTS: dict[str, Fault] = {
    "before a save": Fault("kill", f"{CHECKPOINTS}:RunCheckpoints.save", call=2),
    "copied to the host, files being written": Fault("kill", f"{CHECKPOINTS}:RunCheckpoints.save", call=2, after=True),
    "files written, before their checksums": Fault("kill", "llama4_jax.checkpoints.manifest:sum_files", call=2),
    "before the manifest": Fault("kill", "llama4_jax.checkpoints.manifest:write_manifest", call=2),
    "manifest written, before the rename": Fault("kill", "llama4_jax.checkpoints.manifest:write_manifest", call=2, after=True),
    "renamed, not synced": Fault("kill", f"{CHECKPOINTS}:sync_folder", call=2),
    "before old ones are deleted": Fault("kill", f"{CHECKPOINTS}:RunCheckpoints._delete_superfluous", call=3),
    "an old one renamed, not deleted": Fault("kill", f"{CHECKPOINTS}:shutil.rmtree", call=1),
}
# The same of a start that has something to restore.
RESTORING: dict[str, Fault] = {
    "verifying": Fault("kill", "llama4_jax.checkpoints.manifest:require_whole", call=1),
    "verified, before it is read": Fault("kill", f"{CHECKPOINTS}:RunCheckpoints.restore_newest", call=1),
    "restored": Fault("kill", f"{CHECKPOINTS}:RunCheckpoints.restore_newest", call=1, after=True),
    "metrics.jsonl cut back": Fault("kill", "llama4_jax.training.work_directory:WorkDirectory.forget_metrics_after", 1, True),
    "the first step after it": Fault("kill", "llama4_jax.data.pipeline:TrainBatches.__next__", call=2),
}


def at_random(bench: Bench, seed: int, *, kills: int, processes: int = 1) -> Iterator[Row]:
    """One run, killed so many times at random moments: one process of it, the others then as a launcher does."""
    chance = random.Random(seed)
    steps = 8 * kills + STEPS
    run = bench.run(f"random-{processes}-{seed}", processes=processes, steps=steps)
    rows = []
    for _ in range(kills):
        job, victim, delay = run.start([SLOWLY]), chance.randrange(processes), chance.uniform(0, 0.2)
        step = run.step() + chance.randint(1, 8)
        assert job.wait_until(lambda job=job, step=step: fresh_step(run, job) >= step), job.outputs()
        time.sleep(delay)
        kill(job, victim)
        rows.append(row_of(run, seed, f"{1000 * delay:.0f} ms after step {step}", victim))
    return settled(run, rows)


def at_moments(bench: Bench, moments: Iterable[str], *, processes: int = 1, victim: int = 0) -> Iterator[Row]:
    """One run, killed at each of these moments, one after another."""
    moments = list(moments)
    run = bench.run(f"moments-{processes}-{victim}-{len(bench.runs)}", processes=processes, steps=16 * len(moments) + STEPS)
    rows = []
    for moment in moments:
        fault = MOMENTS.get(moment) or RESTORING[moment]
        job = run.start({i: [SLOWLY, fault] if i == victim else [SLOWLY] for i in range(processes)})
        job.wait_until(lambda job=job: job.processes[victim].poll() is not None)
        assert job.processes[victim].poll() == -signal.SIGKILL, f"{moment} did not come\n{job.outputs()}"
        kill(job, victim)
        rows.append(row_of(run, 0, moment, victim))
    return settled(run, rows)


def on_every_process(moment: str) -> bool:
    """Whether a process other than the first comes to it: the first alone makes a checkpoint count."""
    return moment in ("before a save", "copied to the host, files being written", "files written, before their checksums")


def fresh_step(run: Run, job: Job) -> int:
    """The last step that this start has logged, 0 before it has logged any."""
    return run.step() if "MFU is of" in job.output() else 0


def kill(job: Job, victim: int) -> None:
    """This process at once; the others soon after, if they have not ended by themselves."""
    job.kill(victim)
    time.sleep(0.3 if len(job.processes) > 1 else 0)
    job.end()


@dataclasses.dataclass
class _Killed:
    row: Row
    newest: int  # step whose checkpoint counted when the process was dead


def row_of(run: Run, seed: int, moment: str, victim: int) -> _Killed:
    several = run.processes > 1
    name = f"kill -9 of one of {run.processes}" if several else "kill -9"
    row = Row(name, seed, f"{moment}, process {victim}" if several else moment)
    return _Killed(row, max(run.whole_steps(), default=0))


def settled(run: Run, kills: list[_Killed]) -> Iterator[Row]:
    """The rows of a run that was killed so often: finished, compared, each with the steps that it cost."""
    run.finish()
    for killed, job in zip(kills, run.jobs[1:], strict=True):
        if (went_on := run.went_on(job)) is not None:
            come_to, resumed = went_on
            killed.row.steps_lost = come_to - resumed
            if resumed != killed.newest:
                killed.row.wrong.append(f"went on from step {resumed}, not {killed.newest}")
    kills[-1].row.wrong += run.compare().wrong
    return (killed.row for killed in kills)

"""Processes of a job that die, freeze, stick, raise or come late; and signals, at every kind of moment."""

import re
import signal
import time
from collections.abc import Iterable, Iterator

from llama4_jax import exit_codes
from tests.faults.disks import finished
from tests.faults.harness import BATCHES, SLOWLY, Bench, Fault, Job, Run
from tests.faults.rows import Row

FOREVER = 10_000.0
WATCHED_SECONDS = 6  # a step's limit, for these runs
LIMITS = {"watch__step_seconds": WATCHED_SECONDS, "watch__step_factor": 1.0}

# What happens to one process of two at its ninth batch, and within how many seconds all others, and it itself, must have ended.
PEERS: dict[str, tuple[Fault, float]] = {
    "killed": (Fault("kill", BATCHES, call=9), 15),
    "frozen": (Fault("freeze", BATCHES, call=9), 20),  # heartbeats of 15 s; the launcher ends the frozen one
    "stuck": (Fault("sleep", BATCHES, call=9, argument=FOREVER), WATCHED_SECONDS + 12),
    "raising": (Fault("raise", BATCHES, call=9), 15),
}
COMPILE = "llama4_jax.training.trainer:Trainer.compile"
SAVE = "llama4_jax.checkpoints.run_checkpoints:RunCheckpoints.save"
MANIFEST = "llama4_jax.checkpoints.manifest:write_manifest"
# What a signal comes into: something that lasts, and how often it is sent.
SIGNALS: dict[str, tuple[Fault, int]] = {
    "in a step": (Fault("sleep", BATCHES, call=7, argument=2.0), 1),
    "in a step, three times": (Fault("sleep", BATCHES, call=7, argument=2.0), 3),
    "in a compilation": (Fault("sleep", COMPILE, call=1, argument=FOREVER), 1),
    "in a save, before it": (Fault("sleep", SAVE, call=2, argument=2.0), 1),
    "in a save, written behind": (Fault("sleep", MANIFEST, call=2, argument=4.0), 1),
}


def broken(bench: Bench, kind: str, victim: int) -> Row:
    """One of two processes breaks: the other ends in time, and the next start goes on to the right bits."""
    fault, limit = PEERS[kind]
    run = bench.run(f"{kind}-{victim}-{len(bench.runs)}", processes=2)
    job = run.start({i: [SLOWLY, fault] if i == victim else [SLOWLY] for i in range(2)}, **LIMITS)
    assert job.wait_until(lambda: fault_time(job, victim) is not None), job.outputs()
    made = fault_time(job, victim)
    awaited, who = ([0, 1], "both") if kind in ("stuck", "raising") else ([1 - victim], "the other")
    took = max(seconds_until_ended(job, i, made, limit) for i in awaited)
    row = Row(f"{kind} peer", 0, f"process {victim} of 2; {who} ended after {took:.1f} s")
    if took > limit:
        row.wrong.append(f"took {took:.0f} s, of {limit:.0f}")
    if any(job.processes[i].poll() in (exit_codes.DONE, exit_codes.FAILED) for i in awaited):  # nobody would start it again
        row.wrong.append(f"ended with {[process.poll() for process in job.processes]}")
    # Its own word, or jax's abort when the other, whose watchdog saw the same, was the first to go.
    if kind in ("stuck", "raising") and job.processes[victim].poll() not in (exit_codes.RETRY, -signal.SIGABRT):
        row.wrong.append(f"it ended with {job.processes[victim].poll()}")
    if kind == "stuck" and "has stood still in step" not in job.output(victim):
        row.wrong.append("it does not say where it stood")
    if kind == "raising" and any("a fault that a test made" not in job.output(i) for i in range(2)):
        row.wrong.append("the exception is not told by all")
    job.end()
    return finished(run, row)


def seconds_until_ended(job: Job, index: int, since: float, limit: float) -> float:
    """How long the process lived after `since`; it is waited for twice as long as it may."""
    while job.processes[index].poll() is None and time.time() < since + 2 * limit:
        time.sleep(0.05)
    return time.time() - since


def fault_time(job: Job, index: int) -> float | None:
    """When the process said that its fault comes now."""
    said = re.search(r"fault: \w+ at ([\d.]+)", job.output(index))
    return float(said[1]) if said else None


def signalled(bench: Bench, moments: Iterable[str], *, processes: int, victim: int, number=signal.SIGTERM) -> Iterator[Row]:
    """One run, asked to stop at each of these moments: no step is lost, and the status asks for another turn."""
    moments = list(moments)
    run = bench.run(f"{number.name}-{processes}-{len(bench.runs)}", processes=processes, steps=24 + 8 * len(moments))
    rows = []
    for moment in moments:
        fault, times = SIGNALS[moment]
        job = run.start([SLOWLY, fault])
        assert job.wait_until(lambda job=job: any(fault_time(job, i) is not None for i in range(processes))), job.outputs()
        time.sleep(0.3)
        sent = time.time()
        for _ in range(times):
            job.signal(number, victim)
            time.sleep(0.1)
        statuses = job.ended(60)
        name = f"{number.name} to one of {processes}" if processes > 1 else number.name
        row = Row(name, 0, f"{moment}; ended after {time.time() - sent:.1f} s", steps_lost=0)
        if statuses != [exit_codes.PREEMPTED] * processes:
            row.wrong.append(f"ended with {statuses}: {job.output()[-300:]}")
        if max(run.whole_steps(), default=0) != run.step():
            row.wrong.append(f"saved step {run.whole_steps()}, and had come to {run.step()}")
        rows.append(row)
    finished(run, rows[-1])
    return iter(rows)


def late(bench: Bench) -> Row:
    """One of two processes comes some seconds after the other."""
    run = bench.run(f"late-{len(bench.runs)}", processes=2)
    wait = Fault("sleep", "llama4_jax.parallel.processes:start", call=1, argument=8.0)
    job = run.start({0: [SLOWLY], 1: [SLOWLY, wait]})
    row = Row("late peer", 0, "process 1 of 2, by 8 s", steps_lost=0)
    if (statuses := job.ended()) != [exit_codes.DONE] * 2:
        row.wrong.append(f"ended with {statuses}")
    row.wrong += run.compare().wrong
    return row


def crash_loop(bench: Bench) -> Row:
    """kill -9 in the first step after a restore, three times in a row: no checkpoint is harmed, none is made, and it goes on."""
    run: Run = bench.run(f"loop-{len(bench.runs)}")
    job = run.start([SLOWLY])
    assert job.wait_until(lambda: bool(run.whole_steps())), job.outputs()
    job.kill()
    job.ended()
    before = run.whole_steps()
    for _ in range(3):
        run.start([Fault("kill", BATCHES, call=2)]).ended()
    row = Row("crash loop", 0, "first step after a restore, three times")
    if run.whole_steps() != before:
        row.wrong.append(f"checkpoints {before} became {run.whole_steps()}")
    return finished(run, row)

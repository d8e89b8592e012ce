"""Batches that would make a run NaN or throw it far off, alone and in a row, on one process or all; and copies that differ."""

import json

from llama4_jax import exit_codes
from tests.faults.disks import finished
from tests.faults.harness import BATCHES, SLOWLY, Bench, Fault, Run
from tests.faults.rows import Row

SETTINGS = {"anomalies__window": 4}
SINGLE, IN_A_ROW = (10,), (10, 11, 12)  # batches of the run, behind the checkpoint of step 8
# A run goes back to its newest checkpoint. With steps this short a save is often skipped for the one before, by chance another
# one in either of the two runs that are compared: here each is waited for.
EVERY_SAVE = Fault("skip", "llama4_jax.checkpoints.run_checkpoints:RunCheckpoints._is_busy", argument=False)


def poisoned(bench: Bench, kind: str, *, processes: int = 1, batches: tuple[int, ...] = SINGLE, again: bool = False) -> Row:
    """Left out on all processes alike and named; killed at any later step, the run ends with the bits of one that was not.

    Args:
        kind: nan or spike.
        batches: that are poisoned: in every process, or of two in the second alone.
        again: also those that come after a rollback are, so that the run must end for good.
    """
    fault = Fault(kind, BATCHES, argument=[*batches, *range(13, 40)] if again else list(batches))
    victims = {processes - 1} if kind == "nan" else set(range(processes))  # of a spike's weights all parts are needed
    faults = {i: [SLOWLY, EVERY_SAVE, *([fault] if i in victims else [])] for i in range(processes)}
    place = f"batches {batches[0]} to {batches[-1]}" if len(batches) > 1 else f"batch {batches[0]}"
    name = {"nan": "NaN loss", "spike": "loss spike"}[kind] + (" on one of 2" if kind == "nan" and processes > 1 else "")
    row = Row(name, 0, place + (", and after the rollback" if again else ""))
    run = bench.run(f"{kind}-{len(bench.runs)}", processes=processes, **SETTINGS)
    if again:
        statuses = run.start(faults).ended()
        row.survived = "refused"
        if (
            statuses != [exit_codes.FAILED] * processes
            or "and past the batches of step 10, batch 10 of the run" not in run.jobs[-1].output()
        ):
            row.survived, row.wrong = "NO", [f"ended with {statuses}: {run.jobs[-1].output()[-300:]}"]
        return row
    straight = bench.run(f"{kind}-straight-{len(bench.runs)}", processes=processes, **SETTINGS)
    assert straight.start(faults).ended() == [exit_codes.DONE] * processes, straight.jobs[-1].outputs()
    job = run.start(faults)
    assert job.wait_until(lambda: is_past(run, batches)), job.outputs()
    job.kill()
    job.end()
    statuses = run.start(faults).ended()
    if statuses != [exit_codes.DONE] * processes:
        row.survived, row.wrong = "NO", [f"ended with {statuses}: {run.jobs[-1].output()[-300:]}"]
        return row
    if (went_on := run.went_on(run.jobs[-1])) is not None:
        row.steps_lost = went_on[0] - went_on[1]
    row.wrong += run.compare(straight).wrong + named(straight, batches)
    return row


def is_past(run: Run, batches: tuple[int, ...]) -> bool:
    """Whether the batch was left out, or the run has gone back for all of them, and on."""
    if len(batches) == 1:
        return run.step() > batches[0]
    return (run.workdir / "rollbacks.json").exists() and run.step() > 8


def named(run: Run, batches: tuple[int, ...]) -> list[str]:
    """What is wrong with how the run tells of them."""
    if len(batches) == 1:
        told = [record["skipped"] for record in run.records() if "skipped" in record]
    else:
        (rollback,) = json.loads((run.workdir / "rollbacks.json").read_text())
        told = rollback["skipped"]
    right = len(told) == len(batches) and all(f"batch {n} of the run" in line for n, line in zip(batches, told, strict=True))
    return [] if right else [f"batches {batches} are told as {told}"]


def flipped_copy(bench: Bench) -> Row:
    """A bit of one device's copy of a parameter flips: found before the next save, named, not saved."""
    run = bench.run(f"copy-{len(bench.runs)}", processes=2, devices=2, mesh__data=2, mesh__fsdp=2)
    flip = Fault("flip", "llama4_jax.training.sitting:Sitting._evaluate_and_save", call=2)
    job = run.start({0: [SLOWLY], 1: [SLOWLY, flip]})
    statuses = job.ended()
    row = Row("copies differ", 0, "a bit of a parameter on device 3 of 4, before the save of step 8")
    if statuses != [exit_codes.RETRY] * 2 or "copies of one array differ between devices after step 8" not in job.output():
        row.wrong.append(f"ended with {statuses}: {job.output()[-400:]}")
    if run.whole_steps() != [4]:
        row.wrong.append(f"saved {run.whole_steps()}")
    return finished(run, row)

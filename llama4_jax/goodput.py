"""Where the time of a run went.

    python -m llama4_jax.goodput /tmp/run

Reads events.jsonl of the work directory, prints the share of time that trained and what the rest was lost to, and draws
goodput.png there. It needs no accelerator, and may be asked while the run goes on.
"""

import sys
from datetime import datetime
from pathlib import Path

from llama4_jax import exit_codes
from llama4_jax.errors import UserError


def report(folder: str | Path) -> str:
    """Goodput, the time by cause and the faults, as text; writes goodput.png. Raises UserError when there is nothing to read."""
    from llama4_jax.training.goodput import account, goodput_figure, summary, table  # after the arguments: they take a second
    from llama4_jax.training.recorder import read_events, read_events_of_others

    folder = Path(folder)
    events = read_events(folder)
    if not events:
        raise UserError(f"{folder} holds no events.jsonl with a line in it; give the --workdir of a run")
    goodput = account(events)
    picture = folder / "goodput.png"
    try:
        goodput_figure(events).savefig(picture)
    except OSError as error:
        raise UserError(f"cannot write {picture}: {error.strerror}") from error
    faults = sorted([*goodput.faults, *read_events_of_others(folder)], key=lambda event: event["time"])
    return "\n".join([summary(goodput), "", table(goodput), *map(_line, faults)])


def _line(fault: dict) -> str:
    when = datetime.fromtimestamp(fault["time"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"{when} process {fault.get('process')} on {fault.get('host')}: {fault.get('what', fault['event'])}"


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1 or arguments[0].startswith("-"):
            raise UserError("usage: python -m llama4_jax.goodput DIR, where DIR is the --workdir of a run")
        print(report(arguments[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.FAILED
    return exit_codes.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

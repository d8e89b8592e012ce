"""Where the time of a run went, by its flight recorder: the share that trained, and what the rest was lost to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Events = Sequence[dict[str, Any]]  # the lines of events.jsonl

TRAINING = "training"
REDONE = "steps done again"
SKIPPED = "skipped steps"
STUCK = "steps that never ended"
DOWN = "down"
# What an event begins, which lasts until the next.
CAUSE = {
    "start": "start-up",
    "restore": "restore",
    "compile": "compilation",
    "step": TRAINING,
    "evaluate": "evaluation",
    "save": "saving",
    "finish": "final report",
    "stop": DOWN,
}
CAUSES = (TRAINING, REDONE, SKIPPED, STUCK, *dict.fromkeys(c for c in CAUSE.values() if c not in (TRAINING, DOWN)), DOWN)


@dataclass
class Goodput:
    """Attributes:
    seconds: by cause, all of CAUSES; their sum is the time from the first event to the last.
    sittings: how often a process began to train the run.
    step: updates that count.
    redone: updates that were lost, to a crash or a rollback.
    skipped: updates that were left out, those that were lost included.
    faults: events that tell of one.
    """

    seconds: dict[str, float]
    sittings: int
    step: int
    redone: int
    skipped: int
    faults: list[dict[str, Any]]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Goodput: of the time, that of steps which count. 0 for a run that took no time."""
        return self.seconds[TRAINING] / self.total if self.total else 0.0


@dataclass
class _Stretch:
    """Updates first + 1 to last, in which the run went forward."""

    first: int
    last: int
    seconds: float


def account(events: Events) -> Goodput:
    """Gives each second between two events to one cause.

    Within a sitting time is that of the monotonic clock; between two, that of the wall clock. The seconds of steps that are
    done again later are those of the stretch they were part of, in proportion. Time after the last line of a process that was
    killed counts as down.
    """
    seconds = dict.fromkeys(CAUSES, 0.0)
    stretches: list[_Stretch] = []
    state, step, redone, skipped = "start", 0, 0, 0

    def go_back(to: int) -> None:
        nonlocal redone
        redone += max(step - to, 0)
        while stretches and stretches[-1].last > to:
            stretch = stretches.pop()
            kept = max(to - stretch.first, 0) / (stretch.last - stretch.first)
            seconds[REDONE] += (1 - kept) * stretch.seconds
            if kept:
                stretches.append(_Stretch(stretch.first, to, kept * stretch.seconds))

    for event, following in itertools.pairwise([*events, None]):
        state = event["event"] if event["event"] in CAUSE else state  # a fault begins nothing
        if event["event"] in CAUSE and event.get("step", step) < step:
            go_back(event["step"])
            step = event["step"]
        if following is None:
            break
        if following["event"] == "start":
            seconds[DOWN] += max(following["time"] - event["time"], 0.0)
            continue
        passed = max(following["monotonic"] - event["monotonic"], 0.0)
        if state != "step":
            seconds[CAUSE[state]] += passed
        elif following["event"] == "step" and following["step"] > step:
            count = following["step"] - step
            left_out = min(following.get("skipped", 0), count)
            skipped += left_out
            seconds[SKIPPED] += passed * left_out / count
            stretches.append(_Stretch(step, following["step"], passed * (1 - left_out / count)))
            step = following["step"]
        else:
            seconds[STUCK] += passed
    seconds[TRAINING] = sum(stretch.seconds for stretch in stretches)
    sittings = sum(event["event"] == "start" for event in events)
    return Goodput(seconds, sittings, step, redone, skipped, [event for event in events if event["event"] == "fault"])


def table(goodput: Goodput) -> str:
    """A Markdown table: a row for each cause that took time."""
    rows = [
        f"| {cause} | {_duration(seconds)} | {seconds / goodput.total:.1%} |"
        for cause, seconds in goodput.seconds.items()
        if seconds
    ]
    return "\n".join(["| time | | share |", "|---|---|---|", *rows, f"| all | {_duration(goodput.total)} | |"])


def summary(goodput: Goodput) -> str:
    """One line."""
    counts = [f"{goodput.step} steps", f"{goodput.sittings} sitting" + "s" * (goodput.sittings != 1)]
    counts += [f"{goodput.redone} steps done again"] * (goodput.redone > 0)
    counts += [f"{goodput.skipped} skipped"] * (goodput.skipped > 0)
    return f"goodput {goodput.share:.1%} of {_duration(goodput.total)}: {', '.join(counts)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 120 else f"{hours:.1f} h"


def goodput_figure(events: Events) -> Figure:
    """Updates done by wall clock, with what went on beside training in colours and faults as lines; below, the time by cause."""
    from matplotlib.figure import Figure  # here, since it takes a second; no pyplot: no global state, no window

    goodput = account(events)
    colors = dict(zip(CAUSES, _COLORS, strict=True))
    start = events[0]["time"]
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1.4))

    steps = [event for event in events if "step" in event and event["event"] in CAUSE]
    top.plot([e["time"] - start for e in steps], [e["step"] for e in steps], color="black", linewidth=1)
    for event, following in itertools.pairwise([e for e in events if e["event"] in CAUSE]):
        cause = DOWN if following["event"] == "start" else CAUSE[event["event"]]
        if cause != TRAINING:
            top.axvspan(event["time"] - start, following["time"] - start, color=colors[cause], alpha=0.5, linewidth=0)
    for fault in goodput.faults:
        top.axvline(fault["time"] - start, color="red", linewidth=0.8, linestyle=":")
    top.set(xlabel="seconds since the start", ylabel="updates done", title=summary(goodput))
    top.margins(x=0)

    left = 0.0
    for cause, seconds in goodput.seconds.items():
        if seconds:
            label = f"{cause} {seconds / goodput.total:.1%}"
            bottom.barh(0, seconds, left=left, color=colors[cause], label=label)
            left += seconds
    bottom.set_axis_off()
    bottom.margins(x=0)
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, 0.05), ncols=4, frameon=False, fontsize=8)
    return figure


_COLORS = (
    "tab:green", "tab:red", "gold", "darkred", "tab:blue", "tab:cyan", "tab:purple", "tab:pink", "tab:orange", "tab:brown",
    "lightgray",
)  # fmt: skip

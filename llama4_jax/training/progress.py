"""The live line of a training run, and the time of its steps."""

import sys
import time

from tqdm import tqdm


class Progress:
    """On a terminal, a bar that is redrawn at every step; elsewhere, a plain line at every logged step."""

    def __init__(self, *, start: int, total: int, enabled: bool):
        live = enabled and sys.stderr.isatty()
        self._lines = enabled and not live
        self._bar = tqdm(total=total, initial=start, disable=not live, unit="step", dynamic_ncols=True, file=sys.stderr)
        self._total = total

    def step(self) -> None:
        self._bar.update()

    def go_back(self, step: int) -> None:
        self._bar.n = step
        self._bar.refresh()

    def show(self, record: dict) -> None:
        """`record` is a line of metrics.jsonl."""
        text = describe(record)
        self._bar.set_postfix_str(text, refresh=False)
        if self._lines:
            left = tqdm.format_interval((self._total - record["step"]) * record["step_seconds"])
            print(f"step {record['step']}/{self._total}: {text}, {left} left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._lines or not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class StepTimer:
    """Mean seconds a step, evaluations and checkpoints aside."""

    def __init__(self):
        self._last: float | None = None
        self._seconds, self._steps = 0.0, 0

    def start(self) -> None:
        """At the dispatch of a step; counts only where the timer stood."""
        if self._last is None:
            self._last = time.perf_counter()

    def tick(self) -> None:
        """At the end of a step."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._steps += 1
        self._last = now

    def stop(self) -> None:
        self._last = None

    def mean_and_reset(self) -> float:
        mean = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        return mean


def describe(record: dict) -> str:
    """Loss, speed and balance in words."""
    parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s", f"MFU {record['mfu']:.1%}"]
    if load := record.get("expert_load"):
        parts.append(f"busiest expert {max(max(layer) * len(layer) for layer in load):.2f}x the mean")
    if dropped := max(record.get("router_drop_share") or [0]):
        parts.append(f"{dropped:.1%} dropped")
    return ", ".join(parts)

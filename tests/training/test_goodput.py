"""Accounts of a run's time: every second has one cause, and the causes are the true ones."""

import dataclasses

import hypothesis.strategies as st
import matplotlib.image
import pytest
from hypothesis import given

from llama4_jax import goodput as app
from llama4_jax.training import goodput
from llama4_jax.training.goodput import CAUSES, DOWN, REDONE, SKIPPED, STUCK, TRAINING, account


@dataclasses.dataclass
class Told:
    """A run as it is told, and the truth about its time."""

    events: list = dataclasses.field(default_factory=list)
    truth: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    time: float = 1e9
    boot: float = 0.0  # difference of the two clocks, another at every sitting
    step: int = 0
    by_step: dict = dataclasses.field(
        default_factory=dict
    )  # of each update that counts: its seconds, and whether it was skipped

    def tell(self, event, **details):
        self.events.append({"event": event, "time": self.time, "monotonic": self.time - self.boot, **details})

    def spend(self, cause, seconds):
        self.truth[cause] += seconds
        self.time += seconds

    def go_back(self, step):
        for redone in range(step + 1, self.step + 1):
            seconds, skipped = self.by_step.pop(redone)
            if not skipped:
                self.truth[TRAINING] -= seconds
                self.truth[REDONE] += seconds
        self.step = step

    def train(self, steps, seconds, skipped=0):
        for i in range(steps):
            self.spend(SKIPPED if i < skipped else TRAINING, seconds)
            self.step += 1
            self.by_step[self.step] = seconds, i < skipped
        self.tell("step", step=self.step, **({"skipped": skipped} if skipped else {}))


seconds = st.integers(0, 50).map(float)


@st.composite
def runs(draw):
    """Sittings that train, save, evaluate, roll back, and end in any of the ways there are. All steps of a line last alike."""
    run, saved = Told(), 0
    for sitting in range(draw(st.integers(1, 4))):
        run.boot = draw(st.floats(0, 1e6))
        run.tell("start")
        run.spend("start-up", draw(seconds))
        if sitting:
            run.tell("restore")
            run.spend("restore", draw(seconds))
        run.go_back(saved)
        run.tell("compile", step=run.step)
        run.spend("compilation", draw(seconds))
        run.tell("step", step=run.step)
        for _ in range(draw(st.integers(0, 5))):
            kind = draw(st.sampled_from(["train", "train", "skip", "save", "evaluate", "rollback", "stuck"]))
            if kind == "train":
                run.train(draw(st.integers(1, 9)), draw(seconds))
            elif kind == "skip":
                run.train(1, draw(seconds), skipped=1)
                run.tell("fault", what="skipped", step=run.step)
            elif kind == "save":
                run.tell("save", step=run.step)
                run.spend("saving", draw(seconds))
                saved = run.step
                run.tell("step", step=run.step)
            elif kind == "evaluate":
                run.tell("evaluate", step=run.step)
                run.spend("evaluation", draw(seconds))
                run.tell("step", step=run.step)
            elif kind == "rollback":
                run.go_back(saved)
                run.tell("restore", step=saved)
                run.spend("restore", draw(seconds))
                run.tell("step", step=run.step)
            else:
                run.spend(STUCK, draw(seconds))
                run.tell("fault", what="stuck")
        if draw(st.booleans()):
            run.tell("stop", step=run.step)
        run.time += draw(seconds)  # down, which the next start tells
    return run


def with_down(run):
    """The truth about the time between the last line of a sitting and the next."""
    truth = dict(run.truth)
    for event, following in zip(run.events, run.events[1:], strict=False):
        if following["event"] == "start":
            truth[DOWN] += following["time"] - event["time"]
    return truth


@given(runs())
def test_every_second_has_its_true_cause(run):
    """Also with a clock that starts anew at every boot, and steps lost to crashes and rollbacks of steps saved long before."""
    accounted = account(run.events)
    for cause, expected in with_down(run).items():
        assert accounted.seconds[cause] == pytest.approx(expected, abs=1e-3), cause
    assert accounted.total == pytest.approx(run.events[-1]["time"] - run.events[0]["time"], abs=1e-2)
    assert accounted.step == run.step
    assert 0 <= accounted.share <= 1
    if accounted.total:
        assert sum(value / accounted.total for value in accounted.seconds.values()) == pytest.approx(1)


@given(runs(), st.data())
def test_any_beginning_of_the_file_can_be_read(run, data):
    """A run that goes on, or one whose machine lost the last lines."""
    events = run.events[: data.draw(st.integers(1, len(run.events)))]
    accounted = account(events)
    assert accounted.total == pytest.approx(events[-1]["time"] - events[0]["time"], abs=1e-2)
    assert min(accounted.seconds.values()) >= 0


def a_run(tmp_path):
    run = Told()
    run.tell("start")
    run.spend("start-up", 10)
    run.tell("compile", step=0)
    run.spend("compilation", 20)
    run.tell("step", step=0)
    run.train(60, 1.0)
    run.tell("fault", what="a peer died")
    run.time += 10
    run.tell("start")
    run.tell("compile", step=50)
    run.tell("step", step=50)
    lines = [str(event).replace("'", '"') for event in run.events]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "st')


def test_the_app_tells_the_share_the_causes_and_the_faults(tmp_path, capsys):
    a_run(tmp_path)
    assert app.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "goodput 50.0% of 100.0 s: 50 steps, 2 sittings, 10 steps done again" in printed
    assert "| compilation | 20.0 s | 20.0% |" in printed and "| down | 10.0 s | 10.0% |" in printed
    assert "a peer died" in printed
    picture = matplotlib.image.imread(tmp_path / "goodput.png")
    assert min(picture.shape[:2]) > 200 and picture.std() > 0.01


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a", "b"]])
def test_the_app_says_how_it_is_called(arguments, capsys):
    assert app.main(arguments) == 2
    assert "usage: python -m llama4_jax.goodput DIR" in capsys.readouterr().err


def test_a_folder_without_events_is_told(tmp_path, capsys):
    assert app.main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path} holds no events.jsonl with a line in it; give the --workdir of a run\n"
    )


def test_every_cause_has_a_colour():
    assert len(goodput._COLORS) == len(CAUSES)

"""One sitting of a training run: from a start or a resume to the end, or an interruption."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints, Saved
from llama4_jax.config import Experiment
from llama4_jax.data.batch import Batch
from llama4_jax.data.compression import compression_baselines
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel import processes
from llama4_jax.parallel.table import sharding_table
from llama4_jax.processing.processor import Processor
from llama4_jax.training.anomalies import SOUND, all_finite, describe
from llama4_jax.training.objective import Metrics
from llama4_jax.training.progress import Progress, StepTimer
from llama4_jax.training.recorder import FlightRecorder
from llama4_jax.training.replicas import Replicas
from llama4_jax.training.report import write_report
from llama4_jax.training.state import TrainState
from llama4_jax.training.stopping import StopRequest
from llama4_jax.training.trainer import Trainer
from llama4_jax.training.visibility import TensorBoard, TraceWindow, memory_summary
from llama4_jax.training.watchdog import Watchdog
from llama4_jax.training.work_directory import WorkDirectory, write_whole


@dataclass
class TrainResult:
    """How a run ended.

    Attributes:
        status: finished: the last step is done; stopped: a signal came, and the state is saved; already finished: the
            folder held the finished run, and nothing was done.
        step: updates done.
        evaluations: the last values of each evaluation, by its name in the experiment.
        baselines: bits per byte of general compressors on the held-out text; on the first process only.
        model, state, corpus: None when the run was already finished.
    """

    status: Literal["finished", "stopped", "already finished"]
    step: int
    evaluations: dict[str, dict[str, float]]
    baselines: dict[str, float] = field(default_factory=dict)
    model: Llama4 | None = None
    state: TrainState | None = None
    corpus: Any = None


def last_evaluations(run: WorkDirectory) -> dict[str, dict[str, float]]:
    """The newest values of each evaluation in metrics.jsonl."""
    newest = {}
    for record in run.read_metrics():
        if "evaluation" in record:
            newest[record["evaluation"]] = {k: v for k, v in record.items() if k not in ("step", "evaluation")}
    return newest


@dataclass
class _Dispatched:
    """A step that the devices work on.

    Attributes:
        metrics: of the step, when it is done.
        epochs: how often each source had been read with its batch.
        batch: its number among all global batches of the run.
    """

    step: int
    metrics: Metrics
    epochs: dict[str, float]
    batch: int


class Sitting:
    """One process's part of a run: from a start or a resume to the end or an interruption."""

    def __init__(
        self,
        experiment: Experiment,
        run: WorkDirectory,
        mesh: Mesh,
        checkpoints: RunCheckpoints,
        stop: StopRequest,
        watchdog: Watchdog,
        recorder: FlightRecorder,
        show: bool,
    ):
        self.experiment, self.run, self.checkpoints = experiment, run, checkpoints
        self.stop, self.watchdog, self.recorder = stop, watchdog, recorder
        self.trainer = Trainer(experiment, run, mesh, show=show)
        self._save_words()
        self.replicas = Replicas(mesh, self.trainer.state_shape)
        self._go_to_newest_checkpoint()
        self.progress = Progress(start=self.step, total=experiment.steps, enabled=show)
        if seen := max((record["step"] for record in run.read_metrics()), default=0):
            origin = f"the checkpoint of step {self.step}" if self.step else "step 0, for no checkpoint was complete yet"
            self.progress.say(f"this run had come to step {seen}; it goes on from {origin}")
        run.forget_metrics_after(self.step)
        self.evaluations = self.trainer.evaluations()
        self.timer = StepTimer()
        self.tensorboard = TensorBoard(run.folder / "tensorboard", first_step=self.step + 1)
        self.trace = TraceWindow(experiment.profile, run.folder / "profile")

    def _save_words(self) -> None:
        """The tokenizer's files, with which the folder is a checkpoint to generate from, or to convert."""
        corpus = self.trainer.corpus
        processor = corpus.processor or Processor(corpus.tokenizer, self.experiment.model)
        if processes.is_first():
            try:
                processor.save(self.run.folder)
            except OSError as error:
                raise UserError(f"cannot write to {self.run.folder}: {error.strerror}") from error

    def _go_to_newest_checkpoint(self) -> None:
        """Or to step 0, where there is none."""
        self.watchdog.expect("restore", self.experiment.watch.checkpoint_seconds)
        self.state = self.trainer.restore(self.checkpoints)
        self.step = self.saved_step = self.compared_step = self.sound_step = int(self.state.step)
        self.skipped: list[str] = []  # the last steps, as far as they were left out
        self.spoilt = ""  # what the last update made of the parameters, where that cannot stay

    def train(self) -> TrainResult:
        try:
            self._take_steps()
            with self._doing("save", self.experiment.watch.checkpoint_seconds):
                self._tell_saved(self.checkpoints.wait())
        finally:
            self.watchdog.expect("the end", self.experiment.watch.checkpoint_seconds)
            self.trace.close()
            self.tensorboard.close()
            self.progress.close()
        self.recorder.record("finish", step=self.step)
        baselines = {}
        if processes.is_first():
            baselines = compression_baselines(self.trainer.corpus.heldout_text())
            write_report(self.run.read_metrics(), self.run.folder, baselines)
        status = "finished" if self.step >= self.experiment.steps else "stopped"
        self.recorder.record("stop", step=self.step, why=self.stop.name or status)
        evaluations = last_evaluations(self.run)
        return TrainResult(status, self.step, evaluations, baselines, self.trainer.model, self.state, self.trainer.corpus)

    def _take_steps(self) -> None:
        batch = self.trainer.next_batch(self.step)
        train_step = self._compile(batch)
        in_flight = None
        begun = itertools.count(1)  # steps of this sitting: unlike the step's number, this never goes back
        while self.step < self.experiment.steps and not self.stop.reached(next(begun)):
            batch = batch or self.trainer.next_batch(self.step)
            self.trace.before(self.step + 1)
            self.timer.start()
            self.state, metrics = train_step(self.state, batch)
            self.step, batch = self.step + 1, None
            # The device works on this step while the host reads the metrics of the one before.
            if in_flight is not None:
                self._settle(in_flight)
            in_flight = _Dispatched(self.step, metrics, self.trainer.batches.epochs, self.trainer.batches.step)
            if self._is_due(self.step) and not self._must_go_back():
                self._settle(in_flight)
                in_flight = None
                self.timer.stop()
                if not self._must_go_back():
                    self._evaluate_and_save()
            if self._must_go_back():
                in_flight = None
                self._go_back()
        if in_flight is not None:
            self._settle(in_flight)
        if self.stop.name:
            self._save_and_tell_stop()

    def _save_and_tell_stop(self) -> None:
        if self.step == 0:
            self.progress.say(f"{self.stop.name}: stopped at the beginning, with nothing to save; run again to go on")
            return
        self._look_at_parameters()
        # Saved amid these, the run could not go back to before them, and would end with other bits.
        if self.skipped or self.spoilt:
            self.progress.say(f"{self.stop.name}: stopped amid steps left out; run again to go on from step {self.saved_step}")
            return
        self._save()
        self.progress.say(f"{self.stop.name}: saved step {self.step} and stopped; run again to go on")

    def _compile(self, batch: Batch) -> Callable:
        with self._doing("compile", self.experiment.watch.compile_seconds):
            compiled = self.trainer.compile(self.state, batch)
        if processes.is_first():
            write_whole(self.run.folder / "sharding.txt", sharding_table(self.state.params, self.trainer.mesh) + "\n")
        peak = self.trainer.peak
        self.progress.say(memory_summary(compiled, self.trainer.mesh.local_devices[0]))
        self.progress.say(f"MFU is of {peak.flops:.3g} FLOP/s ({peak.source})")
        return compiled

    def _settle(self, done: _Dispatched) -> None:
        """Waits for a step, tells if it was left out, and logs it where it is due."""
        self._tell_saved(self.checkpoints.check())
        step, verdict = done.step, int(jax.device_get(done.metrics["anomaly"]))
        self.timer.tick()
        self.progress.step()
        self.watchdog.expect_step(step + 1)
        self.recorder.step(step, skipped=verdict != SOUND)
        if verdict != SOUND:
            self._tell_skipped(done, verdict)
            return
        self.skipped.clear()
        self.sound_step = step
        if step % self.experiment.log_every == 0 or step in (1, self.experiment.steps):
            seconds = self.timer.mean_and_reset()
            metrics = {name: value.tolist() for name, value in jax.device_get(done.metrics).items() if name not in _INTERNAL}
            record = {"step": step} | metrics
            record |= {
                "step_seconds": seconds,
                "tokens_per_second": self.trainer.tokens_per_step / seconds,
                "model_tflops_per_second": self.trainer.flops_per_step / seconds / 1e12,
                "mfu": self.trainer.flops_per_step / seconds / self.trainer.peak.flops,
                "epochs": done.epochs,
            }
            self._log(record)
            self.progress.show(record)

    def _tell_skipped(self, done: _Dispatched, verdict: int) -> None:
        values = {name: float(jax.device_get(done.metrics[name])) for name in ("loss", "grad_norm")}
        usual = {name: float(jax.device_get(done.metrics[f"usual_{name}"])) for name in values}
        sources = ", ".join(f"{source} {epochs:.3f}" for source, epochs in done.epochs.items())
        reason = (
            f"step {done.step}, batch {done.batch} of the run (epochs: {sources}), left out: {describe(verdict, values, usual)}"
        )
        self.skipped.append(reason)
        self.recorder.record("fault", step=done.step, what=reason)
        self.run.append_metrics({"step": done.step, "skipped": reason})
        self.progress.say(reason)

    def _look_at_parameters(self) -> None:
        """A step's loss judges the parameters before it: those that it leaves behind are judged here, before they are saved."""
        if not all_finite(self.state.params):
            self.spoilt = f"step {self.step} left parameters behind that are not finite, though its loss and gradients are"

    def _must_go_back(self) -> bool:
        return bool(self.spoilt) or len(self.skipped) >= self.experiment.anomalies.rollback_after

    def _go_back(self) -> None:
        """To the newest checkpoint that steps get past, and on with the batches that come now."""
        came_to, sound, data = self.step, self.sound_step, self.trainer.batches.get_state()
        reasons = [self.spoilt] if self.spoilt else self.skipped
        why = self.spoilt or f"{len(reasons)} steps in a row were left out"
        self.timer.stop()
        with self._doing("save", self.experiment.watch.checkpoint_seconds):
            self._tell_saved(self.checkpoints.wait())
        del self.state  # for its memory
        self.recorder.record("restore")
        self._set_aside_poisoned_checkpoint(sound)
        self._go_to_newest_checkpoint()
        self.trainer.rollbacks.add(to=self.step, sound=sound, skipped=reasons, data=data)
        self.run.forget_metrics_after(self.step)
        self.tensorboard.close()
        self.tensorboard = TensorBoard(self.run.folder / "tensorboard", first_step=self.step + 1)
        self.progress.go_back(self.step)
        line = f"{why}; back from step {came_to} to {self.step}, and on past these batches"
        self.progress.say(line)
        self.recorder.record("fault", step=self.step, what=f"{line}: {'; '.join(reasons)}")
        self._go_on()

    def _set_aside_poisoned_checkpoint(self, sound: int) -> None:
        """The newest, where it must be what is at fault: a step's loss judges the parameters before it, so that nothing has judged
        those that the last sound step left behind. Those of the checkpoint below were judged by the steps between the two."""
        self.watchdog.expect("restore", self.experiment.watch.checkpoint_seconds)
        newest = self.checkpoints.newest_step()
        if newest is None or not self.trainer.rollbacks.never_got_past(newest, sound):
            return
        if self.checkpoints.newest_step(below=newest) is not None:
            reason = "no step after it was sound, whatever the batches"
            self.recorder.record("fault", step=newest, what=f"the checkpoint of step {newest} is set aside: {reason}")
            self.checkpoints.set_aside(newest, reason)

    def _log(self, record: dict[str, Any]) -> None:
        self.run.append_metrics(record)
        self.tensorboard.write(record)

    def _is_due(self, step: int) -> bool:
        """Whether nothing may be in flight after this step: something is saved, compared or evaluated, or a trace opens or closes."""
        cadences = [self.experiment.checkpoint.every, *(config.every for config in self.experiment.evaluations.values())]
        if self.replicas.exist:
            cadences.append(self.experiment.watch.replicas_every)
        at_cadence = any(step % every == 0 for every in cadences)
        return at_cadence or step == self.experiment.steps or self.trace.at_edge(step + 1)

    def _evaluate_and_save(self) -> None:
        last, found = self.step == self.experiment.steps, {}
        saves = last or (self.step % self.experiment.checkpoint.every == 0 and not self.skipped)
        if saves:
            self._look_at_parameters()
            if self.spoilt:
                return
        if self.step % self.experiment.watch.replicas_every == 0:
            self._compare_replicas()
        for name, config in self.experiment.evaluations.items():
            if last or self.step % config.every == 0:
                with self._doing("evaluate", self.experiment.watch.evaluation_seconds):
                    values = self.evaluations[name](self.state.params, self.state.model_state)
                self._log({"step": self.step, "evaluation": name} | values)
                found |= {f"{name}.{key}": value for key, value in values.items()}
                self.progress.say(f"step {self.step}, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        # Saved last: a checkpoint promises that every line up to its step is in metrics.jsonl. And none is made amid steps
        # that are left out: a rollback shall go back to before them.
        if saves:
            self._save(found, may_skip=not last)

    def _save(self, values: dict[str, float] | None = None, *, may_skip: bool = False) -> None:
        if self.saved_step != self.step:
            self._compare_replicas()
            position = self.trainer.batches.get_state()
            with self._doing("save", self.experiment.watch.checkpoint_seconds):
                if self.checkpoints.save(self.step, self.state, position, self.trainer.fingerprint, values, may_skip=may_skip):
                    self.saved_step = self.step

    def _tell_saved(self, saves: list[Saved]) -> None:
        for saved in saves:
            self.recorder.record("saved", checkpoint=saved.step, bytes=saved.bytes, seconds=round(saved.save_seconds, 3))
            self.progress.say(
                f"step {saved.step} saved: {saved.bytes / 1e6:,.1f} MB, safe after {saved.save_seconds:.1f} s, "
                f"training stood still for {saved.blocked_seconds:.2f} s"
            )

    def _compare_replicas(self) -> None:
        if self.replicas.exist and self.compared_step != self.step:
            self.watchdog.expect("comparing replicas", self.experiment.watch.evaluation_seconds)
            self.replicas.require_equal(self.state, f"after step {self.step}")
            self.compared_step = self.step
            self.watchdog.expect_step(self.step + 1)

    @contextlib.contextmanager
    def _doing(self, event: str, limit_seconds: float) -> Iterator[None]:
        """What holds training up: for the flight recorder, and the watchdog."""
        self.recorder.record(event, step=self.step)
        self.watchdog.expect(event, limit_seconds)
        yield
        self._go_on()

    def _go_on(self) -> None:
        self.recorder.record("step", step=self.step)
        self.watchdog.expect_step(self.step + 1)


_INTERNAL = ("anomaly", "usual_loss", "usual_grad_norm")  # metrics of the step that are not logged

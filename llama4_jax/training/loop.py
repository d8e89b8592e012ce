"""A training run, from an Experiment and a folder to a trained model; interrupted at any moment, it goes on where it was."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints, Saved
from llama4_jax.config import Experiment, validated
from llama4_jax.data.compression import compression_baselines
from llama4_jax.data.pipeline import Corpus, heldout_batches, prepare_corpus, train_batches
from llama4_jax.errors import UserError
from llama4_jax.evaluation import EVALUATIONS, Evaluate, EvaluationContext, require_known
from llama4_jax.model.llama4 import Llama4
from llama4_jax.model.low_precision import check_hardware
from llama4_jax.parallel import processes
from llama4_jax.parallel.fit import check_fit
from llama4_jax.parallel.mesh import make_mesh
from llama4_jax.parallel.rules import places_here, put_batch, use_mesh
from llama4_jax.parallel.table import sharding_table
from llama4_jax.processing.processor import Processor
from llama4_jax.training.balancing import bias_balancing
from llama4_jax.training.flops import peak_of, training_flops_per_tile, training_flops_per_token
from llama4_jax.training.objective import Metrics, cross_entropy_objective
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama4_jax.training.pretrained import with_pretrained
from llama4_jax.training.progress import Progress
from llama4_jax.training.report import write_report
from llama4_jax.training.state import TrainState, abstract_state, create_state
from llama4_jax.training.step import make_train_step
from llama4_jax.training.stopping import StopRequest
from llama4_jax.training.visibility import TensorBoard, TraceWindow, memory_summary
from llama4_jax.training.work_directory import WorkDirectory, fixed_settings, require_same_experiment, write_whole


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


def train(experiment: Experiment, workdir: str | Path, *, progress: bool = True) -> TrainResult:
    """Trains, or goes on training, in `workdir`.

    The folder receives experiment.json, sharding.txt, metrics.jsonl, tensorboard/, checkpoints/, loss.png and
    expert_load.png (and profile/, where a trace was asked for). A run that is started
    again goes on from its newest checkpoint, bit for bit as if it had never stopped (on the same mesh and machine).

    Of several processes (see parallel/processes.py) each calls this with the same arguments, on storage that all share.

    Raises:
        UserError: bad input, a folder of another experiment, no checkpoint that can be read where there should be one, a
            disk that refuses, or a loss that is no longer finite.
    """
    experiment = validated(experiment)
    for name, config in experiment.evaluations.items():
        require_known(name, config)
    mesh = make_mesh(experiment.mesh)
    check_hardware(experiment.execution.matmul, mesh.devices.flat[0].device_kind)
    check_fit(mesh, experiment.model, experiment.execution, experiment.data)
    run = WorkDirectory(workdir, experiment)
    with contextlib.closing(RunCheckpoints(run.checkpoints, experiment.checkpoint)) as checkpoints:
        newest = checkpoints.newest_step()
        if newest is not None and newest >= experiment.steps:
            return TrainResult("already finished", newest, last_evaluations(run))
        with use_mesh(mesh), StopRequest() as stop:
            return _Sitting(experiment, run, mesh, checkpoints, stop, progress and processes.is_first()).train()


def last_evaluations(run: WorkDirectory) -> dict[str, dict[str, float]]:
    """The newest values of each evaluation in metrics.jsonl."""
    newest = {}
    for record in run.read_metrics():
        if "evaluation" in record:
            newest[record["evaluation"]] = {k: v for k, v in record.items() if k not in ("step", "evaluation")}
    return newest


class _Sitting:
    """One process's part of a run: from a start or a resume to the end or an interruption."""

    def __init__(self, experiment: Experiment, run: WorkDirectory, mesh: Mesh, checkpoints: RunCheckpoints, stop, show: bool):
        self.experiment, self.run, self.mesh, self.checkpoints, self.stop = experiment, run, mesh, checkpoints, stop
        self.show = show
        self.model = Llama4(experiment.model, experiment.execution)
        self.optimizer = make_optimizer(experiment.optimizer, experiment.steps, experiment.model)
        self.state_shape = abstract_state(self.model, self.optimizer, experiment.optimizer.trainable, mesh)
        self.corpus = processes.first_then_others("the corpus", self._prepare_corpus, limit_seconds=86_400)
        self._save_words()
        self.places = places_here(mesh, experiment.data.batch_size)
        self.batches = train_batches(self.corpus, experiment.data, places=self.places)
        self.fingerprint = {"settings": fixed_settings(run.settings), "corpus": self.corpus.fingerprint}
        self.state = self._restore() or self._create()
        self.step = int(self.state.step)
        self.progress = Progress(start=self.step, total=experiment.steps, enabled=show)
        if seen := max((record["step"] for record in run.read_metrics()), default=0):
            origin = f"the checkpoint of step {self.step}" if self.step else "step 0, for no checkpoint was complete yet"
            self.progress.say(f"this run had come to step {seen}; it goes on from {origin}")
        run.forget_metrics_after(self.step)
        self.saved_step = self.step
        self.evaluations = self._make_evaluations()
        self.timer = _Timer()
        self.tensorboard = TensorBoard(run.folder / "tensorboard", first_step=self.step + 1)
        self.trace = TraceWindow(experiment.profile, run.folder / "profile")

    def _prepare_corpus(self) -> Corpus:
        return prepare_corpus(
            self.experiment.data,
            vocab_size=self.experiment.model.vocab_size,
            model=self.experiment.model,
            document_window=self.experiment.model.attention_chunk_size,
            cache_dir=self.run.folder / "corpus",
            progress=self.show,
        )

    def _save_words(self) -> None:
        """The tokenizer's files, with which the folder is a checkpoint to generate from, or to convert."""
        processor = self.corpus.processor or Processor(self.corpus.tokenizer, self.experiment.model)
        if processes.is_first():
            try:
                processor.save(self.run.folder)
            except OSError as error:
                raise UserError(f"cannot write to {self.run.folder}: {error.strerror}") from error

    def _restore(self) -> TrainState | None:
        restored = self.checkpoints.restore_newest(self.state_shape)
        if restored is None:
            return None
        require_same_experiment(restored.fingerprint["settings"], self.run.settings, self.run.folder)
        self.batches.set_state(restored.data)
        return restored.state

    def _create(self) -> TrainState:
        experiment = self.experiment
        state = create_state(self.model, self.optimizer, experiment.optimizer.trainable, self.mesh, experiment.seed)
        return state if experiment.init_from is None else with_pretrained(state, experiment.model, experiment.init_from)

    def _make_evaluations(self) -> dict[str, Evaluate]:
        if not self.experiment.evaluations:
            return {}
        batches = heldout_batches(self.corpus, self.experiment.data, places=self.places)
        return {
            name: EVALUATIONS[config.function](EvaluationContext(self.model, self.mesh, self.corpus, batches, config))
            for name, config in self.experiment.evaluations.items()
        }

    def train(self) -> TrainResult:
        try:
            self._take_steps()
            self._tell(self.checkpoints.wait())
        finally:
            self.trace.close()
            self.tensorboard.close()
            self.progress.close()
        baselines = {}
        if processes.is_first():
            baselines = compression_baselines(self.corpus.heldout_text())
            write_report(self.run.read_metrics(), self.run.folder, baselines)
        status = "finished" if self.step >= self.experiment.steps else "stopped"
        return TrainResult(status, self.step, last_evaluations(self.run), baselines, self.model, self.state, self.corpus)

    def _take_steps(self) -> None:
        train_step, pending = None, None
        while self.step < self.experiment.steps and not self.stop.reached(self.step + 1):
            batch = put_batch(next(self.batches), self.mesh)
            train_step = train_step or self._compile(batch)
            self.trace.before(self.step + 1)
            self.timer.start()
            self.state, metrics = train_step(self.state, batch)
            self.step += 1
            # The device works on this step while the host reads the metrics of the one before.
            if pending is not None:
                self._settle(*pending)
            pending = (self.step, metrics, self.batches.epochs)
            if self._is_due(self.step):
                self._settle(*pending)
                pending = None
                self.timer.stop()
                self._evaluate_and_save()
        if pending is not None:
            self._settle(*pending)
        if self.stop.name:
            self._save()
            self.progress.say(f"{self.stop.name}: saved step {self.step} and stopped; run again to go on")

    def _compile(self, batch) -> Callable:
        objective = cross_entropy_objective(self.model, self.experiment.objective)
        schedule = learning_rate_schedule(self.experiment.optimizer, self.experiment.steps)
        balance = bias_balancing(self.experiment.model, self.experiment.objective, self.experiment.steps)
        step = make_train_step(
            objective,
            self.optimizer,
            schedule,
            state=self.state,
            mesh=self.mesh,
            seed=self.experiment.seed,
            balance=balance,
            microbatches=self.experiment.execution.microbatches,
        )
        compiled = step.lower(self.state, batch).compile()
        processes.meet("the compiled step")  # on CPU, the step's first collective gives a late process 30 seconds only
        data = self.experiment.data
        self.tokens_per_step = data.batch_size * data.sequence_length
        model = self.experiment.model
        self.flops_per_step = self.tokens_per_step * training_flops_per_token(model, data.sequence_length)
        if data.image_slots:
            tiles = data.batch_size * data.image_slots
            self.flops_per_step += tiles * training_flops_per_tile(model.vision, model.hidden_size)
        self.peak = peak_of(self.mesh.devices.flatten().tolist(), self.experiment.execution.compute_dtype)
        if processes.is_first():
            write_whole(self.run.folder / "sharding.txt", sharding_table(self.state.params, self.mesh) + "\n")
        self.progress.say(memory_summary(compiled, self.mesh.local_devices[0]))
        self.progress.say(f"MFU is of {self.peak.flops:.3g} FLOP/s ({self.peak.source})")
        return compiled

    def _settle(self, step: int, metrics: Metrics, epochs: dict[str, float]) -> None:
        """Waits for a step, checks that it was sound and logs it where it is due."""
        self._tell(self.checkpoints.check())
        loss, grad_norm = jax.device_get((metrics["loss"], metrics["grad_norm"]))
        self.timer.tick()
        self.progress.step()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise UserError(
                f"loss is {loss} and gradient norm {grad_norm} at step {step}; the newest checkpoint is of step {self.saved_step}. "
                f"Lower optimizer.learning_rate, or lengthen optimizer.warmup_steps, in a new --workdir"
            )
        if step % self.experiment.log_every == 0 or step in (1, self.experiment.steps):
            seconds = self.timer.mean_and_reset()
            record = {"step": step} | {name: value.tolist() for name, value in jax.device_get(metrics).items()}
            record |= {
                "step_seconds": seconds,
                "tokens_per_second": self.tokens_per_step / seconds,
                "model_tflops_per_second": self.flops_per_step / seconds / 1e12,
                "mfu": self.flops_per_step / seconds / self.peak.flops,
                "epochs": epochs,
            }
            self._log(record)
            self.progress.show(record)

    def _log(self, record: dict[str, Any]) -> None:
        self.run.append_metrics(record)
        self.tensorboard.write(record)

    def _is_due(self, step: int) -> bool:
        """Whether nothing may be in flight after this step: something is saved or evaluated, or a trace opens or closes."""
        cadences = [self.experiment.checkpoint.every, *(config.every for config in self.experiment.evaluations.values())]
        at_cadence = any(step % every == 0 for every in cadences)
        return at_cadence or step == self.experiment.steps or self.trace.at_edge(step + 1)

    def _evaluate_and_save(self) -> None:
        last, found = self.step == self.experiment.steps, {}
        for name, config in self.experiment.evaluations.items():
            if last or self.step % config.every == 0:
                values = self.evaluations[name](self.state.params, self.state.model_state)
                self._log({"step": self.step, "evaluation": name} | values)
                found |= {f"{name}.{key}": value for key, value in values.items()}
                self.progress.say(f"step {self.step}, {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        # Saved last: a checkpoint promises that every line up to its step is in metrics.jsonl.
        if last or self.step % self.experiment.checkpoint.every == 0:
            self._save(found, may_skip=not last)

    def _save(self, values: dict[str, float] | None = None, *, may_skip: bool = False) -> None:
        if self.saved_step != self.step:
            position = self.batches.get_state()
            if self.checkpoints.save(self.step, self.state, position, self.fingerprint, values, may_skip=may_skip):
                self.saved_step = self.step

    def _tell(self, saves: list[Saved]) -> None:
        for saved in saves:
            self.progress.say(
                f"step {saved.step} saved: {saved.bytes / 1e6:,.1f} MB, safe after {saved.save_seconds:.1f} s, "
                f"training stood still for {saved.blocked_seconds:.2f} s"
            )


class _Timer:
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

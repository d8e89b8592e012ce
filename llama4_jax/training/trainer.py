"""What the steps of an experiment are made of: model, data, optimizer and the compiled step."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from llama4_jax.checkpoints.run_checkpoints import RunCheckpoints
from llama4_jax.config import Experiment
from llama4_jax.data.batch import Batch
from llama4_jax.data.pipeline import Corpus, heldout_batches, prepare_corpus, train_batches
from llama4_jax.evaluation import EVALUATIONS, Evaluate, EvaluationContext
from llama4_jax.model.llama4 import Llama4
from llama4_jax.parallel import processes
from llama4_jax.parallel.rules import places_here, put_batch
from llama4_jax.training.anomalies import Rollbacks
from llama4_jax.training.balancing import bias_balancing
from llama4_jax.training.flops import peak_of, training_flops_per_tile, training_flops_per_token
from llama4_jax.training.objective import cross_entropy_objective
from llama4_jax.training.optimizer import learning_rate_schedule, make_optimizer
from llama4_jax.training.pretrained import with_pretrained
from llama4_jax.training.state import TrainState, abstract_state, create_state
from llama4_jax.training.step import make_train_step
from llama4_jax.training.work_directory import WorkDirectory, fixed_settings, require_same_experiment


class Trainer:
    """Attributes:
    corpus, batches: the data, and the training batches of this process.
    rollbacks: those of the run.
    state_shape: the state as shapes with shardings.
    fingerprint: what tells this experiment from another, for checkpoints.
    tokens_per_step, flops_per_step: of a global batch, forward and backward.
    peak: FLOP/s of the mesh.
    """

    def __init__(self, experiment: Experiment, run: WorkDirectory, mesh: Mesh, *, show: bool):
        """Prepares the corpus, where that is not done. Raises UserError on bad input."""
        self.experiment, self.mesh, self._run = experiment, mesh, run
        self.model = Llama4(experiment.model, experiment.execution)
        self.optimizer = make_optimizer(experiment.optimizer, experiment.steps, experiment.model)
        self.state_shape = abstract_state(self.model, self.optimizer, experiment.optimizer.trainable, mesh)
        prepare = lambda: self._prepare_corpus(run.folder / "corpus", show)  # noqa: E731
        self.corpus = processes.first_then_others("the corpus", prepare, limit_seconds=86_400)
        self.places = places_here(mesh, experiment.data.batch_size)
        self.batches = train_batches(self.corpus, experiment.data, places=self.places)
        self._first_place = self.batches.get_state()
        self.rollbacks = Rollbacks(run.folder)
        self.fingerprint = {"settings": fixed_settings(run.settings), "corpus": self.corpus.fingerprint}

        data, model = experiment.data, experiment.model
        self.tokens_per_step = data.batch_size * data.sequence_length
        self.flops_per_step = self.tokens_per_step * training_flops_per_token(model, data.sequence_length)
        if data.image_slots:
            tiles = data.batch_size * data.image_slots
            self.flops_per_step += tiles * training_flops_per_tile(model.vision, model.hidden_size)
        self.peak = peak_of(mesh.devices.flatten().tolist(), experiment.execution.compute_dtype)

    def _prepare_corpus(self, folder: Path, show: bool) -> Corpus:
        model = self.experiment.model
        return prepare_corpus(
            self.experiment.data,
            vocab_size=model.vocab_size,
            model=model,
            document_window=model.attention_chunk_size,
            cache_dir=folder,
            progress=show,
        )

    def restore(self, checkpoints: RunCheckpoints, *, below: int | None = None) -> TrainState:
        """The state of the newest checkpoint (of a step below that one), with the data at its place; where there is none, the
        state before the first step.

        Raises UserError when the checkpoint is another experiment's, its data are others, or none can be read that should be.
        """
        restored = checkpoints.restore_newest(self.state_shape, below=below)
        if restored is None:
            self.batches.set_state(self._first_place)
            return self._create()
        require_same_experiment(restored.fingerprint["settings"], self._run.settings, self._run.folder)
        self.batches.set_state(restored.data)
        return restored.state

    def _create(self) -> TrainState:
        experiment = self.experiment
        state = create_state(self.model, self.optimizer, experiment.optimizer.trainable, self.mesh, experiment.seed)
        return state if experiment.init_from is None else with_pretrained(state, experiment.model, experiment.init_from)

    def next_batch(self, step: int) -> Batch:
        """The global batch of the update after `step` ones, on the mesh; past those that a rollback left out."""
        if (elsewhere := self.rollbacks.data_after(step)) is not None:
            self.batches.set_state(elsewhere)
        return put_batch(next(self.batches), self.mesh)

    def compile(self, state: TrainState, batch: Batch) -> Callable:
        """The compiled step, see `make_train_step`."""
        experiment = self.experiment
        step = make_train_step(
            cross_entropy_objective(self.model, experiment.objective),
            self.optimizer,
            learning_rate_schedule(experiment.optimizer, experiment.steps),
            state=state,
            mesh=self.mesh,
            seed=experiment.seed,
            balance=bias_balancing(experiment.model, experiment.objective, experiment.steps),
            microbatches=experiment.execution.microbatches,
            anomalies=experiment.anomalies,
        )
        compiled = step.lower(state, batch).compile()
        processes.meet("the compiled step")  # on CPU, the step's first collective gives a late process 30 seconds only
        return compiled

    def evaluations(self) -> dict[str, Evaluate]:
        """Those of the experiment, by name."""
        if not self.experiment.evaluations:
            return {}
        batches = heldout_batches(self.corpus, self.experiment.data, places=self.places)
        return {
            name: EVALUATIONS[config.function](EvaluationContext(self.model, self.mesh, self.corpus, batches, config))
            for name, config in self.experiment.evaluations.items()
        }

r"""Trains a Llama 4 as an experiment's file describes.

    python -m llama4_jax.train --config=experiments/quickstart.py --workdir=/tmp/run --config.optimizer.learning_rate=3e-4

Run again with the same --workdir, it goes on where it was. Exit status: 0 finished, 42 stopped by SIGTERM or Ctrl-C with
everything saved (start again to go on), 2 bad input or a run that diverged, anything else worth another try. As many processes
as a launcher starts train together: see parallel/README.md. --replay_step=N does one step again, to find hardware that is wrong.
"""

import sys
import time

from absl import flags

from llama4_jax import app, exit_codes
from llama4_jax.errors import UserError
from llama4_jax.parallel import processes
from llama4_jax.training.stopping import leaving

_BEGIN = time.monotonic()

_CONFIG = flags.DEFINE_string(
    "config", None, "Python file whose get_config() returns an Experiment; override fields by --config.FIELD=VALUE"
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run: checkpoints, metrics.jsonl, pictures; an interrupted run resumes from it"
)
_PROMPT = flags.DEFINE_string("prompt", "import ", "text that the trained model continues at the end; empty: none")
_REPLAY_STEP = flags.DEFINE_integer(
    "replay_step",
    None,
    "do this step of the run in --workdir twice, from the checkpoint before it, and say whether all bits agree",
)


def main(overrides: dict[str, str]) -> int:
    # The loop saves at a signal. Before and after it nothing is to be saved, and joining the others may take minutes.
    with leaving(lambda name: leave(f"{name}: stopped outside of the training loop, with nothing to save; run again to go on")):
        return run(overrides)


def run(overrides: dict[str, str]) -> int:
    """Trains, or replays a step, as the flags say; the exit status."""
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise UserError("--config=FILE and --workdir=DIR are both needed")
    experiment = app.load_experiment(_CONFIG.value, overrides)
    processes.start()
    if _REPLAY_STEP.value is not None:
        return replay(experiment)
    from llama4_jax.training.loop import train  # after the flags: a misspelt one answers at once

    result = train(experiment, _WORKDIR.value, leave=leave, startup_seconds=time.monotonic() - _BEGIN)
    if result.status == "stopped":
        return exit_codes.PREEMPTED
    if processes.is_first():
        print_summary(result, _WORKDIR.value)
    if result.status == "finished" and _PROMPT.value:
        print_sample(result, _PROMPT.value, experiment.seed)
    return exit_codes.DONE


def replay(experiment) -> int:
    """Prints what --replay_step found; status RETRY when a bit differs."""
    from llama4_jax.training.replay import replay_step

    found = replay_step(experiment, _WORKDIR.value, _REPLAY_STEP.value)
    if processes.is_first():
        print(found)
    return exit_codes.DONE if found.agrees else exit_codes.RETRY


def leave(line: str) -> None:
    """Ends this process, and those of its job, for a signal."""
    print(line, file=sys.stderr, flush=True)
    processes.end(exit_codes.PREEMPTED, line)


def print_summary(result, workdir: str) -> None:
    """Held-out bits per byte beside the compressors'."""
    if result.status == "already finished":
        print(f"{workdir} holds a finished run of {result.step} steps; nothing to do (raise --config.steps to go on)")
    for name, values in result.evaluations.items():
        if "bits_per_byte" in values:
            compressors = "".join(f"; {other} -9 {bits:.3f}" for other, bits in result.baselines.items())
            print(f"{name}: {values['bits_per_byte']:.3f} bits a byte of held-out text{compressors}")
    print(f"checkpoints, metrics.jsonl, loss.png and expert_load.png are in {workdir}")


def print_sample(result, prompt: str, seed: int) -> None:
    """A continuation by the trained model."""
    from llama4_jax.inference.generator import Generator, Limits, Sampling
    from llama4_jax.processing.processor import Processor

    processor = Processor(result.corpus.tokenizer, result.model.config)
    generator = Generator(result.model, result.state.params, processor, model_state=result.state.model_state)
    (sample,) = generator.complete([prompt], Sampling(temperature=0.7), Limits(max_new_tokens=96), seed=seed)
    if processes.is_first():
        print(f"--- a sample that goes on from {prompt!r}\n{prompt}{sample.text}")


if __name__ == "__main__":
    app.run(main)

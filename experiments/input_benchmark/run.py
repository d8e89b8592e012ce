"""Tokens a second of the input pipeline alone, on one process: a training step that asks for fewer never waits.

python experiments/input_benchmark/run.py --config=experiments/quickstart.py
python experiments/input_benchmark/run.py --config=FILE --config.data.prepared=DIR --config.data.sequence_length=8192
"""

import tempfile
import time

from absl import flags
from tqdm import tqdm

from llama4_jax import app
from llama4_jax.errors import UserError

_CONFIG = flags.DEFINE_string(
    "config", None, "Python file whose get_config() returns an Experiment; override by --config.FIELD=VALUE"
)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "how long to read", lower_bound=0.1)


def main(overrides: dict[str, str]) -> None:
    if _CONFIG.value is None:
        raise UserError("--config=FILE is needed")
    experiment = app.load_experiment(_CONFIG.value, overrides)
    from llama4_jax.data.pipeline import prepare_corpus, train_batches

    with tempfile.TemporaryDirectory() as folder:
        corpus = prepare_corpus(
            experiment.data,
            vocab_size=experiment.model.vocab_size,
            document_window=experiment.model.attention_chunk_size,
            cache_dir=f"{folder}/corpus",
        )
        started = time.perf_counter()
        batches = train_batches(corpus, experiment.data)
        next(batches)
        first = time.perf_counter() - started
        for _ in range(8):  # what was prefetched meanwhile
            next(batches)
        tokens, places, count, slowest = 0, 0, 0, 0.0
        started = before = time.perf_counter()
        with tqdm(desc="reading", unit=" batches", delay=2) as bar:
            while before - started < _SECONDS.value:
                batch = next(batches)
                now = time.perf_counter()
                slowest, before = max(slowest, now - before), now
                tokens += int((batch.segment_ids > 0).sum())
                places += batch.tokens.size
                count += 1
                bar.update()
        seconds = before - started
    epochs = ", ".join(f"{source} {value:.2f}" for source, value in batches.epochs.items())
    print(
        f"{tokens / seconds:,.0f} tokens/s, {1000 * seconds / count:.2f} ms a batch of {batch.tokens.shape[0]} x "
        f"{batch.tokens.shape[1]} (slowest {1000 * slowest:.0f} ms, first {1000 * first:.0f} ms); padding {1 - tokens / places:.2%}; "
        f"epochs: {epochs}"
    )


if __name__ == "__main__":
    app.run(main)

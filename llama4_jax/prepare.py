r"""Tokenises the data of an experiment once, into shards that training then reads.

    python -m llama4_jax.prepare --config=experiments/quickstart.py --out=DIR
    python -m llama4_jax.train --config=experiments/quickstart.py --config.data.prepared=DIR --workdir=RUN

Killed and started again, it goes on with the shards that were not finished; run on a finished folder, it verifies it. Exit
status: 0 finished, 42 stopped by Ctrl-C (start again to go on), 2 bad input.
"""

import os
import sys

from absl import flags

from llama4_jax import app, exit_codes
from llama4_jax.errors import UserError

_CONFIG = flags.DEFINE_string(
    "config", None, "Python file whose get_config() returns an Experiment; override fields by --config.FIELD=VALUE"
)
_OUT = flags.DEFINE_string("out", None, "folder of the shards; an interrupted preparation goes on there")
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count(), "processes that tokenise", lower_bound=1)
_SHARD_MB = flags.DEFINE_integer("shard_mb", 128, "megabytes of text in a shard", lower_bound=1)


def main(overrides: dict[str, str]) -> int:
    if _CONFIG.value is None or _OUT.value is None:
        raise UserError("--config=FILE and --out=DIR are both needed")
    experiment = app.load_experiment(_CONFIG.value, overrides)
    from llama4_jax.data.shard_writer import prepare_shards  # after the flags: a misspelt one answers at once

    try:
        manifest = prepare_shards(
            experiment.data,
            _OUT.value,
            vocab_size=experiment.model.vocab_size,
            processes=_PROCESSES.value,
            shard_bytes=_SHARD_MB.value << 20,
        )
    except KeyboardInterrupt:
        print("stopped: finished shards are kept; run again to go on", file=sys.stderr)
        return exit_codes.PREEMPTED
    print_summary(manifest, _OUT.value)
    return exit_codes.DONE


def print_summary(manifest: dict, out: str) -> None:
    """Documents, tokens and bytes of each source."""
    for source in manifest["sources"]:
        counts = "; ".join(
            f"{part} {source[part]['documents']:,} documents, {source[part]['tokens']:,} tokens, {source[part]['bytes']:,} bytes"
            for part in ("train", "heldout")
        )
        print(f"{source['source']}: {counts}; {source['dropped_duplicates']:,} near duplicates dropped")
    print(f"{len(manifest['shards'])} shards and their manifest are in {out}; train with --config.data.prepared={out}")


if __name__ == "__main__":
    app.run(main)

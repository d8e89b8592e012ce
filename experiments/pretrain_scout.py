"""Pre-training of a model of Scout's size, text alone, on a TPU v5p-256 slice: 128 chips, each one JAX device of 95 GB.

107.8 billion parameters, of which 17.2 work on each token. 256 rows of 8,192 tokens, 2.1 million tokens a step; 500,000 steps
are 1.05 trillion tokens. Each chip holds 2 of the 16 experts (`expert=8`), and every weight's width is cut in 16 (`fsdp=16`).
With so few experts, and so many tokens on a chip, a layer's experts come to the tokens, not the tokens to them.
Weights, gradients and both of Adam's moments in float32 take 13.5 GB of a chip, and what the backward pass keeps of each
layer's input another 8.1 GB.

It was never run: no pod was at hand. That the mesh divides every parameter and batch is tested, and the compiler says that the
step fits (`python -m llama4_jax.plan`, see llama4_jax/planning/README.md); a loss or a speed is not promised, and the learning rate is a
guess to be tuned. Meta published neither its data nor its schedule.

The data are yours. Once, then on every host of the slice (launch/README.md shows who starts them):

    python -m llama4_jax.prepare --config=experiments/pretrain_scout.py --out=prepared/text \\
        --config.data.prepared=none --config.data.sources=YOUR_TEXT
    python -m llama4_jax.train --config=experiments/pretrain_scout.py --workdir=runs/scout

The tokenizer is Llama 4's own (pip install 'llama4-jax[llama-tokenizer]'). `--config.optimizer.rule=muon` takes Muon instead.
"""

import dataclasses

import llama4_jax as l4


def get_config() -> l4.Experiment:
    return l4.Experiment(
        model=dataclasses.replace(l4.named_config("scout-17b-16e"), vision=None),
        data=l4.DataConfig(prepared="prepared/text", tokenizer="llama4", sequence_length=8192, batch_size=256),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", remat="layer", expert_exchange="gather_weights"),
        mesh=l4.MeshConfig(fsdp=16, expert=8),
        optimizer=l4.OptimizerConfig(
            learning_rate=3e-4, warmup_steps=2000, decay_fraction=0.1, decay_shape="one_minus_sqrt", final_fraction=0.0
        ),
        evaluations={"heldout": l4.EvaluationConfig("bits_per_byte", every=5000, max_batches=32)},
        checkpoint=l4.CheckpointConfig(every=1000, keep=3),
        steps=500_000,
        log_every=20,
    )

"""The best learning rate stays where it is as a model grows eightfold in width, with `ModelConfig.transfer`.

Twenty runs of 80 steps (41,000 tokens) of a dense Llama 4 of two layers, from width 64, where rate and initial deviation are
as given, to 512, where they are scaled as llama4_jax/model/transfer.py says; then width 512 with both left as given. Bits per
byte of held-out text, lower is better:

    | learning rate         | 0.0039 | 0.0078 | 0.0156 | 0.0312 |
    |-----------------------|--------|--------|--------|--------|
    | width 64              | 3.457  | 3.344* | 3.363  | 3.395  |
    | width 128             | 3.350  | 3.195  | 3.174* | 3.288  |
    | width 256             | 3.183  | 3.069  | 3.046* | 3.132  |
    | width 512             | 3.140  | 2.992  | 2.991* | 3.170  |
    | width 512 unscaled    | 3.175* | 3.258  | 3.408  | 3.766  |

The best rate lies at 0.0078 or 0.0156 at every width: 0.0078 costs at most 0.023 more than the best anywhere. A wider model is
better at every rate that is not the highest. Without scaling the best moves down to 0.0039 (0.00195 gave 3.281), and is 0.18
worse. One seed; rates are a factor of two apart.

The initial deviation, 1 / sqrt(64), is part of what must be right at the base width: with 0.05 the narrow model's signal is too
weak, and growing it by these rules gained nothing.

Python 3.11, jax 0.10.2, XLA_FLAGS=--xla_backend_optimization_level=0, two cores shared with other work; the runs were made in several
sittings that together took about seven minutes, with jax's compilation cache on. A first try with a vocabulary of 1,024 and 64
steps was too noisy at width 512 to show an optimum. Command to run:

    python -m llama4_jax.sweep --config=experiments/width_transfer.py --workdir=runs/width_transfer
"""

from llama4_jax import config as c
from llama4_jax.sweep import Run, Sweep

BASE = 64
RATES = tuple(2.0**-n for n in (8, 7, 6, 5))


def get_sweep() -> Sweep:
    runs = [Run(f"width {width}", rate, experiment(width, rate)) for width in (64, 128, 256, 512) for rate in RATES]
    runs += [Run("width 512 unscaled", rate, experiment(512, rate, scaled=False)) for rate in RATES]
    return Sweep("learning rate", runs)


def experiment(width: int, learning_rate: float, scaled: bool = True) -> c.Experiment:
    return c.Experiment(
        model=c.ModelConfig(
            vocab_size=320,
            hidden_size=width,
            num_layers=2,
            num_heads=width // 32,
            num_kv_heads=width // 64,
            head_dim=32,
            moe_interval=0,
            dense_ffn_size=width,
            nope_interval=2,
            attention_chunk_size=64,
            initializer_range=0.125,
            transfer=c.Transfer(base_width=BASE, base_depth=2) if scaled else None,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_ids=(1,),
            pad_token_id=2,
        ),
        data=c.DataConfig(sources=("python:stdlib",), heldout_fraction=0.005, sequence_length=128, batch_size=4),
        optimizer=c.OptimizerConfig(learning_rate=learning_rate, warmup_steps=10, final_fraction=0.0),
        evaluations={"heldout": c.EvaluationConfig("bits_per_byte", every=80, max_batches=16)},
        checkpoint=c.CheckpointConfig(every=80, keep=1),
        steps=80,
        log_every=20,
    )

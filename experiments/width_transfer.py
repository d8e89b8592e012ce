"""The best learning rate stays where it is as a model grows."""

from llama4_jax import config as c
from llama4_jax.sweep import Run, Sweep

BASE = 64
RATES = tuple(2.0**-n for n in (9, 8, 7, 6, 5))


def get_sweep() -> Sweep:
    runs = [Run(f"width {width}", rate, experiment(width, rate)) for width in (64, 128, 256, 512) for rate in RATES]
    runs += [Run("width 512, not scaled", rate, experiment(512, rate, scaled=False)) for rate in RATES]
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

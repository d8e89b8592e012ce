"""A mixture of experts against a dense model of the same active size, on the same tokens."""

from llama4_jax import config as c
from llama4_jax.sweep import Run, Sweep

ACTIVE_FFN = 384


def get_sweep() -> Sweep:
    experts = dict(num_experts=8, expert_ffn_size=ACTIVE_FFN // 2)
    dense = dict(moe_interval=0, dense_ffn_size=ACTIVE_FFN)
    return Sweep("seed", [Run("8 experts and a shared one", 0, experiment(**experts)), Run("dense", 0, experiment(**dense))])


def experiment(**feed_forward) -> c.Experiment:
    return c.Experiment(
        model=c.ModelConfig(
            vocab_size=1024,
            hidden_size=64,
            num_layers=4,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            attention_chunk_size=128,
            initializer_range=0.05,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_ids=(1,),
            pad_token_id=2,
            **feed_forward,
        ),
        data=c.DataConfig(sources=("python:stdlib",), heldout_fraction=0.02, sequence_length=256, batch_size=8),
        optimizer=c.OptimizerConfig(learning_rate=5e-3, warmup_steps=50, final_fraction=0.0),
        evaluations={"heldout": c.EvaluationConfig("bits_per_byte", every=200, max_batches=40)},
        checkpoint=c.CheckpointConfig(every=200, keep=1),
        steps=400,
        log_every=25,
    )

"""Pre-training of a model of Behemoth's claimed size, for `python -m llama4_jax.plan`."""

import llama4_jax as l4


def get_config() -> l4.Experiment:
    return l4.Experiment(
        model=l4.named_config("behemoth-288b-16e"),
        data=l4.DataConfig(prepared="prepared/text", tokenizer="llama4", sequence_length=8192, batch_size=2048),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", remat="layer", loss_block_size=2048),
        mesh=l4.MeshConfig(fsdp=64, expert=16),
        optimizer=l4.OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
        steps=500_000,
    )

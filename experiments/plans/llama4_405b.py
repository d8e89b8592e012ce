"""Pre-training of 405 billion parameters, 40 of them active: 128 experts, top-8. For `python -m llama4_jax.plan`."""

import llama4_jax as l4


def get_config() -> l4.Experiment:
    return l4.Experiment(
        model=l4.named_config("llama4-405b-a40b"),
        data=l4.DataConfig(prepared="prepared/text", tokenizer="llama4", sequence_length=8192, batch_size=256),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", remat="layer"),
        mesh=l4.MeshConfig(data=1, expert=128),
        optimizer=l4.OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        steps=500_000,
    )

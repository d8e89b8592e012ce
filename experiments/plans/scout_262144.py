"""Training of Scout on rows of 262,144 tokens, each over four chips, for `python -m llama4_jax.plan`."""

import dataclasses

import llama4_jax as l4


def get_config() -> l4.Experiment:
    return l4.Experiment(
        model=dataclasses.replace(l4.named_config("scout-17b-16e"), vision=None),
        data=l4.DataConfig(prepared="prepared/text", tokenizer="llama4", sequence_length=262_144, batch_size=64),
        execution=l4.ExecutionConfig(
            compute_dtype="bfloat16",
            remat="layer",
            expert_exchange="gather_weights",
            context_exchange="ring",
            context_layout="zigzag",
            loss_block_size=2048,
        ),
        mesh=l4.MeshConfig(fsdp=16, context=4, expert=4),
        optimizer=l4.OptimizerConfig(learning_rate=1e-4, warmup_steps=100),
        steps=1000,
    )

"""Scout with a context of 10,485,760 tokens, one row over all chips, for `python -m llama4_jax.plan --program=prefill` and
`--program=decode`."""

import dataclasses

import llama4_jax as l4


def get_config() -> l4.Experiment:
    return l4.Experiment(
        model=dataclasses.replace(l4.named_config("scout-17b-16e"), vision=None),
        data=l4.DataConfig(tokenizer="llama4", sources=("text",), sequence_length=10_485_760, batch_size=1),
        execution=l4.ExecutionConfig(compute_dtype="bfloat16", context_exchange="ring", context_layout="zigzag"),
        mesh=l4.MeshConfig(data=1, context=-1, tensor=8),
    )

"""Llama 4 in JAX and Flax. `import llama4_jax as l4` is all that a notebook needs; names load when first used."""

import importlib

_HOMES = {
    "llama4_jax.config": (
        "AttentionTemperature",
        "CheckpointConfig",
        "DataConfig",
        "EvaluationConfig",
        "ExecutionConfig",
        "Experiment",
        "MeshConfig",
        "ModelConfig",
        "ObjectiveConfig",
        "OptimizerConfig",
        "ProfileConfig",
        "RopeScaling",
        "Transfer",
        "VisionConfig",
    ),
    "llama4_jax.errors": ("UserError",),
    "llama4_jax.named_configs": ("count_parameters", "list_named_configs", "named_config"),
    "llama4_jax.model.cache": ("Cache",),
    "llama4_jax.model.llama4": ("Llama4", "Output", "abstract_params", "init_model_state", "init_params"),
    "llama4_jax.checkpoints.conversion": ("Converted", "convert"),
    "llama4_jax.checkpoints.load": ("load_config", "load_pretrained"),
    "llama4_jax.checkpoints.save": ("save_pretrained",),
    "llama4_jax.data.batch": ("Batch",),
    "llama4_jax.data.pipeline": ("heldout_batches", "prepare_corpus", "train_batches"),
    "llama4_jax.data.shard_writer": ("prepare_shards",),
    "llama4_jax.inference.generator": ("Completion", "Generator", "Limits", "load_generator"),
    "llama4_jax.inference.sampling": ("Sampling",),
    "llama4_jax.parallel.table": ("sharding_table",),
    "llama4_jax.processing.processor": ("Processor", "Prompt"),
    "llama4_jax.processing.tokenizer": ("Tokenizer",),
    "llama4_jax.training.loop": ("TrainResult", "train"),
    "llama4_jax.training.report": ("expert_load_figure", "loss_figure"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__():
    return [*globals(), *__all__]

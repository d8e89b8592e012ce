"""Whether a mesh, a model and its batches fit together, said before anything is built."""

import math

from jax.sharding import AbstractMesh, Mesh

from llama4_jax.config import DataConfig, ExecutionConfig, ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.parallel.rules import BATCH_AXES


def check_fit(mesh: Mesh | AbstractMesh, model: ModelConfig, execution: ExecutionConfig, data: DataConfig) -> None:
    """Raises UserError, in one line with the numbers, at the first size that the mesh does not divide."""
    _require_multiple("DataConfig.batch_size", data.batch_size, mesh, *BATCH_AXES)
    if data.batch_size % execution.microbatches:
        raise UserError(f"DataConfig.batch_size={data.batch_size} is not a multiple of {execution.microbatches=}")
    part = data.batch_size // execution.microbatches
    _require_multiple(f"a microbatch of {execution.microbatches} in DataConfig.batch_size", part, mesh, *BATCH_AXES)
    _check_sequence(mesh, model, execution, data.sequence_length)
    _require_multiple("ModelConfig.num_heads", model.num_heads, mesh, "tensor")
    _require_multiple("ModelConfig.num_kv_heads", model.num_kv_heads, mesh, "tensor")
    _require_multiple("ModelConfig.vocab_size", model.vocab_size, mesh, "tensor")
    _require_multiple("ModelConfig.hidden_size", model.hidden_size, mesh, "fsdp")
    if any(kind.is_moe for kind in model.layer_kinds):
        _require_multiple("ModelConfig.num_experts", model.num_experts, mesh, "expert")
        _require_multiple("ModelConfig.expert_ffn_size", model.expert_ffn_size, mesh, "tensor")
        if mesh.shape["expert"] > 1:  # tokens travel in slices of their width
            _require_multiple("ModelConfig.hidden_size", model.hidden_size, mesh, "tensor")
    if not all(kind.is_moe for kind in model.layer_kinds):
        _require_multiple("ModelConfig.dense_ffn_size", model.dense_ffn_size, mesh, "tensor")


def _require_multiple(name: str, value: int, mesh: Mesh | AbstractMesh, *axes: str) -> None:
    if value % math.prod(mesh.shape[axis] for axis in axes):
        sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
        raise UserError(f"{name}={value} is not a multiple of the mesh's {sizes}")


def _check_sequence(mesh, model: ModelConfig, execution: ExecutionConfig, length: int) -> None:
    """Every shard of a row holds whole chunks, so that layers with RoPE send nothing; a row within one chunk has none."""
    shards, chunk = mesh.shape["context"], model.attention_chunk_size
    if shards == 1:
        return
    _require_multiple("DataConfig.sequence_length", length, mesh, "context")
    pieces = 2 * shards if execution.context_layout == "zigzag" else shards
    if length % pieces:
        raise UserError(
            f"DataConfig.sequence_length={length} is not a multiple of {pieces}, the zigzag pieces of context={shards}"
        )
    if chunk is not None and length > chunk and length // pieces % chunk:
        raise UserError(
            f"context={shards} cuts DataConfig.sequence_length={length} into pieces of {length // pieces}, across chunks of "
            f"ModelConfig.attention_chunk_size={chunk}: make it a multiple of {pieces * chunk}, or context smaller"
        )

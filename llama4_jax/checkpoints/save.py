"""Parameters to a folder for transformers."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from llama4_jax.checkpoints.huggingface_writer import HuggingFaceWriter, nbytes
from llama4_jax.checkpoints.load import PROGRESS_BYTES
from llama4_jax.checkpoints.readers import ParametersReader
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError


def save_pretrained(
    folder: str | os.PathLike,
    config: ModelConfig,
    params: dict,
    model_state: dict | None = None,
    *,
    drop_router_bias: bool = False,
) -> None:
    """Writes config.json, generation_config.json and the weights, as transformers loads them.

    A text model is written for Llama4ForCausalLM, one with a vision tower for Llama4ForConditionalGeneration. The folder
    appears whole or not at all: everything is written beside it and renamed. Published Llama 4 has no place for a router's
    bias: a model with one is written if the bias is zero, as after training with ObjectiveConfig.bias_anneal_fraction, and
    otherwise refused.

    Args:
        folder: must not exist, or be empty.
        config: of the model.
        params: its parameters, in their own dtype.
        model_state: of TrainState; a model with a router bias needs it.
        drop_router_bias: write the model without its bias, whatever that is: it will choose other experts.

    Raises:
        UserError: transformers' Llama 4 cannot hold this model, the parameters are not the configuration's, the folder is
            in use, or the disk refuses. One line names the reason.
    """
    if config.router_bias:
        if not drop_router_bias:
            _require_zero_bias(model_state)
        config = dataclasses.replace(config, router_bias=False)
    reader = ParametersReader(config, params)
    total = sum(map(nbytes, reader.tensors.values()))
    with (
        HuggingFaceWriter(Path(folder).expanduser(), config, reader.tensors) as writer,
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=total < PROGRESS_BYTES) as bar,
    ):
        for name, info in reader.tensors.items():
            writer.write(name, reader.read(name))
            bar.update(nbytes(info))
        writer.finish(reader.beside)


def _require_zero_bias(model_state: dict | None) -> None:
    if not model_state or "router_bias" not in model_state:
        raise UserError("ModelConfig.router_bias is true: give model_state, of TrainState, to show that the bias is zero")
    for path, bias in jax.tree_util.tree_leaves_with_path(model_state["router_bias"]):
        if (largest := float(jnp.max(jnp.abs(bias)))) != 0:
            raise UserError(
                f"router_bias/{jax.tree_util.keystr(path, simple=True, separator='/')} reaches {largest:.3g}, and published "
                f"Llama 4 has no router bias: train with objective.bias_anneal_fraction, or pass drop_router_bias=True"
            )

"""What every checkpoint format is read into and written from: tensors by Hugging Face's Llama 4 names, in its layouts.

A reader shows a checkpoint of any format in this form, a writer takes this form; so each format is written down once, and any can
become any other, tensor by tensor. Names are those of Llama4ForCausalLM (`model.layers.0.self_attn.q_proj.weight`,
`...feed_forward.experts.gate_up_proj`) without the prefix `language_model.`, and beside them `vision_model.*` and
`multi_modal_projector.*`. A dense Llama is in the same form: its FFN is `feed_forward`, its rotary pairs are interleaved.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from llama4_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Attributes:
    shape: in this form.
    dtype: of what is read: float32, float16 or bfloat16; quantised formats are read as float32.
    place: file and name there, for messages.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    place: str


class CheckpointReader(Protocol):
    """An open checkpoint; closed by leaving its `with`.

    Opening one reads headers alone. It raises UserError, with file and tensor, for what is damaged, hostile or unknown.

    Attributes:
        config: what the checkpoint says of the model.
        tensors: everything that it holds, in the order of the forward pass.
        beside: the files of a Hugging Face folder that are not weights, by name (tokenizer.json, tokenizer_config.json,
            chat_template.jinja, generation_config.json), as far as the checkpoint has them or something equal to them.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    beside: Mapping[str, bytes]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or the part of it that `index` selects of its leading axes, without reading more than it must."""

    def __enter__(self) -> "CheckpointReader": ...

    def __exit__(self, *exception) -> None: ...


class CheckpointWriter(Protocol):
    """A checkpoint that is being written; it takes its tensors one by one and appears whole, or not at all.

    A writer that can go on after an interruption also has `done`, the names that need not be written again.
    """

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Raises UserError when the disk refuses, or the format has no place for the tensor."""

    def finish(self, beside: Mapping[str, bytes]) -> None:
        """Called once, after the last tensor."""

"""Meta's consolidated files, in the common form: one file for each rank of the tensor parallelism that they were saved under.

A rank holds a part of most tensors: rows of what fans out (queries, gate and up, the vocabulary), columns of what fans in, each
expert's part of its hidden width, and all of norms and routers. Names and axes are those of llama-models 0.3 (checkpoint.py, and
the load hooks of its modules), the older fused forms included.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from llama4_jax.checkpoints.file_tensor import FileTensor, Index, Joined, Source
from llama4_jax.checkpoints.files import FilesBeside, read_json
from llama4_jax.checkpoints.layout import layout, require_same_tensors
from llama4_jax.checkpoints.meta_config import config_from_meta
from llama4_jax.checkpoints.readers import SourceReader
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.checkpoints.torch_file import open_torch
from llama4_jax.config import ModelConfig
from llama4_jax.errors import UserError
from llama4_jax.named_configs import list_named_configs, named_config

PARAMS = "params.json"

# Meta's name -> the common form's, and the axis along which the ranks' parts lie (None: every rank has all of it).
_TEXT = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", 0),
    "norm.weight": ("model.norm.weight", None),
    "output.weight": ("lm_head.weight", 0),
    "vision_projection.weight": ("multi_modal_projector.linear_1.weight", 0),
}
_LAYER = {
    "attention_norm.weight": ("input_layernorm.weight", None),
    "attention.wqkv.layer_norm_weight": ("input_layernorm.weight", None),
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.norm.weight": ("post_attention_layernorm.weight", None),
    "feed_forward.mlp.layer_norm_weight": ("post_attention_layernorm.weight", None),
    "feed_forward.w1.weight": ("feed_forward.gate_proj.weight", 0),
    "feed_forward.w3.weight": ("feed_forward.up_proj.weight", 0),
    "feed_forward.w2.weight": ("feed_forward.down_proj.weight", 1),
    "feed_forward.mlp.fc2_weight": ("feed_forward.down_proj.weight", 1),
    "feed_forward.router_DE": ("feed_forward.router.weight", None),
    "feed_forward.experts.moe_w_in_eD_F": ("feed_forward.experts.gate_proj", 2),
    "feed_forward.experts.moe_w_swiglu_eD_F": ("feed_forward.experts.up_proj", 2),
    "feed_forward.experts.moe_w_out_eF_D": ("feed_forward.experts.down_proj", 1),
    "feed_forward.experts.w1": ("feed_forward.experts.gate_proj", 2),
    "feed_forward.experts.w3": ("feed_forward.experts.up_proj", 2),
    "feed_forward.experts.w2": ("feed_forward.experts.down_proj", 1),
    "feed_forward.w_in_shared_FD.weight": ("feed_forward.shared_expert.gate_proj.weight", 0),
    "feed_forward.w_swiglu_FD.weight": ("feed_forward.shared_expert.up_proj.weight", 0),
    "feed_forward.w_out_shared_DF.weight": ("feed_forward.shared_expert.down_proj.weight", 1),
    "feed_forward.shared_expert.w1.weight": ("feed_forward.shared_expert.gate_proj.weight", 0),
    "feed_forward.shared_expert.w3.weight": ("feed_forward.shared_expert.up_proj.weight", 0),
    "feed_forward.shared_expert.w2.weight": ("feed_forward.shared_expert.down_proj.weight", 1),
}
_VISION = {
    "vision_encoder.conv1._linear.weight": ("patch_embedding.linear.weight", 0),
    "vision_encoder.class_embedding": ("class_embedding", None),
    "vision_encoder.positional_embedding_vlm": ("positional_embedding_vlm", None),
    "vision_encoder.ln_pre.weight": ("layernorm_pre.weight", None),
    "vision_encoder.ln_pre.bias": ("layernorm_pre.bias", None),
    "vision_encoder.ln_post.weight": ("layernorm_post.weight", None),
    "vision_encoder.ln_post.bias": ("layernorm_post.bias", None),
    "vision_adapter.mlp.c_fc.weight": ("vision_adapter.mlp.fc1.weight", 0),
    "vision_adapter.mlp.c_proj.weight": ("vision_adapter.mlp.fc2.weight", 1),
}
_VISION_LAYER = {
    **{f"attn.w{x}.{part}": (f"self_attn.{x}_proj.{part}", 0) for x in "qkv" for part in ("weight", "bias")},
    "attn.wo.weight": ("self_attn.o_proj.weight", 1),
    "attn.wo.bias": ("self_attn.o_proj.bias", None),
    "mlp.c_fc.weight": ("mlp.fc1.weight", 0),
    "mlp.c_fc.bias": ("mlp.fc1.bias", 0),
    "mlp.c_proj.weight": ("mlp.fc2.weight", 1),
    "mlp.c_proj.bias": ("mlp.fc2.bias", None),
    **{f"ln_1.{part}": (f"input_layernorm.{part}", None) for part in ("weight", "bias")},
    **{f"ln_2.{part}": (f"post_attention_layernorm.{part}", None) for part in ("weight", "bias")},
}
_IGNORED = re.compile(  # computed, or statistics of training
    r"rope\.freqs|freqs?_cis|.*\._extra_state|.*\.(global|running)_gate_stats_3E|.*\.expert_activation_DE"
)
_RAW_POSITIONS = "vision_embeddings.vision_encoder.positional_embedding"
_RANK = re.compile(r"consolidated(?:\.(\d\d))?\.pth")


class MetaReader(SourceReader):
    """A CheckpointReader of a folder with consolidated.00.pth and its siblings."""

    def __init__(self, folder: Path, config_name: str | None = None):
        """Raises UserError as CheckpointReader says.

        Args:
            folder: holds the file of every rank, and params.json.
            config_name: a named configuration, instead of params.json.
        """
        paths = _rank_files(folder)
        with contextlib.ExitStack() as stack:
            ranks = []
            for path in paths:
                try:
                    file = stack.enter_context(path.open("rb"))
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror}") from None
                ranks.append(open_torch(file, path))
            config, sources = _describe(folder, ranks, config_name)
            super().__init__(config, sources, FilesBeside(folder), stack.pop_all())


def is_consolidated(folder: Path) -> bool:
    return any(_RANK.fullmatch(path.name) for path in folder.glob("consolidated*.pth"))


def _rank_files(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.glob("consolidated*.pth") if _RANK.fullmatch(path.name))
    numbers = [int(_RANK.fullmatch(path.name)[1] or 0) for path in paths]
    if numbers != list(range(len(paths))):
        missing = next(number for number in range(len(paths)) if number not in numbers)
        raise UserError(f"{folder}: consolidated.{missing:02d}.pth is missing: there are {', '.join(p.name for p in paths)}")
    return paths


def _describe(
    folder: Path, ranks: list[Mapping[str, FileTensor]], config_name: str | None
) -> tuple[ModelConfig, dict[str, Source]]:
    """The configuration and the whole tensors."""
    params = read_json(folder / PARAMS) if config_name is None and (folder / PARAMS).exists() else {}
    if params:
        sizes = params.get("model", params)
        sources = _whole_tensors(ranks, _Heads.of_params(sizes, folder / PARAMS))
        shapes = {name: source.shape for name, source in sources.items()}
        config = config_from_meta(params, shapes, str(folder / PARAMS))
        return config, _in_order(sources, config)
    names = [config_name] if config_name else [named.name for named in list_named_configs() if named.published]
    for name in names:
        config = named_config(name)
        if not any(key.startswith("vision_") for key in ranks[0]):
            config = dataclasses.replace(config, vision=None)
        try:
            sources = _in_order(_whole_tensors(ranks, _Heads.of_config(config)), config)
            infos = {key: TensorInfo(source.shape, source.dtype, source.place) for key, source in sources.items()}
            require_same_tensors(infos, config, str(folder))
            return config, sources
        except UserError:
            if config_name:
                raise
    raise UserError(
        f"{folder}: has no {PARAMS}, or an empty one, and its tensors are not those of {' or '.join(names)}; "
        f"name its configuration with --config_name"
    )


def _in_order(sources: dict[str, Source], config: ModelConfig) -> dict[str, Source]:
    order = {placed.name: i for i, placed in enumerate(layout(config))}
    return dict(sorted(sources.items(), key=lambda item: order.get(item[0], len(order))))


@dataclasses.dataclass(frozen=True)
class _Heads:
    """What it takes to undo fusing and flattening."""

    queries: int
    keys: int
    experts: int

    @classmethod
    def of_config(cls, config: ModelConfig) -> "_Heads":
        return cls(config.num_heads, config.num_kv_heads, config.num_experts)

    @classmethod
    def of_params(cls, params: Mapping, source: Path) -> "_Heads":
        try:
            queries = params["n_heads"]
            counts = queries, params.get("n_kv_heads") or queries, (params.get("moe_args") or {}).get("num_experts", 1)
        except (KeyError, TypeError, AttributeError):
            counts = (None,)
        if not all(type(count) is int and count > 0 for count in counts):
            raise UserError(f"{source}: n_heads, n_kv_heads and moe_args.num_experts must be positive integers")
        return cls(*counts)


def _whole_tensors(ranks: list[Mapping[str, FileTensor]], heads: _Heads) -> dict[str, Source]:
    """The tensors of the common form, each joined of all ranks' parts."""
    parts: dict[str, list[Source]] = {}
    axes: dict[str, int | None] = {}
    for rank, stored in enumerate(ranks):
        for key, tensor in stored.items():
            if _IGNORED.fullmatch(key):
                continue
            for name, axis, part in _common_parts(key, tensor, heads):
                if len(found := parts.setdefault(name, [])) > rank:
                    raise UserError(f"{part.place} is also {found[-1].place}")
                if len(found) < rank:
                    raise UserError(f"{part.place} is missing in the file of rank {len(found)}")
                found.append(part)
                axes[name] = axis
        for found in parts.values():
            if len(found) <= rank:
                raise UserError(f"{found[0].place} is missing in the file of rank {rank}")
    whole = {name: found[0] if axes[name] is None else _joined(found, axes[name]) for name, found in parts.items()}
    for name in [name for name in whole if name.endswith("experts.gate_proj")]:
        layer, up = name.removesuffix("gate_proj"), name.replace("gate_proj", "up_proj")
        if up not in whole:
            raise UserError(f"{whole[name].place}: its other half, {up}, is missing")
        whole[f"{layer}gate_up_proj"] = Joined((whole.pop(name), whole.pop(up)), axis=2)
    for name in [name for name in whole if name.endswith("raw_positional_embedding")]:
        whole["vision_model.positional_embedding_vlm"] = _Resampled(whole.pop(name))
    return whole


def _joined(parts: list[Source], axis: int) -> Source:
    if any(len(part.shape) <= axis for part in parts):
        raise UserError(f"{parts[0].place} has shape {parts[0].shape}, too few axes")
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), axis)


def _common_parts(key: str, tensor: FileTensor, heads: _Heads) -> Iterator[tuple[str, int | None, Source]]:
    """Name in the common form, axis of the ranks, and this rank's part, of what one of Meta's tensors holds."""
    if key == _RAW_POSITIONS:
        yield "vision_model.raw_positional_embedding", None, tensor
    elif key in _TEXT:
        yield *_TEXT[key], tensor
    elif match := re.fullmatch(r"layers\.(\d{1,6})\.(.+)", key):
        for name, axis, part in _layer_parts(match[2], tensor, heads):
            yield f"model.layers.{int(match[1])}.{name}", axis, part
    elif match := re.fullmatch(r"vision_embeddings\.vision_encoder\.transformer\.resblocks\.(\d{1,6})\.(.+)", key):
        name, axis = _VISION_LAYER.get(match[2]) or _refuse(tensor)
        yield f"vision_model.model.layers.{int(match[1])}.{name}", axis, tensor
    else:
        name, axis = _VISION.get(key.removeprefix("vision_embeddings.")) or _refuse(tensor)
        yield f"vision_model.{name}", axis, tensor


def _refuse(tensor: FileTensor) -> NoReturn:
    raise UserError(f"{tensor.place} has no place in a Llama 4")


def _layer_parts(key: str, tensor: FileTensor, heads: _Heads) -> Iterator[tuple[str, int | None, Source]]:
    if key == "attention.wqkv.weight":
        counts = {"q": heads.queries, "k": heads.keys, "v": heads.keys}
        for which, rows in zip(counts, _row_groups(tensor, tuple(counts.values())), strict=True):
            yield f"self_attn.{which}_proj.weight", 0, rows
        return
    if key == "feed_forward.mlp.fc1_weight":
        for which, rows in zip(("gate", "up"), _row_groups(tensor, (1, 1)), strict=True):
            yield f"feed_forward.{which}_proj.weight", 0, rows
        return
    name, axis = _LAYER.get(key) or _refuse(tensor)
    if key == "feed_forward.router_DE":
        tensor = tensor.transposed()
    elif ".experts." in key and len(tensor.shape) == 2:
        tensor = tensor.split_rows(heads.experts)  # [E * in, out]
    yield name, axis, tensor


def _row_groups(tensor: FileTensor, shares: tuple[int, ...]) -> list[FileTensor]:
    """Groups of rows, one after another, in these proportions."""
    rows, total = tensor.shape[0] if tensor.shape else 0, sum(shares)
    if any(rows * share % total for share in shares):
        raise UserError(f"{tensor.place} has {rows} rows, which cannot be split as {' to '.join(map(str, shares))}")
    ends = [rows * sum(shares[: i + 1]) // total for i in range(len(shares))]
    return [tensor.part((slice(start, stop),)) for start, stop in zip([0, *ends], ends, strict=False)]


@dataclasses.dataclass(frozen=True)
class _Resampled:
    """Meta's raw table of positions as the tower adds it, which its loader computes.

    The class token's row goes from the first place to the last. The grid is sampled bilinearly half a cell up and to the left,
    with zeros outside: each place becomes the mean of itself and its upper, left and upper left neighbours.
    """

    raw: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    @property
    def dtype(self) -> np.dtype:
        return self.raw.dtype

    @property
    def place(self) -> str:
        return self.raw.place

    def read(self, index: Index = ()) -> np.ndarray:
        raw = self.raw.read().astype(np.float32)
        side = round((len(raw) - 1) ** 0.5)
        if side**2 != len(raw) - 1:
            raise UserError(f"{self.place} has {len(raw)} rows, which are not a square and one")
        grid = np.pad(raw[1:].reshape(side, side, -1), ((1, 0), (1, 0), (0, 0)))
        sampled = (grid[:-1, :-1] + grid[:-1, 1:] + grid[1:, :-1] + grid[1:, 1:]) / 4
        table = np.concatenate([sampled.reshape(side * side, -1), raw[:1]])
        return table.astype(self.dtype)[index]

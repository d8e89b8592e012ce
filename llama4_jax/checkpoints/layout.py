"""How the tensors of the common form lie in the parameters: the one table of both.

Linear layers are stored [out, in] there and [in, ..., out, ...] here, gate and up apart there and stacked here, layers one by
one there and stacked over the blocks of the scan here. Experts are [E, in, out] on both sides; their gate and up are side by
side in the columns there, and matrices of their own here: [E, 2, in, out]. Rotary pairs are interleaved on both.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from llama4_jax.checkpoints.file_tensor import Index, bounds
from llama4_jax.checkpoints.tensors import TensorInfo
from llama4_jax.config import ModelConfig, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.vision import merged_side

VISION = ("vision_model.", "multi_modal_projector.")

_WHOLE = slice(None)
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Placed:
    """A tensor, and the part of a stacked parameter that it is.

    Attributes:
        name: in the common form.
        split: the tensor's axes, each as the axes of the parameter that it holds row-major.
        path: of the parameter.
        index: the tensor's part of the parameter: a number where it is one of several, else a slice.
        order: the split axes in the parameter's order.
    """

    name: str
    split: tuple[tuple[int, ...], ...]
    path: Path
    index: tuple[int | slice, ...]
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(sizes) for sizes in self.split)

    def read_into(self, out: np.ndarray, at: Index, read: Callable[[Index], np.ndarray]) -> None:
        """Fills what of this tensor lies in a part of the parameter, reading no more than that.

        Args:
            out: the part.
            at: where it lies in the parameter, with a start and a stop for each axis.
            read: the stored tensor's part at an index.
        """
        index = (*self.index, *(_WHOLE,) * (len(at) - len(self.index)))
        if any(isinstance(i, int) and not part.start <= i < part.stop for i, part in zip(index, at, strict=True)):
            return
        out = out[tuple(i - part.start if isinstance(i, int) else _WHOLE for i, part in zip(index, at, strict=True))]
        at = [part for i, part in zip(index, at, strict=True) if not isinstance(i, int)]
        inverse = np.argsort(self.order)
        out, wanted = out.transpose(inverse), iter([at[axis] for axis in inverse])
        stretches = [list(_stretches(sizes, [next(wanted) for _ in sizes])) for sizes in self.split]
        for choice in itertools.product(*stretches):
            place = out[tuple(itertools.chain.from_iterable(place for _, place in choice))]
            place[...] = read(tuple(stretch for stretch, _ in choice)).reshape(place.shape)

    def read_from(self, read: Callable[[tuple[int | slice, ...]], np.ndarray], index: Index = ()) -> np.ndarray:
        """The inverse: the part of this tensor that `index` selects, of little more than it needs of the parameter.

        Args:
            read: the parameter's part at an index.
        """
        limits = bounds(index, self.shape)
        covers = [_cover(sizes, *limit) for sizes, limit in zip(self.split, limits, strict=True)]
        slices = [part for parts, _ in covers for part in parts]
        axes = iter(self.order)
        rank = len(self.order) + sum(isinstance(i, int) for i in self.index)
        whole = (*self.index, *(_WHOLE,) * (rank - len(self.index)))
        part = read(tuple(i if isinstance(i, int) else slices[next(axes)] for i in whole)).transpose(np.argsort(self.order))
        counts = [math.prod(s.stop - s.start for s in parts) for parts, _ in covers]
        cut = (slice(skip, skip + stop - start) for (_, skip), (start, stop) in zip(covers, limits, strict=True))
        return part.reshape(counts)[tuple(cut)]


def _stretches(sizes: tuple[int, ...], wanted: list[slice]) -> Iterator[tuple[slice, tuple[int | slice, ...]]]:
    """Runs along an axis that holds `sizes` row-major which together are `wanted`, each with its place among the wanted."""
    first, inner = wanted[0], math.prod(sizes[1:])
    if all((part.start, part.stop) == (0, size) for part, size in zip(wanted[1:], sizes[1:], strict=True)):
        yield slice(first.start * inner, first.stop * inner), (_WHOLE,) * len(sizes)
        return
    for i in range(first.start, first.stop):
        for run, place in _stretches(sizes[1:], wanted[1:]):
            yield slice(i * inner + run.start, i * inner + run.stop), (i - first.start, *place)


def _cover(sizes: tuple[int, ...], start: int, stop: int) -> tuple[list[slice], int]:
    """The smallest block of an axis that holds `sizes` row-major around start to stop, and how much of it comes before."""
    inner = math.prod(sizes[1:])
    first, last = start // inner, max(-(-stop // inner), start // inner)
    if len(sizes) > 1 and last - first == 1:
        parts, before = _cover(sizes[1:], start - first * inner, stop - first * inner)
        return [slice(first, last), *parts], before
    return [slice(first, last), *(slice(0, size) for size in sizes[1:])], start - first * inner


def layout(config: ModelConfig) -> list[Placed]:
    """Every tensor of a model, in the order of the forward pass."""
    vision = [] if config.vision is None else _vision(config.vision, config.hidden_size)
    return [*vision, *_text(config)]


def require_same_tensors(found: Mapping[str, TensorInfo], config: ModelConfig, source: str) -> None:
    """Raises UserError that names a tensor which is missing, left over, or of another shape than the model's."""
    wanted = {tensor.name: tensor.shape for tensor in layout(config)}
    if missing := [name for name in wanted if name not in found]:
        raise UserError(f"{source}: tensor {missing[0]} is missing{_and_more(missing)}; the configuration asks for it")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise UserError(f"{found[name].place} has shape {tuple(found[name].shape)}, but the configuration makes it {shape}")
    if extra := [name for name in found if name not in wanted]:
        raise UserError(f"{found[extra[0]].place}{_and_more(extra)} has no place in this model")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# ------------------------------------------------------------------------------------------------------------------------
# The table


def _placed(name, split, path, index=(), order=None) -> Placed:
    split = tuple(sizes if isinstance(sizes, tuple) else (sizes,) for sizes in split)
    return Placed(name, split, path, index, order or tuple(range(sum(map(len, split)))))


def _text(config: ModelConfig) -> Iterator[Placed]:
    V, D = config.vocab_size, config.hidden_size
    yield _placed("model.embed_tokens.weight", (V, D), ("embed", "embedding"))
    for layer, kind in enumerate(config.layer_kinds):
        block, j = divmod(layer, len(config.block_kinds))
        name, path = f"model.layers.{layer}.", ("layers", f"layer_{j}")
        yield _placed(f"{name}input_layernorm.weight", (D,), (*path, "attention_norm", "scale"), (block,))
        yield from _attention(config, f"{name}self_attn.", (*path, "attention"), block)
        yield _placed(f"{name}post_attention_layernorm.weight", (D,), (*path, "ffn_norm", "scale"), (block,))
        name, path = f"{name}feed_forward.", (*path, "feed_forward")
        if kind.is_moe:
            yield from _moe(config, name, path, block)
        else:
            yield from _dense_ffn(name, path, block, D, config.dense_ffn_size)
    yield _placed("model.norm.weight", (D,), ("final_norm", "scale"))
    if not config.tie_embeddings:
        yield _placed("lm_head.weight", (V, D), ("lm_head", "kernel"), order=(1, 0))


def _attention(config: ModelConfig, name: str, path: Path, block: int) -> Iterator[Placed]:
    D, N, H = config.hidden_size, config.num_heads, config.head_dim
    for which, heads in (("query", N), ("key", config.num_kv_heads), ("value", config.num_kv_heads)):
        here, there = (*path, which), f"{name}{which[0]}_proj."
        yield _placed(f"{there}weight", ((heads, H), D), (*here, "kernel"), (block,), order=(2, 0, 1))
        if config.attention_bias:
            yield _placed(f"{there}bias", ((heads, H),), (*here, "bias"), (block,))
    here, there = (*path, "output"), f"{name}o_proj."
    yield _placed(f"{there}weight", (D, (N, H)), (*here, "kernel"), (block,), order=(1, 2, 0))
    if config.attention_bias:
        yield _placed(f"{there}bias", (D,), (*here, "bias"), (block,))


def _dense_ffn(name: str, path: Path, block: int, D: int, F: int) -> Iterator[Placed]:
    for half, which in enumerate(("gate", "up")):
        yield _placed(f"{name}{which}_proj.weight", (F, D), (*path, "gate_up", "kernel"), (block, _WHOLE, half), order=(1, 0))
    yield _placed(f"{name}down_proj.weight", (D, F), (*path, "down", "kernel"), (block,), order=(1, 0))


def _moe(config: ModelConfig, name: str, path: Path, block: int) -> Iterator[Placed]:
    E, D, F = config.num_experts, config.hidden_size, config.expert_ffn_size
    gate_up, down = ((*path, "experts", which, "kernel") for which in ("gate_up", "down"))
    yield _placed(f"{name}router.weight", (E, D), (*path, "router", "kernel"), (block,), order=(1, 0))
    yield _placed(f"{name}experts.gate_up_proj", (E, D, (2, F)), gate_up, (block,), order=(0, 2, 1, 3))
    yield _placed(f"{name}experts.down_proj", (E, F, D), down, (block,))
    if config.shared_expert:
        yield from _dense_ffn(f"{name}shared_expert.", (*path, "shared_expert"), block, D, F)


def _vision(vision: VisionConfig, text_size: int) -> Iterator[Placed]:
    """The tower, adapter and projector."""
    D, F, A, p, C = vision.hidden_size, vision.mlp_size, vision.adapter_size, vision.patch_size, vision.num_channels
    heads = vision.num_heads, D // vision.num_heads
    merged = D * merged_side(vision) ** 2
    places = (vision.image_size // p) ** 2 + 1

    def path(*names):
        return ("vision", *names)

    # A stored patch is channel, row, column.
    patch = path("patch_embedding", "kernel")
    yield _placed("vision_model.patch_embedding.linear.weight", (D, (C, p, p)), patch, order=(2, 3, 1, 0))
    yield _placed("vision_model.class_embedding", (D,), path("class_embedding"))
    yield _placed("vision_model.positional_embedding_vlm", (places, D), path("position_embedding"))
    yield from _layer_norm("vision_model.layernorm_pre.", D, path("norm_pre"))
    for layer in range(vision.num_layers):
        name, index = f"vision_model.model.layers.{layer}.", (layer,)
        yield from _layer_norm(f"{name}input_layernorm.", D, path("layers", "attention_norm"), index)
        for which in ("query", "key", "value"):
            there = f"{name}self_attn.{which[0]}_proj."
            yield _placed(f"{there}weight", (heads, D), path("layers", which, "kernel"), index, order=(2, 0, 1))
            yield _placed(f"{there}bias", (heads,), path("layers", which, "bias"), index)
        there = f"{name}self_attn.o_proj."
        yield _placed(f"{there}weight", (D, heads), path("layers", "output", "kernel"), index, order=(1, 2, 0))
        yield _placed(f"{there}bias", (D,), path("layers", "output", "bias"), index)
        yield from _layer_norm(f"{name}post_attention_layernorm.", D, path("layers", "mlp_norm"), index)
        for there, here, shape in (("fc1", "up", (F, D)), ("fc2", "down", (D, F))):
            yield _placed(f"{name}mlp.{there}.weight", shape, path("layers", here, "kernel"), index, order=(1, 0))
            yield _placed(f"{name}mlp.{there}.bias", shape[:1], path("layers", here, "bias"), index)
    yield from _layer_norm("vision_model.layernorm_post.", D, path("norm_post"))
    yield _placed("vision_model.vision_adapter.mlp.fc1.weight", (A, merged), path("adapter_in", "kernel"), order=(1, 0))
    yield _placed("vision_model.vision_adapter.mlp.fc2.weight", (A, A), path("adapter_out", "kernel"), order=(1, 0))
    yield _placed("multi_modal_projector.linear_1.weight", (text_size, A), path("projector", "kernel"), order=(1, 0))


def _layer_norm(name: str, D: int, path: Path, index: tuple[int, ...] = ()) -> Iterator[Placed]:
    for there, here in (("weight", "scale"), ("bias", "bias")):
        yield _placed(f"{name}{there}", (D,), (*path, here), index)

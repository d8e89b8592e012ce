"""Configurations by name, and how many parameters a configuration has.

Two of them were published: Scout and Maverick. Of the rest of the family only sizes were ever told, so their shapes are
chosen here: such that total and active parameters come within 1% of the claim, in multiples of 128, with Llama 4's
interleaved NoPE layers, chunked attention, vocabulary and shared expert. They stand for models of that size, not for
anybody's weights.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

import jax

from llama4_jax.config import AttentionTemperature, ModelConfig, RopeScaling, VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.model.llama4 import Llama4, abstract_params


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """Attributes:
    total: all parameters.
    text: of them the language model's.
    vision: of them the tower's, adapter's and projector's; 0 without vision.
    active: of the language model's those that one token uses: top-k of the routed experts, and everything else whole,
        both embeddings included.
    """

    total: int
    text: int
    vision: int
    active: int


@dataclasses.dataclass(frozen=True)
class NamedConfig:
    """Attributes:
    name: for `named_config`.
    summary: one line on what it is.
    source: where its numbers come from: who published them, or what was claimed by whom and what is chosen.
    published: whether these are the shapes of a released model.
    total, active: parameters claimed, in billions; None where nothing was claimed.
    make: gives the configuration.
    """

    name: str
    summary: str
    source: str
    published: bool
    total: float | None
    active: float | None
    make: Callable[[], ModelConfig] = dataclasses.field(repr=False)

    def count(self) -> ParameterCounts:
        return count_parameters(self.make())


def named_config(name: str) -> ModelConfig:
    """The configuration of that name. Raises UserError with the nearest names if there is none."""
    if name in _BY_NAME:
        return _BY_NAME[name].make()
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4)
    raise UserError(
        f"no configuration is called {name!r}; {'did you mean' if near else 'there are'} {', '.join(near or _BY_NAME)}"
    )


def list_named_configs() -> list[NamedConfig]:
    """All of them, the published ones first."""
    return list(_BY_NAME.values())


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts of a model of any size, from the shapes that its modules would make; nothing is allocated."""
    text = active = vision = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(Llama4(config))):
        size = math.prod(leaf.shape)
        if path[0].key == "vision":
            vision += size
            continue
        text += size
        routed = any(key.key == "experts" for key in path)
        active += size * config.experts_per_token // config.num_experts if routed else size
    return ParameterCounts(text + vision, text, vision, active)


# ------------------------------------------------------------------------------------------------------------------------
# The configurations


def _scout() -> ModelConfig:
    return ModelConfig(rope_scaling=RopeScaling(16.0, 1.0, 1.0, 8192), vision=VisionConfig())


def _maverick() -> ModelConfig:
    return ModelConfig(num_experts=128, moe_interval=2, qk_norm=False, vision=VisionConfig())


def _dense(hidden_size: int, num_layers: int, num_heads: int, ffn_size: int) -> Callable[[], ModelConfig]:
    return lambda: ModelConfig(
        hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, dense_ffn_size=ffn_size, moe_interval=0
    )  # fmt: skip


def _tiny() -> ModelConfig:
    return ModelConfig(
        vocab_size=256,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        num_experts=4,
        expert_ffn_size=96,
        dense_ffn_size=192,
        moe_interval=2,
        attention_chunk_size=32,
        temperature=AttentionTemperature(floor=64, scale=0.1),
        rope_theta=10_000.0,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_ids=(1,),
        pad_token_id=2,
    )


_META = "Meta, April 2025: model card, reference code and the config.json on Hugging Face (pre-trained model)"
_PRESS = "press of 2026"

_ALL = [
    NamedConfig(
        "scout-17b-16e", "Llama 4 Scout: 16 experts in every layer, top-1, QK norm, with vision.",
        _META, True, 109, 17, _scout,
    ),
    NamedConfig(
        "maverick-17b-128e", "Llama 4 Maverick: 128 experts in every second layer, top-1, with vision.",
        _META, True, 402, 17, _maverick,
    ),
    NamedConfig(
        "behemoth-288b-16e", "Of Behemoth's size: 16 experts in every layer, top-1. Text only.",
        "chosen; Meta's announcement of April 2025 claims 288B active, 16 experts and nearly two trillion in total, no shapes",
        False, 2000, 288,
        lambda: ModelConfig(hidden_size=16_384, num_layers=96, num_heads=128, expert_ffn_size=24_064),
    ),
    NamedConfig(
        "llama4-8b", "A dense model of 8B with Llama 4's attention.",
        f"chosen; the {_PRESS} claims the size alone (one article calls the whole family mixture-of-experts)",
        False, 8, 8, _dense(4096, 32, 32, 12_800),
    ),
    NamedConfig(
        "llama4-70b", "A dense model of 70B with Llama 4's attention.",
        f"chosen; the {_PRESS} claims the size alone (one article calls the whole family mixture-of-experts)",
        False, 70, 70, _dense(8192, 80, 64, 27_648),
    ),
    NamedConfig(
        "llama4-405b-a40b", "128 experts in every second layer, top-8.",
        f"chosen; the {_PRESS} claims 405B, 40B active, 128 experts, 8 of them active",
        False, 405, 40,
        lambda: ModelConfig(num_experts=128, experts_per_token=8, moe_interval=2, dense_ffn_size=20_480),
    ),
    NamedConfig(
        "llama4-405b-a17b", "128 experts in every second layer, top-2.",
        f"chosen; the {_PRESS} claims 405B, 17B active, 128 experts, 2 to 4 of them active (4 would leave 1.4B for all else)",
        False, 405, 17,
        lambda: ModelConfig(
            num_layers=52, num_experts=128, experts_per_token=2, moe_interval=2, expert_ffn_size=7680, dense_ffn_size=6144
        ),
    ),
    NamedConfig(
        "llama4-400b-a52b", "128 experts in every second layer, top-8, 128K context.",
        f"chosen; the {_PRESS} claims 400B, 52B active, 128 experts, 8 of them active, 128K context",
        False, 400, 52,
        lambda: ModelConfig(
            hidden_size=8192, num_layers=64, num_heads=64, num_experts=128, experts_per_token=8, moe_interval=2,
            expert_ffn_size=3712, max_position_embeddings=131_072,
        ),
    ),
    NamedConfig(
        "tiny", "For tests: both kinds of attention and of feed-forward in 4 layers, runs in seconds on a CPU.",
        "this project", False, None, None, _tiny,
    ),
]  # fmt: skip
_BY_NAME = {config.name: config for config in _ALL}

"""The vision tower of Llama 4: square tiles in, text-wide embeddings out.

A ViT (arXiv 2010.11929) with learned positions, two-dimensional RoPE and the class token at the end, whose patches a pixel
shuffle (arXiv 1609.05158) merges two by two, an adapter of two layers, and the projection to the text model's width. The
embeddings then take the places of the row's patch tokens (early fusion).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from llama4_jax.config import ExecutionConfig, VisionConfig
from llama4_jax.model.linear import Linear, normal
from llama4_jax.model.remat import rematerialized
from llama4_jax.model.rotary import Rotation, rotate

STDDEV = 0.02  # of the linear layers' initialisation
Pixels = Float[Array, "*B I h w 3"] | UInt8[Array, "*B I h w 3"]  # in [-1, 1], or bytes


class VisionTower(nn.Module):
    """`VisionTower(config, text_size).apply({"params": params}, tiles)`: the embeddings of each tile's patch tokens.

    Attributes:
        config: of the tower, adapter and projector.
        text_size: width of the text model.
        execution: of the whole model.
    """

    config: VisionConfig
    text_size: int
    execution: ExecutionConfig = ExecutionConfig()

    def setup(self):
        c = self.config
        D, p, grid = c.hidden_size, c.patch_size, c.image_size // c.patch_size
        merged = D * merged_side(c) ** 2
        self.patch_embedding = Linear((p, p, c.num_channels, D), (None, None, None, "embed"), STDDEV, in_axes=3)
        self.class_embedding = self.param("class_embedding", normal(D**-0.5, ("embed",)), (D,))
        self.position_embedding = self.param("position_embedding", normal(D**-0.5, (None, "embed")), (grid**2 + 1, D))
        self.norm_pre, self.norm_post = layer_norm(c), layer_norm(c)
        self.layers = nn.scan(
            rematerialized(VisionLayer, self.execution.remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.adapter_in = Linear((merged, c.adapter_size), ("embed", "ffn"), STDDEV)
        self.adapter_out = Linear((c.adapter_size, c.adapter_size), ("ffn", "embed"), STDDEV)
        self.projector = Linear((c.adapter_size, self.text_size), ("ffn", "embed"), STDDEV)

    def __call__(self, tiles: Pixels) -> Float[Array, "*B I P D"]:
        """P embeddings a tile, row by row: 144 of a published 336-pixel tile."""
        *leading, height, width, channels = tiles.shape
        x = self._embed(normalized(tiles).reshape(-1, height, width, channels))
        return x.reshape(*leading, *x.shape[1:])

    def _embed(self, tiles: Float[Array, "I h w 3"]) -> Float[Array, "I P D"]:
        tiles = nn.with_logical_constraint(tiles.astype(self.execution.compute_dtype), ("batch", None, None, None))
        x = self.patch_embedding(patches(tiles, self.config.patch_size))  # [I, rows * columns, D]
        class_token = jnp.broadcast_to(self.class_embedding.astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([x, class_token], axis=1) + self.position_embedding.astype(x.dtype)
        x, _ = self.layers(self.norm_pre(x), patch_rotation(self.config))
        x = pixel_shuffle(self.norm_post(x)[:, :-1], merged_side(self.config))  # [I, P, merged]
        x = nn.gelu(self.adapter_in(x), approximate=False)
        return self.projector(nn.gelu(self.adapter_out(x), approximate=False))


class VisionLayer(nn.Module):
    """x + attention(norm(x)), then that + mlp(norm(that)). Every patch attends to every other of its tile."""

    config: VisionConfig

    def setup(self):
        c = self.config
        D, N, F = c.hidden_size, c.num_heads, c.mlp_size
        self.attention_norm, self.mlp_norm = layer_norm(c), layer_norm(c)
        heads = (D, N, D // N), ("embed", "heads", "head_dim"), STDDEV
        self.query, self.key, self.value = (Linear(*heads, use_bias=True) for _ in range(3))
        self.output = Linear((N, D // N, D), ("heads", "head_dim", "embed"), STDDEV, in_axes=2, use_bias=True)
        self.up = Linear((D, F), ("embed", "ffn"), STDDEV, use_bias=True)
        self.down = Linear((F, D), ("ffn", "embed"), STDDEV, use_bias=True)

    def __call__(self, x: Float[Array, "I T D"], rotation: Rotation) -> tuple[Float[Array, "I T D"], None]:
        normed = self.attention_norm(x)
        q, k = rotate(self.query(normed), rotation), rotate(self.key(normed), rotation)  # [I, T, N, H]
        x = x + self.output(jax.nn.dot_product_attention(q, k, self.value(normed)))
        return x + self.down(nn.gelu(self.up(self.mlp_norm(x)), approximate=False)), None


def normalized(tiles: Pixels) -> Float[Array, "*B I h w 3"]:
    """Pixels in [-1, 1], as the tower was trained on (mean and deviation 0.5); they are that already unless bytes."""
    return (tiles.astype(jnp.float32) / 255 - 0.5) / 0.5 if tiles.dtype == jnp.uint8 else tiles


def patch_places(tokens: Int[Array, "B T"], patch_token_id: int) -> Int[Array, "B T"]:
    """Which of its row's patches each token is, from 0; -1 where it is none."""
    is_patch = tokens == patch_token_id
    return jnp.where(is_patch, jnp.cumsum(is_patch, axis=1, dtype=jnp.int32) - 1, -1)


def fuse(
    embeddings: Float[Array, "B T D"], images: Float[Array, "B I P D"], places: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The embeddings with the row's patches in their places. A place beyond the row's tiles becomes NaN: there is no
    other way to refuse it inside a compiled function (processing.check_patch_places refuses it before)."""
    B, _, _, D = images.shape
    patches = images.reshape(B, -1, D).astype(embeddings.dtype)
    taken = jnp.take_along_axis(patches, jnp.maximum(places, 0)[..., None], axis=1, mode="fill", fill_value=jnp.nan)
    return jnp.where(places[..., None] >= 0, taken, embeddings)


def layer_norm(config: VisionConfig) -> nn.LayerNorm:
    ones, zeros = (nn.with_logical_partitioning(init, ("norm",)) for init in (nn.initializers.ones, nn.initializers.zeros))
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, scale_init=ones, bias_init=zeros)


def merged_side(config: VisionConfig) -> int:
    """How many patches the pixel shuffle merges along each side."""
    return round(1 / config.pixel_shuffle_ratio)


def patches(tiles: Float[Array, "I h w 3"], size: int) -> Float[Array, "I P p p 3"]:
    """Square patches, row by row."""
    count, height, width, channels = tiles.shape
    x = tiles.reshape(count, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return x.reshape(count, -1, size, size, channels)


def patch_rotation(config: VisionConfig) -> Rotation:
    """Half of a head's pairs turn with the column, the others with the row, both counted from 1; the class token rests."""
    grid, head_dim = config.image_size // config.patch_size, config.hidden_size // config.num_heads
    frequencies = config.rope_theta ** -(np.arange(0, head_dim // 2, 2) / (head_dim // 2))  # [H/4]
    row, column = np.divmod(np.arange(grid**2), grid)
    angles = np.concatenate([np.outer(column + 1, frequencies), np.outer(row + 1, frequencies)], axis=1)
    angles = np.concatenate([angles, np.zeros((1, head_dim // 2))])[None, :, None]  # [1, T, 1, H/2]
    return Rotation(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))


def pixel_shuffle(x: Float[Array, "I P D"], side: int) -> Float[Array, "I p d"]:
    """Each square of side x side patches as one, its channels in the order (row, column, channel)."""
    count, total, channels = x.shape
    grid = round(total**0.5)
    x = x.reshape(count, grid // side, side, grid // side, side, channels).swapaxes(2, 3)
    return x.reshape(count, -1, side * side * channels)

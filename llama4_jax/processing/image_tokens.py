"""The tokens that stand for a picture in a text."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from llama4_jax.config import VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.processing.images import TileGrid
from llama4_jax.processing.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """The ids from which a picture's tokens are made."""

    start: int
    end: int
    image: int  # before the global tile; not what config.json calls image_token_index, which is `patch`
    patch: int  # a place that the vision tower fills
    tile_x_separator: int
    tile_y_separator: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, vision: VisionConfig) -> "ImageTokens":
        """Those of a tokenizer, by Llama 4's names. Raises UserError where one is missing, or the model's is another."""
        names = dict(start="image_start", end="image_end", image="image", patch="patch")
        names |= dict(tile_x_separator="tile_x_separator", tile_y_separator="tile_y_separator")
        ids = {field: tokenizer.token_to_id(f"<|{name}|>") for field, name in names.items()}
        missing = [f"<|{names[field]}|>" for field, token in ids.items() if token is None]
        if missing:
            raise UserError(f"tokenizer {tokenizer.name} has no {', '.join(missing)}, which a model that sees needs")
        model = dict(start=vision.image_start_token_id, end=vision.image_end_token_id, patch=vision.patch_token_id)
        for field, token in model.items():
            if ids[field] != token:
                raise UserError(
                    f"<|{names[field]}|> is {ids[field]} in tokenizer {tokenizer.name} but {token} in the model's VisionConfig"
                )
        return cls(**ids)

    def layout(self, grid: TileGrid, tokens_per_tile: int) -> list[int]:
        """Llama 4's layout: the tiles row by row with their separators, then the global tile; a single tile is its own."""
        patches = [self.patch] * tokens_per_tile
        row = [*([*patches, self.tile_x_separator] * grid.columns)[:-1], self.tile_y_separator]
        local = row * grid.rows if grid.num_tiles > 1 else []
        return [self.start, *local, self.image, *patches, self.end]


def tokens_per_tile(vision: VisionConfig) -> int:
    """Patch tokens of a tile: 144 in the published models."""
    return round((vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio) ** 2)


def check_patch_places(
    tokens: Sequence[int] | Int[np.ndarray, "*B T"], tiles: UInt8[np.ndarray, "*B I h w 3"] | None, vision: VisionConfig
) -> None:
    """Raises UserError unless the patch tokens of each row are those of its tiles.

    A prompt has exactly the tiles that it shows. The rows of a batch may leave tile slots unused: there a row must show whole
    tiles, and no more than it has slots.
    """
    tokens, per_tile = np.asarray(tokens), tokens_per_tile(vision)
    rows = tokens.reshape(-1, tokens.shape[-1])
    slots = 0 if tiles is None else tiles.shape[tokens.ndim - 1]
    for i, places in enumerate((rows == vision.patch_token_id).sum(axis=1)):
        shown = places / per_tile
        if shown != slots if tokens.ndim == 1 else shown > slots or shown % 1:
            where = f"row {i} has" if tokens.ndim > 1 else "there are"
            raise UserError(
                f"{where} {places} places for patches of images, and {slots} tiles of {per_tile} patches: "
                "the tokens and the images do not belong together"
            )

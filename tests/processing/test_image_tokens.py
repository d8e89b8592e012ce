import itertools

import numpy as np
import pytest

from llama4_jax.config import VisionConfig
from llama4_jax.errors import UserError
from llama4_jax.processing.image_tokens import ImageTokens, check_patch_places, tokens_per_tile
from llama4_jax.processing.images import TileGrid
from llama4_jax.processing.ranks import named_special_tokens
from llama4_jax.processing.tokenizer import Tokenizer

IDS = ImageTokens(start=200080, end=200081, image=200090, patch=200092, tile_x_separator=200084, tile_y_separator=200085)
VISION = VisionConfig()


def runs(tokens):
    return [(token, len(list(group))) for token, group in itertools.groupby(tokens)]


@pytest.mark.parametrize(
    ("grid", "length", "expected"),
    [
        ((1, 1), 147, "s g e"),
        ((1, 2), 437, "s p x p y g e"),
        ((2, 1), 437, "s p y p y g e"),
        ((2, 3), 1017, "s p x p x p y p x p x p y g e"),
        ((4, 4), 2467, "s " + "p x p x p x p y " * 4 + "g e"),
    ],
)
def test_layouts_of_the_published_model(grid, length, expected):
    names = {"s": [(200080, 1)], "e": [(200081, 1)], "x": [(200084, 1)], "y": [(200085, 1)], "p": [(200092, 144)]}
    names["g"] = [(200090, 1), (200092, 144)]
    tokens = IDS.layout(TileGrid(*grid), tokens_per_tile(VISION))
    assert len(tokens) == length
    assert runs(tokens) == [run for name in expected.split() for run in names[name]]
    assert tokens.count(IDS.patch) == 144 * TileGrid(*grid).num_tiles


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 144), ({"image_size": 56}, 4), ({"image_size": 8, "patch_size": 2}, 4), ({"pixel_shuffle_ratio": 1.0}, 576)],
)
def test_tokens_of_a_tile_follow_the_vision_config(fields, expected):
    assert tokens_per_tile(VisionConfig(**fields)) == expected


def test_ids_come_from_the_tokenizer_by_name_and_must_be_the_models():
    named = named_special_tokens()
    tokenizer = Tokenizer.train_bpe(["text"], 300, named)
    own = {"patch": "patch_token_id", "image_start": "image_start_token_id", "image_end": "image_end_token_id"}
    vision = VisionConfig(**{field: named.index(f"<|{name}|>") for name, field in own.items()})
    ids = ImageTokens.of(tokenizer, vision)
    assert named[ids.tile_x_separator] == "<|tile_x_separator|>" and named[ids.image] == "<|image|>"
    with pytest.raises(UserError, match=r"<\|image_start\|> is 13 in tokenizer bpe but 200080 in the model"):
        ImageTokens.of(tokenizer, VISION)
    with pytest.raises(UserError, match=r"has no <\|image_start\|>, .*<\|tile_y_separator\|>"):
        ImageTokens.of(Tokenizer.train_bpe(["text"], 300), VISION)


@pytest.mark.parametrize("tiles", [0, 2, 4])
def test_more_or_fewer_patch_places_than_tiles_are_refused(tiles):
    tokens = IDS.layout(TileGrid(1, 2), 144)
    check_patch_places(tokens, np.zeros((3, 8, 8, 3), np.uint8), VISION)
    with pytest.raises(UserError, match=rf"there are 432 places for patches of images, and {tiles} tiles of 144"):
        check_patch_places(tokens, np.zeros((tiles, 8, 8, 3), np.uint8) if tiles else None, VISION)
    with pytest.raises(UserError, match="there are 431 places"):
        check_patch_places([*tokens[:5], 7, *tokens[6:]], np.zeros((3, 8, 8, 3), np.uint8), VISION)


def test_rows_of_a_batch_may_leave_slots_unused_but_not_show_more_or_parts_of_a_tile():
    one, three = IDS.layout(TileGrid(1, 1), 144), IDS.layout(TileGrid(1, 2), 144)
    tokens = np.array([one + [0] * (len(three) - len(one)), three])
    check_patch_places(tokens, np.zeros((2, 3, 8, 8, 3), np.uint8), VISION)
    with pytest.raises(UserError, match="row 1 has 432 places"):
        check_patch_places(tokens, np.zeros((2, 2, 8, 8, 3), np.uint8), VISION)
    tokens[0, 3] = 0
    with pytest.raises(UserError, match="row 0 has 143 places"):
        check_patch_places(tokens, np.zeros((2, 3, 8, 8, 3), np.uint8), VISION)

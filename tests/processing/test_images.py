import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llama4_jax.errors import UserError
from llama4_jax.processing.images import (
    ImageError,
    ImageLimits,
    TileGrid,
    choose_grid,
    cut_tiles,
    fitted_size,
    image_size,
    normalize,
    read_image,
)

SIZES = st.integers(1, 3000)


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------------------------------------
# Cutting


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((336, 336), (1, 1)),
        ((1, 1), (1, 1)),
        ((337, 336), (1, 2)),
        ((336, 337), (2, 1)),
        ((672, 672), (2, 2)),
        ((673, 672), (2, 3)),  # the nearest canvas that need not shrink it
        ((500, 300), (1, 2)),
        ((1344, 1344), (4, 4)),
        ((4000, 3000), (3, 4)),  # none is large enough: shrunk least
        ((10_000, 100), (1, 16)),
        ((100, 10_000), (16, 1)),
        ((100_000, 1), (1, 16)),
    ],
)
def test_grids_of_known_sizes(size, grid):
    assert choose_grid(*size, 336, 16) == TileGrid(*grid)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, st.sampled_from([8, 56, 336]), st.integers(1, 16))
def test_the_canvas_never_distorts_nor_enlarges_beyond_a_tile(width, height, tile, most):
    grid = choose_grid(width, height, tile, most)
    assert grid.rows * grid.columns <= most
    new_width, new_height = fitted_size(width, height, grid, tile)
    assert 1 <= new_width <= grid.columns * tile and 1 <= new_height <= grid.rows * tile
    room = min(max(width, tile), grid.columns * tile), min(max(height, tile), grid.rows * tile)
    assert new_width == room[0] or new_height == room[1]  # the limiting side is exact
    scale = min(room[0] / width, room[1] / height)
    assert abs(new_width - max(width * scale, 1)) <= 1 and abs(new_height - max(height * scale, 1)) <= 1
    if scale > 1 + 1e-9:
        assert new_width <= tile or new_height <= tile  # only what is smaller than a tile grows
    # no smaller canvas has as good a scale, and one that need not shrink wins over one that must
    scales = {
        (r, c): min(np.float32(c * tile) / np.float32(width), np.float32(r * tile) / np.float32(height))
        for r in range(1, most + 1)
        for c in range(1, most // r + 1)
    }
    own = scales[grid.rows, grid.columns]
    if max(scales.values()) >= 1:
        assert own == min(s for s in scales.values() if s >= 1)
    else:
        assert own == max(scales.values())
    assert all(r * c >= grid.rows * grid.columns for (r, c), s in scales.items() if s == own)


def test_tiles_of_a_picture_that_needs_no_resizing_are_its_pixels_in_reading_order_then_the_whole():
    pixels = noise(16, 8)
    tiled = cut_tiles(read_image(pixels), 8, 4)
    assert tiled.grid == TileGrid(1, 2)
    np.testing.assert_array_equal(tiled.tiles[0], pixels[:, :8])
    np.testing.assert_array_equal(tiled.tiles[1], pixels[:, 8:])
    whole = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(tiled.tiles[2], np.asarray(whole))


def test_padding_is_black_to_the_right_and_below_and_one_tile_has_no_global_tile():
    tiled = cut_tiles(read_image(np.full((4, 8, 3), 255, np.uint8)), 8, 4)
    assert tiled.tiles.shape == (1, 8, 8, 3)
    assert (tiled.tiles[0, :4] == 255).all()
    assert not tiled.tiles[0, 4:].any()


def test_normalized_pixels_span_minus_one_to_one_in_float32():
    pixels = normalize(np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3))
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels.ravel(), np.array([-1, -0.6, 1], np.float32))


# ------------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 100}), ("WEBP", {"lossless": True})])
def test_the_three_formats_are_read_from_files_and_bytes_alike(tmp_path, form, options):
    image = Image.fromarray(np.full((5, 7, 3), (200, 100, 50), np.uint8))
    content = encoded(image, form, **options)
    (tmp_path / "picture").write_bytes(content)
    for source in (content, tmp_path / "picture", str(tmp_path / "picture")):
        read = read_image(source)
        assert read.mode == "RGB" and image_size(source) == read.size == (7, 5)
        assert np.abs(np.asarray(read, int) - np.asarray(image, int)).max() <= 3


def test_a_gif_is_refused_by_name(tmp_path):
    (tmp_path / "a.gif").write_bytes(encoded(Image.new("RGB", (3, 3)), "GIF"))
    with pytest.raises(ImageError, match=r"a\.gif is not a PNG, JPEG, WEBP image"):
        read_image(tmp_path / "a.gif")


def test_what_is_transparent_lies_over_white():
    half = np.zeros((1, 3, 4), np.uint8)
    half[0, :, 3] = [0, 128, 255]
    expected = [[255] * 3, [127] * 3, [0] * 3]
    for image in (Image.fromarray(half), Image.fromarray(half).convert("LA")):
        np.testing.assert_array_equal(np.asarray(read_image(encoded(image, "PNG")))[0], expected)
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    content = encoded(palette, "PNG", transparency=1)
    np.testing.assert_array_equal(np.asarray(read_image(content))[0], [[10, 20, 30], [255, 255, 255]])


def test_sixteen_bits_become_eight_and_do_not_clip():
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    np.testing.assert_array_equal(np.asarray(read_image(encoded(deep, "PNG")))[0, :, 0], [0, 1, 128, 255])


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode)
    read = read_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert read.mode == "RGB" and np.asarray(read).min() > 250


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_stands_as_its_exif_says_and_its_header_tells_that_size(orientation, form):
    upright = np.kron(np.array([[0, 80, 160], [255, 200, 120]], np.uint8), np.ones((8, 8), np.uint8))  # [16, 24]
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright, 1), 7: np.rot90(upright.T, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 100} if form == "JPEG" else {}
    content = encoded(Image.fromarray(np.ascontiguousarray(turned)), form, exif=exif, **options)
    read = read_image(content)
    assert read.size == image_size(content) == (24, 16)
    assert np.abs(np.asarray(read)[..., 0].astype(int) - upright).max() <= 3


def test_of_an_animation_it_is_the_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for form in ("WEBP", "PNG"):
        content = encoded(
            frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        assert np.asarray(read_image(content))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "pixels", [np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)]
)
def test_other_arrays_are_refused(pixels):
    with pytest.raises(ImageError, match="must be uint8"):
        read_image(pixels)


# ------------------------------------------------------------------------------------------------------------------------
# Bad input


def png_header(width, height):
    """A PNG of that size without a pixel in it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(40_000, 40_000), (11_000, 11_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_a_gigapixel_is_refused_before_it_is_decoded(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"bomb\.png has .*100,000,000.*make it smaller"):
            read(tmp_path / "bomb.png")


def test_a_picture_within_our_limit_but_beyond_pillows_own_warning_is_read():
    assert image_size(png_header(9990, 10_000)) == (9990, 10_000)


def test_a_file_of_too_many_bytes_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"long\.png has 1,099,511,627,776 bytes"):
        read_image(tmp_path / "long.png")
    with pytest.raises(ImageError, match="has 90 bytes, and at most 10"):
        read_image(b"x" * 90, ImageLimits(max_bytes=10))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_picture_cut_short_is_named(tmp_path, form):
    content = encoded(Image.fromarray(noise(64, 64)), form)
    (tmp_path / "cut").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match=r"/cut"):
        read_image(tmp_path / "cut")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.data())
def test_damaged_bytes_give_a_picture_or_one_clear_line(form, data):
    content = bytearray(encoded(Image.fromarray(noise(12, 9)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert read_image(bytes(content), ImageLimits(max_pixels=10_000)).mode == "RGB"
    except UserError as error:
        assert "\n" not in str(error)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ImageError, match=r"no image at .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="cannot read the image"):
        read_image(tmp_path)

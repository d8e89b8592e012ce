"""A picture as people have it, cut into the square tiles that the vision tower reads.

Llama 4's rule: the picture is resized without distortion into the canvas of rows x columns tiles that fits it best, padded with
black to the right and below, and cut row by row. After more than one tile comes the whole picture once more, squeezed into one:
the global tile.
"""

import contextlib
import dataclasses
import io
import math
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

from llama4_jax.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # orientations that swap width and height

Picture = str | Path | bytes | Image.Image | UInt8[np.ndarray, "h w *channels"]


@dataclasses.dataclass(frozen=True)
class ImageLimits:
    """What a picture may ask for; both are checked before anything is decoded."""

    max_bytes: int = 64 << 20  # of the file
    max_pixels: int = 100_000_000  # three bytes each once decoded


_LIMITS = ImageLimits()


@dataclasses.dataclass(frozen=True)
class TileGrid:
    """How a picture is cut."""

    rows: int
    columns: int

    @property
    def num_tiles(self) -> int:
        """Tiles of the picture, the global one included."""
        local = self.rows * self.columns
        return local + 1 if local > 1 else 1


@dataclasses.dataclass(frozen=True, eq=False)
class TiledImage:
    """The tiles of a picture in reading order, the global tile last, and the grid that they were cut by."""

    tiles: UInt8[np.ndarray, "I h w 3"]
    grid: TileGrid


# ------------------------------------------------------------------------------------------------------------------------
# Reading


class ImageError(UserError):
    """A picture that cannot be read."""


def image_size(picture: Picture, limits: ImageLimits = _LIMITS) -> tuple[int, int]:
    """Width and height as the picture will be read, from its header alone. Raises ImageError as read_image does."""
    with _opened(picture, limits) as image:
        width, height = image.size
        return (height, width) if _orientation(image) in _LYING else (width, height)


def read_image(picture: Picture, limits: ImageLimits = _LIMITS) -> Image.Image:
    """A picture in RGB: a path, the bytes of a file, an image of Pillow's or an array.

    It stands as its EXIF orientation says (where that comes before the pixels, as cameras write it). What is transparent is
    laid over white. Sixteen bits a channel become eight. Of an animation it is the first frame.

    Raises:
        ImageError: no file, another format than PNG, JPEG and WebP, a file that is damaged or cut short, or one beyond `limits`.
    """
    with _opened(picture, limits) as image, _STRICT:
        try:
            image.load()
            orientation = _orientation(image)
            image = _in_rgb(image)
            return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
        except Exception as error:  # what a codec raises on damaged bytes is its own
            raise ImageError(f"cannot decode the image {_name(picture)}: {_one_line(error)}") from None


class _Strict:
    """While it is entered, by any number of threads, Pillow refuses files that are cut short, even where another package (Meta's
    own among them) has switched that off for the whole process."""

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._inside += 1

    def __exit__(self, *exception) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_STRICT = _Strict()


@contextlib.contextmanager
def _opened(picture: Picture, limits: ImageLimits) -> Iterator[Image.Image]:
    """The image with its header read and its size within limits."""
    name = _name(picture)
    with contextlib.ExitStack() as stack:
        if isinstance(picture, Image.Image):
            image = picture
        elif isinstance(picture, np.ndarray):
            image = _from_array(picture)
        else:
            image = _read_header(stack.enter_context(_stream(picture, limits, name)), limits, name)
        width, height = image.size
        if not 0 < width * height <= limits.max_pixels:
            raise ImageError(
                f"the image {name} has {width} x {height} pixels, and at most {limits.max_pixels:,} are read: make it smaller"
            )
        yield image


def _stream(picture: str | Path | bytes, limits: ImageLimits, name: str) -> BinaryIO:
    try:
        stream = io.BytesIO(picture) if isinstance(picture, bytes) else open(Path(picture).expanduser(), "rb")  # noqa: SIM115
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
    except FileNotFoundError:
        raise ImageError(f"no image at {name}") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a path with a zero byte, of a user that is none
        raise ImageError(f"cannot read the image {name}: {_one_line(error)}") from None
    if size > limits.max_bytes:
        stream.close()
        raise ImageError(f"the image {name} has {size:,} bytes, and at most {limits.max_bytes:,} are read: make it smaller")
    return stream


def _read_header(stream: BinaryIO, limits: ImageLimits, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            return Image.open(stream, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(
            f"the image {name} has far more than the {limits.max_pixels:,} pixels that are read: make it smaller"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a {', '.join(FORMATS)} image, or its header is damaged") from None
    except Exception as error:  # what a codec raises on damaged bytes is its own
        raise ImageError(f"cannot decode the image {name}: {_one_line(error)}") from None


def _from_array(pixels: np.ndarray) -> Image.Image:
    if (
        pixels.dtype != np.uint8
        or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4)))
        or not pixels.size
    ):
        raise ImageError(f"an image must be uint8 [h, w], [h, w, 3] or [h, w, 4], got {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(pixels)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
        return Image.fromarray((np.asarray(image, np.int32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    # A PNG may hold its EXIF after the pixels; asking for that would decode them, and the header alone would say another size.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no reason to refuse a picture
        return 1


def _name(picture: Picture) -> str:
    if isinstance(picture, str | Path):
        return " ".join(str(picture).split())
    return getattr(picture, "filename", "") or "that was given"


def _one_line(error: Exception) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())


# ------------------------------------------------------------------------------------------------------------------------
# Cutting


def choose_grid(width: int, height: int, tile: int, max_tiles: int) -> TileGrid:
    """The grid of at most `max_tiles` square tiles (of `tile` pixels a side) for a picture of this size.

    Of the grids that need not shrink the picture it is the one nearest to its size, of others the one that shrinks it least;
    among equals the smallest.
    """
    grids = [TileGrid(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1)]
    # float32 as in the reference, whose ties are decided by its rounding
    scales = [
        min(np.float32(g.columns * tile) / np.float32(width), np.float32(g.rows * tile) / np.float32(height)) for g in grids
    ]
    enlarging = [scale for scale in scales if scale >= 1]
    best = min(enlarging) if enlarging else max(scales)
    return min((g for g, scale in zip(grids, scales, strict=True) if scale == best), key=lambda g: g.rows * g.columns)


def fitted_size(width: int, height: int, grid: TileGrid, tile: int) -> tuple[int, int]:
    """Width and height to which a picture is resized within its canvas: only pictures below a tile's size are enlarged."""
    room_w, room_h = min(max(width, tile), grid.columns * tile), min(max(height, tile), grid.rows * tile)
    if room_w / width < room_h / height:
        return room_w, max(min(math.floor(height * (room_w / width)), room_h), 1)
    return max(min(math.floor(width * (room_h / height)), room_w), 1), room_h


def cut_tiles(image: Image.Image, tile: int, max_tiles: int) -> TiledImage:
    """Cuts an RGB image into tiles of `tile` pixels a side, at most `max_tiles` of them beside the global one."""
    grid = choose_grid(*image.size, tile, max_tiles)
    canvas = Image.new("RGB", (grid.columns * tile, grid.rows * tile))
    canvas.paste(image.resize(fitted_size(*image.size, grid, tile), Image.Resampling.BILINEAR))
    tiles = np.asarray(canvas).reshape(grid.rows, tile, grid.columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
    if len(tiles) > 1:
        whole = image.resize((tile, tile), Image.Resampling.BILINEAR)
        tiles = np.concatenate([tiles, np.asarray(whole)[None]])
    return TiledImage(np.ascontiguousarray(tiles), grid)


def normalize(tiles: UInt8[np.ndarray, "*I h w 3"]) -> Float[np.ndarray, "*I h w 3"]:
    """Pixels in [-1, 1], float32: the form that the reference feeds its tower, and that the model makes of uint8 itself."""
    return (tiles.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)

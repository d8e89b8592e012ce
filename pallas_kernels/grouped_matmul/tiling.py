"""How large the blocks are that the TPU kernels work on."""

import dataclasses

VMEM_BYTES = 56 * 2**20  # of the smallest VMEM, tpu7x's 64 MiB, less what the compiler needs for itself
VMEM_LIMIT = VMEM_BYTES + 6 * 2**20
TILES = ((512, 1024), (384, 1024), (512, 512), (256, 512), (512, 256), (256, 256), (128, 128))  # rows, columns; the best first
PIECE_WORK = 512 * 2560 * 1024  # multiply-accumulates; smaller pieces begin and end more often, larger ones make more code


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Attributes:
    rows: of a tile.
    columns: of a tile of the output.
    piece: of the contraction, multiplied at a time.
    """

    rows: int
    columns: int
    piece: int


def choose(
    M: int,
    contraction: int,
    N: int,
    bytes_: int,
    *,
    matrices: int = 1,
    tiles: int = 1,
    stored: float | None = None,
    units: tuple[int, int] = (128, 128),
) -> Tiling:
    """The first of TILES whose blocks, two of each, fit into VMEM; the smallest one if none does.

    Args:
        matrices: that the rows are multiplied with at the same time.
        tiles: of the output's size that are read and written.
        stored: bytes of a matrix element where they are not `bytes_`; then a piece is there in `bytes_` too.
        units: of the contraction's pieces and of the columns, see `divisor`.
    """
    for rows, columns in TILES:
        rows, columns = min(rows, -(-M // 16) * 16), divisor(N, columns, units[1])
        piece = divisor(contraction, PIECE_WORK // (rows * columns * matrices), units[0])
        blocks = bytes_ * (rows * contraction + tiles * rows * columns)
        blocks += matrices * contraction * columns * (stored or bytes_)
        sums = 4 * matrices * rows * columns * (contraction > piece) + bytes_ * piece * columns * (stored is not None)
        if 2 * blocks + sums <= VMEM_BYTES:
            break
    return Tiling(rows, columns, piece)


def divisor(size: int, at_most: int, unit: int = 128) -> int:
    """The largest multiple of `unit` up to `at_most` that divides `size`; the smallest above where there is none; or all."""
    below = (d for d in range(at_most // unit * unit, 0, -unit) if size % d == 0)
    above = (d for d in range(unit, size, unit) if size % d == 0)
    return next(below, next(above, size))

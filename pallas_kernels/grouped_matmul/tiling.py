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


def choose(M: int, contraction: int, N: int, bytes_: int, *, matrices: int = 1, tiles: int = 1) -> Tiling:
    """The first of TILES whose blocks, two of each, fit into VMEM; the smallest one if none does.

    Args:
        matrices: that the rows are multiplied with at the same time.
        tiles: of the output's size that are read and written.
    """
    for rows, columns in TILES:
        rows, columns = min(rows, -(-M // 16) * 16), divisor(N, columns)
        piece = divisor(contraction, PIECE_WORK // (rows * columns * matrices))
        blocks = rows * contraction + matrices * contraction * columns + tiles * rows * columns
        if 2 * bytes_ * blocks + 4 * matrices * rows * columns * (contraction > piece) <= VMEM_BYTES:
            break
    return Tiling(rows, columns, piece)


def divisor(size: int, at_most: int) -> int:
    """The largest multiple of 128 up to `at_most` that divides `size`, itself one."""
    return next(d for d in range(max(at_most // 128, 1) * 128, 0, -128) if size % d == 0)

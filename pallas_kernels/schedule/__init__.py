"""How good is a TPU kernel's schedule? Read from the compiler's own listing, without a TPU. See README.md."""

from pallas_kernels.schedule.program import Block, Loop, Program, Region
from pallas_kernels.schedule.report import Report, Tile, measure, read

__all__ = ["Block", "Loop", "Program", "Region", "Report", "Tile", "measure", "read"]

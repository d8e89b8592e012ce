"""The schedule tool on a small listing whose every figure is known, and on a kernel compiled here and now."""

import json

import pytest

from pallas_kernels import aot
from pallas_kernels.schedule import __main__ as app
from pallas_kernels.schedule import program, report
from pallas_kernels.schedule.kernels import KERNELS, Kernel

UNITS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
MATMUL = "%1 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %2 = vmatmul.bf16.vlgmr.msra.gmra.mxu1 %v2"


class Listing:
    """Writes the two files of a kernel, one bundle at a time."""

    def __init__(self):
        self.bundles, self.rows = ["= control target key start", "LB: loop body", "= control target key end", ""], []

    def add(self, text="", *, mark="", comment="", mxu=0, spill=0, fill=0):
        address = hex(len(self.rows)) if self.rows else "0"
        note = f" /* {comment} */" if comment else ""
        self.bundles.append(f"{address:>6} {mark + ':' if mark else '  :':>4} > {{ {text} }}{note}")
        self.rows.append(f"{mxu} 0 1 0 0 {fill} {fill} {spill} {spill} 0")
        return self

    def branch(self, text):
        """With the bundles that run after it all the same."""
        self.add(text)
        for _ in range(program.DELAY_SLOTS):
            self.add()
        return self

    def texts(self):
        capacity = "    4     3     4     2     1     3     3     1     1     2"
        return "\n".join(self.bundles), "\n".join(["== CAPACITY:", UNITS, capacity, "== UTILIZATION:", *self.rows])


def kernel_listing() -> Listing:
    """0: entry. 2: the grid's body, with a guarded clearing (10 to 12), a loop of 7 (13 to 20) and alternatives of matrix work."""
    x = Listing()
    x.add("%s3 = smov 0").add("%s9 = smov 2")
    x.add("%s7 = sphi %s6, %s8", mark="LB", comment="Start region 50")  # 2: an unknown number of grid steps
    x.add().add()
    x.branch("%9 = sbr.rel (%p1) target = $region12")  # 5 to 9
    x.add("vst 0", spill=1).add("vst 0", spill=1).add("vst 0")  # 10, 11, 12
    x.add(
        "%s4 = sphi %s9, %s5  ;;  %s5 = sadd.s32 1, %s4", mark="LB", comment="Start/End empty region 12 :: Start region 60"
    )  # 13
    x.add("%p2 = scmp.ge.s32.totalorder %s5, 9 /* loop exit test */", fill=2)
    x.add()
    x.branch("%9 = sbr.rel (!%p2) target = $region60")  # 16 to 20
    x.branch("%9 = sbr.rel (%p3) target = $region20")  # 21 to 25
    for _ in range(3):
        x.add(MATMUL, mxu=4)  # 26, 27, 28
    x.add(mark="PF", comment="Start/End empty region 20 :: Start region 21")  # 29
    x.branch("%9 = sbr.rel (%p4) target = $region22")  # 30 to 34
    for _ in range(40):
        x.add(MATMUL.replace("bf16", "f32") if _ < 6 else "", mxu=2)  # 35 to 74
    x.add(mark="PF", comment="Start/End empty region 22")  # 75
    x.branch("%9 = sbr.rel (!%p7) target = $region50")  # 76 to 80
    return x.add("vsyncpa", comment="exit bundle")


TILE = Kernel(list, "mine", "three products", macs=6 * 16 * 128 * 128, steps=4)


def test_loops_guards_and_blocks_are_where_the_branches_say():
    parsed = program.parse(*kernel_listing().texts(), "v5p")
    assert [(b.start, b.stop) for b in parsed.blocks][:4] == [(0, 2), (2, 10), (10, 13), (13, 21)]
    inner = next(block for block in parsed.blocks if block.start == 13)
    assert [(loop.start, loop.stop, loop.trips) for loop in inner.loops] == [(2, 81, None), (13, 21, 7)]
    assert [(g.start, g.stop) for b in parsed.blocks if b.start == 26 for g in b.guards] == [(26, 29)]
    assert sum(block.bundles for block in parsed.blocks) == 82
    assert [region.start for region in parsed.regions] == [0, 2, 13, 21, 29, 75, 81]


def test_the_cost_of_a_tile_by_either_way():
    """Always: 8 + 7 * 8 + 5 + 6 + 6 = 81 bundles; a quarter of the clearing's 3; then 3 bundles of one way or 40 of the other."""
    result = report.report("mine", "v5p", TILE, program.parse(*kernel_listing().texts(), "v5p"))
    short, long = result.tiles
    assert (short.way, long.way) == (26, 35)
    assert (short.bundles, long.bundles) == (81.75 + 3, 81.75 + 40)
    assert short.mxu_minimum == 3 * 16 and long.mxu_minimum == 6 * 8  # a bfloat16 register is 16 rows, a float32 one 8
    assert short.cycles == 81.75 + 48 and long.cycles == 81.75 + 48  # both are bound by the MXU, not by their bundles
    assert short.mxu_busy == pytest.approx(12 / (4 * 84.75))
    assert short.slots["VLOAD:FILL"] == 7 * 2 and short.slots["VSTORE:SPILL"] == 2 / 4
    assert short.efficiency == pytest.approx(6 * 16 / (4 * 129.75))


def test_table_and_json_name_every_region_of_the_grid():
    result = report.report("mine", "v5p", TILE, program.parse(*kernel_listing().texts(), "v5p"))
    figures = json.loads(json.dumps(result.json()))
    assert [region["bundles"] for region in figures["regions"]] == [11, 8, 8, 46, 6]
    assert [region["conditional"] for region in figures["regions"]] == [3, 0, 3, 40, 0]
    assert figures["regions"][1]["trips"] == [7]
    assert "0x1d" in result.table() and "tile by way of 0x23" in result.table()


def test_listings_of_different_kernels_are_refused():
    bundles, utilization = kernel_listing().texts()
    with pytest.raises(ValueError, match="82 bundles, but slots of 81"):
        program.parse(bundles, utilization.rsplit("\n", 1)[0], "v5p")


def test_a_wider_array_does_more_in_a_matmul_and_takes_its_rows_faster():
    slow, fast = (program.parse(*kernel_listing().texts(), tpu).blocks for tpu in ("v5p", "v6e"))
    pick = lambda blocks: next(block for block in blocks if block.start == 26)  # noqa: E731
    assert pick(fast).macs == 4 * pick(slow).macs and pick(fast).matmul_cycles["mxu0"] == 3 * 8


def test_unknown_names_are_refused_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(aot, "available", lambda: True)
    monkeypatch.setattr("sys.argv", ["schedule", "--op=nothing", "--tpu=v5p"])
    assert app.main() == 2 and "no kernel 'nothing'; choose from" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no topology 'v9'"):
        aot.compile_for("v9", [])


# ------------------------------------------------------------------------------------------------------------------------
# Compiled here and now

needs_libtpu = pytest.mark.skipif(not aot.available(), reason="needs libtpu (pip install libtpu)")


@needs_libtpu
def test_the_child_compiles_and_says_what_failed():
    name = "pallas_kernels.schedule.kernels:KERNELS"  # not a function of devices
    (failed,) = aot.compile_for("v5e", [aot.Request(name)])
    assert "TypeError" in failed.error


@needs_libtpu
def test_splash_is_measured_live():
    """The matrix work of a 512x1024 tile with head size 128 is exact; its schedule is longer, and has one way only."""
    result = report.measure("splash", "v5p")
    (tile,) = result.tiles
    assert tile.mxu_minimum == KERNELS["splash"].macs / (4 * 128 * 128) == 2048
    assert 2048 < tile.bundles < 4000 and 0.5 < tile.mxu_busy < 1

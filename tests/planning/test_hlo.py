"""The text of programs: shapes, groups and turns in each of the forms that compilers write."""

import pytest

from llama4_jax.planning import hlo
from llama4_jax.planning.work import flops, replica_group


def test_shapes_of_arrays_and_tuples():
    (instruction,) = _entry(
        "%x = (bf16[6,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}, pred[3,5]{0,1}) custom-call(%p)"
    )
    first, second, third = instruction.shapes
    assert (first.dtype, first.dims, first.tile, first.space) == ("bf16", (6, 128), (8, 128), 1)
    assert (first.bytes, first.padded_bytes) == (6 * 128 * 2, 8 * 128 * 2)
    assert (second.dims, second.bytes, second.space) == ((), 4, 2)
    assert third.layout == (0, 1) and third.padded_bytes == 15


def test_the_layout_says_which_dimension_is_padded():
    (instruction,) = _entry("%x = f32[100,8]{0,1:T(8,128)} copy(%p)")
    assert instruction.shapes[0].padded_bytes == 128 * 8 * 4


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,1},{2,3}}", (0, 1)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2,'axis_2'=1] {'axis_0','axis_1'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0','axis_2'}",
         (0, 2, 4, 6, 1, 3, 5, 7)),
        ("replica_groups={}", tuple(range(8))),
    ],
)  # fmt: skip
def test_groups_of_devices(text, group):
    assert replica_group(f", channel_id=1, {text}, use_global_device_ids=true", 8) == group


LOOP = """
%fused_add (a: s32[]) -> s32[] {
  %a = s32[]{:T(128)} parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%a, %two)
}
%condition (c: (s32[], s32[], f32[4])) -> pred[] {
  %c = (s32[], s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%body (b: (s32[], s32[], f32[4])) -> (s32[], s32[], f32[4]) {
  %b = (s32[], s32[], f32[4]) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %k = s32[] get-tuple-element(%b), index=1
  %x = f32[4] get-tuple-element(%b), index=2
  %next = s32[] fusion(%j), kind=kLoop, calls=%fused_add
  ROOT %out = (s32[], s32[], f32[4]) tuple(%next, %k, %x)
}
ENTRY %main (x: f32[4], n: s32[]) -> f32[4] {
  %x = f32[4] parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(1)
  %ten = s32[] constant(10)
  %start = (s32[], s32[], f32[4]) tuple(%zero, LIMIT, %x)
  %loop = (s32[], s32[], f32[4]) while(%start), condition=%condition, body=%body
  ROOT %r = f32[4] get-tuple-element(%loop), index=2
}
"""


def test_turns_of_a_loop_with_its_step_in_a_fusion_and_its_bound_in_the_state():
    """1, 3, 5, 7, 9: five turns."""
    module = hlo.parse(LOOP.replace("LIMIT", "%ten"))
    assert hlo.trip_count(module, module.entry, module.entry["loop"]) == 5


def test_a_bound_that_is_an_argument_is_unknown():
    module = hlo.parse(LOOP.replace("LIMIT", "%n"))
    assert hlo.trip_count(module, module.entry, module.entry["loop"]) is None
    runs = hlo.executions(module, lambda loop: 3.0, len)
    assert sum(run.times for run in runs if run.instruction.name == "next") == 3


@pytest.mark.parametrize(
    "window, labels, left, right, result, expected",
    [
        ("", "bf_io->bf", "64,32", "32,16", "64,16", 2 * 64 * 32 * 16),
        ("window={size=4}, ", "0bf_0io->b0f", "4,64,32", "4,32,16", "64,1,16", 2 * 4 * 64 * 32 * 16),
        # A batch of 8 as a window that slides over padding: each place meets one value.
        ("window={size=8 stride=7 pad=0_0 lhs_dilate=8}, ", "0bf_0io->0bf", "8,4,32", "8,32,16", "8,4,16", 2 * 8 * 4 * 32 * 16),
        ("window={size=3 pad=1_1}, ", "b0f_0io->b0f", "1,5,2", "3,2,7", "1,5,7", 2 * (5 * 3 - 2) * 2 * 7),
    ],
)
def test_products_as_convolutions(window, labels, left, right, result, expected):
    module = hlo.parse(
        f"ENTRY %main (l: f32[{left}], r: f32[{right}]) -> f32[{result}] {{\n"
        f"  %l = f32[{left}] parameter(0)\n  %r = f32[{right}] parameter(1)\n"
        f"  ROOT %c = f32[{result}] convolution(%l, %r), {window}dim_labels={labels}\n}}\n"
    )
    assert flops(module, module.entry, module.entry["c"]) == (expected, 0)


SEVERAL_LINES = """ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %kernel = f32[4] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"context\\"]"
}}, metadata={op_name="attention"}
  ROOT %out = f32[4] negate(%kernel)
}, execution_thread="sparsecore"
"""


def test_an_instruction_over_several_lines_is_one_and_does_not_end_its_computation():
    entry = hlo.parse(SEVERAL_LINES).entry
    assert [i.name for i in entry] == ["x", "kernel", "out"] and entry.root == "out"
    assert entry["kernel"].op_name == "attention"


def test_a_computation_that_is_cut_off_is_refused():
    with pytest.raises(ValueError, match="no root in the computation main"):
        hlo.parse(SEVERAL_LINES.replace("ROOT ", ""))


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing\n")


def _entry(line: str) -> list[hlo.Instruction]:
    return list(hlo.parse(f"ENTRY %main (p: f32[]) -> f32[] {{\n  ROOT {line}\n}}\n").entry)

"""The walk through a scheduled program adds up what runs, as often as it runs."""

import pytest

from sdjax.planning.hlo import HloError, Program, nbytes

TEXT = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[8,16]{1,0})->bf16[8,16]{1,0}}

%inner_product (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %convolution.1 = bf16[8,16]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%wrapped (p.1: bf16[8,16]) -> bf16[8,16] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  ROOT %fusion.9 = bf16[8,16]{1,0} fusion(%p.1), kind=kOutput, calls=%inner_product
}

%elementwise (p.2: bf16[8,16]) -> bf16[8,16] {
  %p.2 = bf16[8,16]{1,0} parameter(0)
  ROOT %negate = bf16[8,16]{1,0} negate(%p.2)
}

%bound (c: (s32[], bf16[8,16])) -> pred[] {
  %c = (s32[]{:T(128)}, /*index=1*/bf16[8,16]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%cheap (a: bf16[8,16]) -> bf16[8,16] {
  ROOT %a = bf16[8,16]{1,0} parameter(0)
}

%dear (b: bf16[8,16]) -> bf16[8,16] {
  %b = bf16[8,16]{1,0} parameter(0)
  ROOT %fusion.3 = bf16[8,16]{1,0} fusion(%b), kind=kOutput, calls=%wrapped, backend_config={"estimated_cycles":"1000"}
}

%body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %y = bf16[8,16]{1,0} conditional(%i, %x, %x), branch_computations={%cheap, %dear}, metadata={op_name="f/deep/cond"}
  %flash.2 = bf16[8,16]{1,0} custom-call(%y, %x), custom_call_target="tpu_custom_call", backend_config={"a":"=%dear"}
  ROOT %tuple = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%i, %flash.2)
}

ENTRY %main (q: bf16[8,16]) -> bf16[8,16] {
  %q = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="q(\\"x\\")"}
  %zero = s32[]{:T(128)} constant(0)
  %minus = bf16[8,16]{1,0} fusion(%q), kind=kLoop, calls=%elementwise, backend_config={"estimated_cycles":"700"}
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%zero, %minus)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%start), condition=%bound, body=%body
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_loops_branches_and_kernels_count_as_often_as_they_run():
    cost = Program(TEXT).cost(bytes_per_cycle=4)
    assert cost.cycles == {"product": 5 * 1000, "other": 700}
    assert cost.kernels == {("flash", ((8, 16), (8, 16))): 5}


def test_a_conditional_counts_as_often_as_is_said_of_its_scope():
    costs = [Program(TEXT).cost(4, taken) for taken in ({"deep": 0}, {"deep": 0.25}, {"shallow": 0.25})]
    assert [cost.cycles["product"] for cost in costs] == [0, 0.25 * 5 * 1000, 5 * 1000]
    assert [cost.cycles["other"] for cost in costs] == [700] * 3


def test_what_multiplies_nothing_costs_no_more_than_its_bytes():
    cost = Program(TEXT).cost(bytes_per_cycle=4)
    assert cost.capped == {"product": 5000, "other": 2 * 8 * 16 * 2 / 4}
    assert Program(TEXT).cost(bytes_per_cycle=0.01).capped["other"] == 700


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(f32[4]{0}, /*index=1*/u8[3]{0:S(1)}, pred[2]{0}, s32[])", 16 + 3 + 2 + 4),
        ("f8e4m3fn[10]", 10),
        ("s4[6]", 3),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(shape, expected):
    assert nbytes(shape) == expected


def test_a_loop_without_a_constant_bound_is_not_guessed():
    with pytest.raises(HloError, match="bound has 0 integer constants"):
        Program(TEXT.replace("constant(5)", "add(%counter, %counter)")).cost(4)


def test_what_is_no_program_is_refused():
    with pytest.raises(HloError, match="no ENTRY computation"):
        Program("HloModule nothing\n")

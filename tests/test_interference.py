"""Do the curves from resource share to performance hold the printed points, ascend, and have an inverse?"""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import published
from nanojax.pipeline.interference import (
    NO_INTERFERENCE,
    PAPER_TABLE_3,
    PAPER_TABLE_3_AND_TEXT,
    RELEASED_TABLES,
    Interference,
)
from nanojax.pipeline.ir import Resource

CURVES = {"paper": PAPER_TABLE_3, "text": PAPER_TABLE_3_AND_TEXT, "released": RELEASED_TABLES, "none": NO_INTERFERENCE}
ALL = pytest.mark.parametrize("curves", CURVES.values(), ids=CURVES)
RESOURCE = pytest.mark.parametrize("resource", list(Resource))
FRACTION = st.floats(0, 1)


@pytest.mark.parametrize("column", ["gemm", "gemv", "network"])
def test_table_3s_printed_points_are_on_the_curves(column):
    resource = {"gemm": Resource.COMPUTE, "gemv": Resource.MEMORY, "network": Resource.NETWORK}[column]
    printed = published.table("table3").columns
    assert len(printed["share"]) == 6
    for share, performance in zip(printed["share"], printed[column], strict=True):
        assert PAPER_TABLE_3.performance(resource, share) == pytest.approx(performance)


@pytest.mark.parametrize(("name", "resource"), [("gemv", Resource.MEMORY), ("network", Resource.NETWORK)])
def test_the_released_points_are_on_the_curves(name, resource):
    table = published.table(f"released_interference_{name}")
    for row in table.rows():
        assert RELEASED_TABLES.performance(resource, row["share"]) == pytest.approx(row["performance"])


def test_the_sources_disagree_on_decode_attention_at_the_texts_share():
    text = published.scalars("table3_text").values
    found = [
        curves.performance(Resource.MEMORY, text["decode_attention_share"])
        for curves in (PAPER_TABLE_3, RELEASED_TABLES, PAPER_TABLE_3_AND_TEXT)
    ]
    assert found == pytest.approx([0.3 + 0.55 / 3, 0.6, text["decode_attention_performance"]])


@ALL
@RESOURCE
def test_nothing_gives_nothing_and_all_gives_all(curves, resource):
    assert curves.performance(resource, 0) == (1 if curves is NO_INTERFERENCE else 0)
    assert curves.performance(resource, 1) == 1
    assert curves.share_for(resource, 0) == 0


@ALL
@RESOURCE
@given(shares=st.lists(FRACTION, min_size=2, max_size=6))
def test_a_larger_share_is_never_worth_less(curves, resource, shares):
    found = [curves.performance(resource, share) for share in sorted(shares)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    assert all(0 <= p <= 1 + 1e-12 for p in found)


@pytest.mark.parametrize("curves", [PAPER_TABLE_3, RELEASED_TABLES, PAPER_TABLE_3_AND_TEXT])
@given(share=FRACTION)
def test_a_gemm_gets_its_share_and_others_at_least_theirs(curves, share):
    assert curves.performance(Resource.COMPUTE, share) == pytest.approx(share)
    for resource in (Resource.MEMORY, Resource.NETWORK):
        assert curves.performance(resource, share) >= share - 1e-12


@ALL
@RESOURCE
@given(performance=FRACTION)
def test_the_inverse_is_the_smallest_share_that_is_enough(curves, resource, performance):
    share = curves.share_for(resource, performance)
    assert curves.performance(resource, share) >= performance - 1e-12
    if share > 1e-6:
        assert curves.performance(resource, share - 1e-6) < performance + 1e-12


def test_the_inverse_by_hand():
    assert PAPER_TABLE_3.share_for(Resource.NETWORK, 1.0) == 0.9
    assert PAPER_TABLE_3.share_for(Resource.NETWORK, 0.4) == pytest.approx(0.15)
    assert RELEASED_TABLES.share_for(Resource.MEMORY, 0.55) == pytest.approx(0.35)
    assert NO_INTERFERENCE.share_for(Resource.MEMORY, 1.0) == 0


@ALL
def test_curves_survive_json(curves):
    assert Interference.from_json(curves.to_json()) == curves


LINE = ((0.0, 0.0), (1.0, 1.0))


@pytest.mark.parametrize(
    "curve",
    [
        ((0.0, 0.0),),
        ((0.1, 0.0), (1.0, 1.0)),
        ((0.0, 0.0), (1.0, 0.9)),
        ((0.0, 0.0), (0.5, 0.7), (0.5, 0.8), (1.0, 1.0)),
        ((0.0, 0.0), (0.5, 0.7), (0.6, 0.6), (1.0, 1.0)),
        ((0.0, -0.1), (1.0, 1.0)),
        ((0.0, 0.0), (0.5, float("nan")), (1.0, 1.0)),
    ],
)
def test_a_curve_that_is_none_is_refused(curve):
    with pytest.raises(ValueError, match=r"memory curve .* must go from R = 0 to \(1, 1\)"):
        Interference(LINE, curve, LINE, "test")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PAPER_TABLE_3.performance(Resource.MEMORY, 1.1), r"share=1.1 must be in \[0, 1\]"),
        (lambda: PAPER_TABLE_3.performance(Resource.MEMORY, float("nan")), "share=nan"),
        (lambda: PAPER_TABLE_3.share_for(Resource.MEMORY, -0.1), r"performance=-0.1 must be in \[0, 1\]"),
        (lambda: Interference.from_json('{"compute": [[0, 0], [1, 1]]}'), "KeyError 'memory'"),
        (lambda: Interference.from_json("3"), "these are no interference curves: TypeError"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Does a sweep text become the points one expects?"""

import pytest

from experiments.sweep import parse_sweep, sweep_series


def test_one_flag_gives_one_point_per_value():
    assert parse_sweep("page_size=8,16,32") == [{"page_size": 8}, {"page_size": 16}, {"page_size": 32}]


def test_several_flags_give_their_product_with_the_last_one_fastest():
    points = parse_sweep("page_size=8,16; driver=sync,ahead")
    assert points == [
        {"page_size": 8, "driver": "sync"},
        {"page_size": 8, "driver": "ahead"},
        {"page_size": 16, "driver": "sync"},
        {"page_size": 16, "driver": "ahead"},
    ]


def test_values_have_the_narrowest_type():
    values = [point["x"] for point in parse_sweep("x=1,2.5,1e3,true,False,lmsys,0x10")]
    assert values == [1, 2.5, 1000.0, True, False, "lmsys", "0x10"]
    assert [type(value) for value in values] == [int, float, float, bool, bool, str, str]


def test_no_sweep_is_one_run_as_it_is():
    assert parse_sweep("") == parse_sweep(" ; ") == [{}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("page_size", "'page_size': expected flag=value"),
        ("=1,2", "'=1,2': expected flag=value"),
        ("page size=1", "'page size=1': expected flag=value"),
        ("a=1,,2", "'a=1,,2': a value is empty"),
        ("a=", "'a=': a value is empty"),
        ("a=1,1", "'a=1,1': a value is given twice"),
        ("a=1;a=2", "'a=2': flag 'a' is given twice"),
    ],
)
def test_a_wrong_part_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sweep(text)


def test_the_table_of_a_sweep_has_a_row_per_point_and_the_shared_metrics():
    points = parse_sweep("page_size=8,16")
    table = sweep_series(points, [{"tpot_s": 1.0, "extra_s": 3.0}, {"tpot_s": None}])
    assert table == {"page_size": [8, 16], "tpot_s": [1.0, None]}
    assert sweep_series([], []) == {}
    with pytest.raises(ValueError, match="2 points, but metrics of 1 runs"):
        sweep_series(points, [{}])

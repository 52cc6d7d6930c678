"""Do the GPU report's programs compile for an H200 that is not there?  One of each implementation in each part."""

import pytest

from experiments import compiled_code
from experiments.gpu_report import compile_all

NUM_CORES = 132
CHOSEN = list(compile_all.first_of_each(list(compile_all.programs(NUM_CORES))))
# Neither is ours: XLA's own products and attention, and cuDNN, whose libraries are not part of the compiling environment.
LEFT_OUT = ("xla", "cudnn")


def is_ours(name: str) -> bool:
    return not any(word in name for word in LEFT_OUT)


@pytest.mark.gpu_compile
@pytest.mark.skipif(compiled_code.why_not() is not None, reason=str(compiled_code.why_not()))
@pytest.mark.parametrize(
    ("part", "comparison", "name"),
    [pytest.param(*one, id=f"{one[0]}-{one[2]}".replace(" ", "_")) for one in CHOSEN if is_ours(one[2])],
)
def test_a_program_compiles_without_spills(part, comparison, name):
    row = compile_all.compile_one(compiled_code.target("h200"), part, comparison, name)
    if "is none of" in str(row["error"]) or str(row["error"]).startswith("ModuleNotFoundError"):
        pytest.skip(f"this implementation is not there: {row['error']}")
    assert row["is_ok"], row["error"]
    assert row["spill_bytes"] == 0
    assert row["smem_bytes"] <= 232_448
    if part == "pairs" and name.startswith(("sm_exclusive", "capped", "probe")):
        assert row["num_overlapped"] >= 2, "the two are not on their way at the same time"


def test_every_timed_part_is_among_what_is_compiled():
    names = {(part, name.rstrip("0123456789+ ")) for part, _, name in CHOSEN}
    assert {part for part, _ in names} == {*compile_all.PARTS}
    assert ("kernel_speed", "mosaic_gpu") in names
    assert ("pairs", "sm_exclusive") in names
    assert ("pairs", "probe") in names

"""Do shares become the right numbers of CTAs, and are the overlapped pairs' floors what a hand computes?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanojax.hardware import hardware_spec
from pallas_kernels.overlap.arg_specs import ARG_SPECS
from pallas_kernels.overlap.shares import Split, ctas_of_shares, split_of_share


@pytest.mark.parametrize(
    ("shares", "num_sms", "counts"),
    [
        ((0.6, 0.4), 132, (79, 53)),  # 79.2 and 52.8
        ((0.5, 0.5), 3, (2, 1)),  # equal remainders: the earlier one
        ((0.999, 0.001), 132, (131, 1)),
        ((0.2, 0.2), 132, (66, 66)),  # only ratios count
        ((1.0,), 108, (108,)),
        ((0.001, 0.001, 0.998), 4, (1, 1, 2)),
    ],
)
def test_shares_by_hand(shares, num_sms, counts):
    assert ctas_of_shares(shares, num_sms) == counts


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6), st.integers(6, 200))
def test_every_multiprocessor_is_given_out_and_nobody_goes_without(shares, num_sms):
    counts = ctas_of_shares(shares, num_sms)
    assert sum(counts) == num_sms
    assert min(counts) >= 1
    exact = [num_sms * share / sum(shares) for share in shares]
    if min(exact) >= 1:
        assert all(abs(count - part) < 1 for count, part in zip(counts, exact, strict=True))


def test_impossible_shares_are_said():
    with pytest.raises(ValueError, match="must be positive"):
        ctas_of_shares((0.5, 0.0), 132)
    with pytest.raises(ValueError, match="3 operations side by side on num_sms=2"):
        ctas_of_shares((0.3, 0.3, 0.4), 2)
    with pytest.raises(ValueError, match=r"share=1\.0"):
        split_of_share(1.0, 132)
    with pytest.raises(ValueError, match="without a multiprocessor"):
        Split(132, 0)
    assert split_of_share(2 / 3, 132) == Split(88, 44)


def test_floors_by_hand():
    spec = next(spec for spec in ARG_SPECS if spec.name == "llama-3-8b-1024-UG")
    assert spec.matmul.flops == 2 * 640 * 4096 * 28672
    assert spec.matmul.num_bytes == 2 * (640 * 4096 + 4096 * 28672 + 640 * 14336)
    assert spec.attention.num_bytes == 384 * 1024 * 2 * 8 * 128 * 2 + 2 * 384 * 32 * 128 * 2
    h200, a100 = (hardware_spec(name) for name in ("h200-sxm", "a100-80-sxm"))
    for gpu, product_us, attention_us in ((h200, 151.9, 336.9), (a100, 481.8, 793.0)):
        peaks = gpu.peak_flops, gpu.memory_bytes_per_s
        assert spec.matmul.floor_s(*peaks) == pytest.approx(product_us * 1e-6, rel=1e-3)
        assert spec.attention.floor_s(*peaks) == pytest.approx(attention_us * 1e-6, rel=1e-3)


@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_side_by_side_is_never_slower_than_in_order_nor_faster_than_the_longer_one(spec):
    gpu = hardware_spec("h200-sxm")
    peaks = gpu.peak_flops, gpu.memory_bytes_per_s
    one, two = spec.matmul.floor_s(*peaks), spec.attention.floor_s(*peaks)
    pair = (spec.matmul + spec.attention).floor_s(*peaks)
    assert max(one, two) <= pair * (1 + 1e-12)
    assert pair <= (one + two) * (1 + 1e-12)

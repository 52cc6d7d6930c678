"""Is the hardware table the printed one, and do measurements of this device make sense?"""

import dataclasses

import jax.numpy as jnp
import pytest

from nanojax import hardware
from nanojax.hardware import PAPER_TABLE_1, REAL_HARDWARE

# The three derived columns of Table 1, as printed: Mem / MemBW in s, Compute / MemBW, NetBW / MemBW.
PRINTED_RATIOS = {
    "v100": (".018", "139", ".33"),
    "a100-40": (".026", "200", ".39"),
    "a100-80": (".040", "156", ".30"),
    "h100": (".024", "295", ".268"),
    "h200": (".020", "206", ".19"),
    "b100": (".015", "225", ".23"),
    "b200": (".015", "281", ".23"),
    "mi250": (".038", "107", ".24"),
    "mi300": (".036", "246", ".19"),
    "mi325x": (".043", "218", ".17"),
    "gaudi-2": (".040", "417", ".25"),
    "gaudi-3": (".035", "486", ".32"),
    "ada-6000": (".050", "190", ".067"),
}


def unit_in_the_last_place(printed: str) -> float:
    return 10.0 ** -len(printed.partition(".")[2])


@pytest.mark.parametrize("name", PRINTED_RATIOS)
def test_table_1s_derived_columns_follow_from_its_first_four(name):
    # The paper mixes rounding (V100: 138.9 printed 139) and truncation (A100-40: 200.6 printed 200), so a printed value
    # may be off by up to one unit in its last place.
    spec = PAPER_TABLE_1[name]
    derived = (spec.memory_sweep_s, spec.flops_per_byte, spec.network_per_memory_bandwidth)
    for value, printed in zip(derived, PRINTED_RATIOS[name], strict=True):
        assert abs(value - float(printed)) < unit_in_the_last_place(printed)


def test_table_1_has_the_13_accelerators_in_order():
    assert list(PAPER_TABLE_1) == list(PRINTED_RATIOS)


def test_the_printed_h200_and_the_real_one_differ_in_memory():
    printed, real = PAPER_TABLE_1["h200"], REAL_HARDWARE["h200-sxm"]
    assert (printed.memory_bytes, real.memory_bytes) == (96e9, 141e9)
    assert (real.memory_bytes_per_s, real.peak_flops, real.num_cores) == (4.8e12, 989.5e12, 132)


def test_names_are_unique_and_found():
    assert not PAPER_TABLE_1.keys() & REAL_HARDWARE.keys()
    assert hardware.hardware_spec("b200").peak_flops == 2.25e15
    with pytest.raises(ValueError, match=r"'b300' is unknown: v100, .*h200-sxm"):
        hardware.hardware_spec("b300")
    with pytest.raises(dataclasses.FrozenInstanceError):
        hardware.hardware_spec("b200").year = 1


@dataclasses.dataclass
class FakeDevice:
    platform: str
    device_kind: str
    core_count: int | None = None


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80-sxm"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_matched_to_its_published_numbers(monkeypatch, device_kind, name):
    monkeypatch.setattr(hardware.jax, "devices", lambda: [FakeDevice("gpu", device_kind, core_count=77)])
    device = hardware.detect()
    assert (device.name, device.kind, device.num_cores) == (device_kind, "gpu", 77)
    assert device.spec == (name and REAL_HARDWARE[name])


def test_a_gpu_that_does_not_count_its_cores_has_the_published_number(monkeypatch):
    monkeypatch.setattr(hardware.jax, "devices", lambda: [FakeDevice("gpu", "NVIDIA H200")])
    assert hardware.detect().num_cores == 132


def test_detect_names_this_cpu():
    device = hardware.detect()
    assert device.kind == "cpu"
    assert device.name
    assert device.num_cores >= 1
    assert device.num_devices >= 1
    assert device.spec is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_measured_peak_is_a_positive_rate_with_its_spread(dtype):
    peak = hardware.measure_peak_flops(dtype, sizes=(32, 64), num_repeats=3)
    assert 0 < peak.low <= peak.median <= peak.high
    assert peak.num_repeats == 3
    assert peak.spread_fraction >= 0
    assert jnp.dtype(dtype).name in peak.what


def test_measured_bandwidth_is_a_positive_rate():
    bandwidth = hardware.measure_copy_bandwidth(num_bytes=4096, num_repeats=3)
    assert 0 < bandwidth.low <= bandwidth.median <= bandwidth.high
    assert "4096 bytes" in bandwidth.what


def test_a_rate_is_the_amount_over_the_median_time():
    # 6 units in 1, 2, 3 s: 6, 3, 2 per second.
    rate = hardware._rates("toy", 6.0, [1.0, 2.0, 3.0])
    assert (rate.median, rate.low, rate.high, rate.num_repeats) == (3.0, 2.0, 6.0, 3)


def test_measurement_errors_name_the_value():
    with pytest.raises(ValueError, match=r"sizes=\(\)"):
        hardware.measure_peak_flops(sizes=())
    with pytest.raises(ValueError, match="num_repeats=0"):
        hardware.measure_peak_flops(sizes=(8,), num_repeats=0)
    with pytest.raises(ValueError, match="num_bytes=3"):
        hardware.measure_copy_bandwidth(num_bytes=3)

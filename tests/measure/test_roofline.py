"""Roofline, waterline and efficiency by hand-computed examples."""

import pytest

from featherweight.measure.roofline import Kernel, Roofline, Waterline, measure_roofline

MACHINE = Roofline(peak_macs_per_s=50e9, bandwidth_bytes_per_s=20e9)
DENSE = Kernel("dense", macs=10_000_000, read_bytes=500_000, written_bytes=400_000, weight_bytes=100_000)
THIN = Kernel("thin", macs=1_000_000, read_bytes=2_000_000, written_bytes=2_000_000)
POOL = Kernel("pool", macs=0, read_bytes=1_000_000, written_bytes=0)


def test_intensity_and_balance():
    assert (DENSE.moved_bytes, DENSE.intensity, THIN.intensity, POOL.intensity) == (10**6, 20, 0.5, 0)
    assert MACHINE.balance == 5


def test_each_kernel_meets_its_own_limit():
    waterline = Waterline((DENSE, THIN, POOL), MACHINE)
    assert [row["bound"] for row in waterline.rows()] == ["arithmetic", "memory", "memory"]
    assert [row["attainable_ms"] for row in waterline.rows()] == pytest.approx([0.2, 0.2, 0.05])
    assert waterline.attainable_s == pytest.approx(0.45e-3)
    assert waterline.ideal_s == pytest.approx(0.22e-3)
    assert waterline.efficiency == pytest.approx(0.22 / 0.45)
    assert waterline.intensity == pytest.approx(22e6 / 6e6)


def test_more_bandwidth_lifts_every_kernel_above_the_water():
    waterline = Waterline((DENSE, THIN), Roofline(50e9, 1e15))
    assert waterline.efficiency == 1 and waterline.attainable_s == waterline.ideal_s


def test_efficiency_of_a_measured_latency():
    assert MACHINE.efficiency(11_000_000, 0.44e-3) == pytest.approx(0.5)


def test_measured_limits_of_this_machine():
    found = measure_roofline(runs=3, side=256)
    assert found.peak_macs_per_s > 1e6 and found.bandwidth_bytes_per_s > 1e6

"""The launch planner: every problem gets a plan within the device's limits, and the shapes that matter get theirs."""

import itertools

import pytest
import torch

from stablevelocity_kernels import info

pytestmark = pytest.mark.skipif(info._C is None, reason="the planner needs the compiled extension")

H100 = {"device": "h100"}
SIZES_D = (1, 2, 8, 9, 10, 32, 33, 64, 784, 1000, 4096, 4100, 8192, 16384, 16392, 65537, 2**21)


@pytest.mark.parametrize("d", SIZES_D)
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.float32, torch.float64])
def test_every_plan_is_within_the_limits(d, refs_dtype):
    for n, m, k, source in itertools.product((1, 7, 256, 50_000), (1, 256, 1_000_000), (None, 10), (False, True)):
        aligned = d * refs_dtype.itemsize % 16 == 0
        plan = info.plan(n, m, d, k, refs_dtype=refs_dtype, source=source, aligned=aligned, **H100)
        assert plan["kernel"] in ("stream", "two_pass", "tiled", "small")
        assert 0 < plan["threads"] <= 1024
        assert plan["threads"] % 32 == 0
        assert 0 <= plan["smem_bytes"] <= 232448
        assert 0 < plan["blocks"] < 2**31
        assert plan["splits"] > 0
        assert plan["rows_per_pass"] > 0
        assert plan["flops"] == 4 * n * m * d
        assert plan["reason"]


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), list(itertools.product((1, 256, 10_000), (16, 256, 50_000), SIZES_D, (None, 10)))
)
def test_workspace_is_bounded(n, m, d, k):
    plan = info.plan(n, m, d, k, aligned=d % 8 == 0, **H100)
    if (k or 1) * m * plan["splits"] * 4 < 2**26:  # one row's scores fit
        assert plan["workspace_bytes"] < 256 << 20


@pytest.mark.parametrize(
    ("sizes", "kernel"),
    [
        ((256, 256, 4096, 1001), "stream"),
        ((1, 50_000, 4096, None), "stream"),
        ((16, 256, 16384, 10), "stream"),
        ((16, 256, 65536, 10), "two_pass"),
        ((256, 50_000, 3072, None), "tiled"),
        ((10_000, 100_000, 10, None), "small"),
        ((128, 256, 2, 10), "two_pass"),
    ],
    ids=str,
)
def test_the_shapes_that_matter(sizes, kernel):
    assert info.plan(*sizes, **H100)["kernel"] == kernel


def test_a_class_bank_keeps_64_kilobytes_a_tile_in_flight_three_times():
    plan = info.plan(256, 256, 4096, 1001, **H100)
    assert (plan["tile_refs"], plan["threads"], plan["tile_d"], plan["stages"]) == (8, 512, 4096, 3)
    assert plan["blocks"] == info.DEVICES["h100"].sm_count


def test_float64_is_planned_in_two_passes():
    assert info.plan(256, 256, 4096, 1001, x_dtype=torch.float64, **H100)["kernel"] == "two_pass"


def test_unaligned_references_are_staged_by_plain_loads():
    plan = info.plan(256, 256, 4097, 1001, aligned=False, **H100)
    assert (plan["kernel"], plan["aligned"]) == ("stream", False)


def test_floor_counts_each_class_once_at_most():
    few, many = info.plan(4, 256, 4096, 1001, **H100), info.plan(5000, 256, 4096, 1001, **H100)
    assert few["bytes"] == 4 * 256 * 4096 * 2 + 2 * 4 * 4096 * 4
    assert many["bytes"] == 1001 * 256 * 4096 * 2 + 2 * 5000 * 4096 * 4


@pytest.mark.parametrize("bad", [{"n": -1}, {"m": -1}, {"d": -2}, {"precision": "sloppy"}])
def test_bad_problems_are_errors(bad):
    with pytest.raises(ValueError, match="plan"):
        info.plan(**{"n": 1, "m": 1, "d": 1, **bad}, **H100)

"""The launch planner: every problem gets a plan within the device's limits, and the shapes that matter get theirs."""

import itertools

import pytest
import torch

from stablevelocity_kernels import info

pytestmark = pytest.mark.skipif(info._C is None, reason="the planner needs the compiled extension")

H100 = {"device": "h100"}
KERNELS = ("pool", "held", "swept", "many_rows", "short_rows", "bulk", "stream", "two_pass", "tiled", "small")
SIZES_D = (0, 1, 2, 8, 9, 10, 32, 33, 64, 784, 1000, 4096, 4100, 8192, 16384, 16392, 65537, 2**21)


@pytest.mark.parametrize("d", SIZES_D)
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.float32, torch.float64])
def test_every_plan_is_within_the_limits(d, refs_dtype):
    for n, m, k, source in itertools.product((1, 7, 256, 50_000), (1, 256, 1_000_000), (None, 10), (False, True)):
        aligned = d * refs_dtype.itemsize % 16 == 0
        plan = info.plan(n, m, d, k, refs_dtype=refs_dtype, source=source, aligned=aligned, **H100)
        assert plan["kernel"] in KERNELS
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
    ("sizes", "hopper", "ampere"),
    [
        ((256, 256, 4096, 1001), "bulk", "stream"),
        ((1, 50_000, 4096, None), "bulk", "stream"),
        ((16, 256, 16384, 10), "bulk", "stream"),
        ((16, 256, 65536, 10), "bulk", "two_pass"),
        ((2, 64, 2**20, 2), "bulk", "two_pass"),
        ((2, 64, 2**21, 2), "bulk", "two_pass"),
        ((26, 1_280_000, 4096, None), "pool", "stream"),
        ((256, 256, 4096, None), "held", "tiled"),
        ((256, 1024, 4096, None), "held", "tiled"),
        ((256, 256, 4096, 10), "held", "stream"),
        ((64, 1024, 65_536, None), "swept", "tiled"),
        ((256, 512, 262_144, None), "swept", "two_pass"),
        ((256, 2000, 16_384, None), "swept", "tiled"),
        ((256, 50_000, 3072, None), "many_rows", "tiled"),
        ((4096, 50_000, 4096, None), "many_rows", "tiled"),
        ((16_384, 50_000, 3072, None), "many_rows", "tiled"),
        ((4096, 50_000, 128, None), "short_rows", "tiled"),
        ((10_000, 100_000, 64, None), "short_rows", "tiled"),
        ((10_000, 100_000, 10, None), "small", "small"),
        ((256, 2048, 10, None), "small", "small"),
        ((128, 256, 2, 10), "two_pass", "two_pass"),
    ],
    ids=str,
)
def test_the_shapes_that_matter(sizes, hopper, ampere):
    assert info.plan(*sizes, device="h100")["kernel"] == hopper
    assert info.plan(*sizes, device="h200")["kernel"] == hopper
    assert info.plan(*sizes, device="a100")["kernel"] == ampere


@pytest.mark.parametrize("device", ["h100", "h200", "b200"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [16, 1024, 1032, 2056, 4096, 4104, 20_000, 32_768, 32_776, 65_536, 65_544, 2**20])
def test_blocks_of_the_bulk_kernel_hold_a_sample_between_them(d, refs_dtype, device):
    limits = info.DEVICES[device]
    for n, m, k in itertools.product((1, 7, 256), (1, 256, 50_000), (None, 10)):
        if k is None and n == 256:
            continue  # a pool for many rows has other kernels
        plan = info.plan(n, m, d, k, refs_dtype=refs_dtype, device=device)
        if k is None and plan["kernel"] == "pool":
            continue  # see test_few_rows_beside_a_large_pool
        if plan["kernel"] == "held":
            assert (n, m, k) == (256, 256, 10)
            continue  # see test_small_sets
        if plan["kernel"] == "many_rows":
            assert n == 256
            assert m in (256, 50_000)
            assert k == 10
            continue  # see test_few_classes_beside_many_rows
        slices, slice_ = plan["slices"], plan["slice"]
        assert plan["kernel"] == "bulk"
        assert slices <= limits.sm_count  # a cluster, or blocks that all run at once
        assert slices * slice_ >= d > (slices - 1) * slice_  # and none is without elements
        assert plan["tile_d"] >= slice_  # what the threads of a block hold
        assert slice_ * refs_dtype.itemsize % 16 == 0  # of a copy
        assert plan["stages"] >= 3
        stage = plan["tile_refs"] * slice_ * refs_dtype.itemsize
        assert plan["stages"] * stage < plan["smem_bytes"] <= limits.smem_limit
        assert plan["threads"] % 32 == 0
        assert 0 < plan["threads"] <= 1024
        assert plan["blocks"] % slices == 0
        resident = -(-plan["blocks"] // limits.sm_count)  # per multiprocessor: their shared memory and 1 KB each
        assert resident * (plan["smem_bytes"] + 1024) <= limits.smem_limit + 1024


@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("d", "slices"), [(40_000, 11), (65_536, 16), (131_072, 16), (262_144, 33), (2**20, 132), (2**21, 132)]
)
def test_large_samples_leave_few_multiprocessors_idle(d, slices, device):
    for n, refs_dtype in itertools.product((1, 8, 256), (torch.float16, torch.bfloat16)):
        plan = info.plan(n, 120, d, 16, refs_dtype=refs_dtype, device=device)
        assert plan["slices"] == slices
        assert plan["blocks"] >= 128
        tile = plan["tile_refs"] * plan["slice"] * refs_dtype.itemsize
        assert 24_000 < tile <= 32_768  # enough for one exchange over the team
        assert plan["stages"] * tile > 180_000


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d"), [(2, 4096, 4096), (26, 1_280_000, 4096), (64, 2**31 - 1, 4096), (32, 2**30, 256)]
)
def test_few_rows_beside_a_large_pool(n, m, d, device, precision):
    limits = info.DEVICES[device]
    plan = info.plan(n, m, d, precision=precision, device=device)
    assert plan["kernel"] == "pool"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["blocks"] <= limits.sm_count
    assert plan["blocks"] % plan["slices"] == 0
    assert plan["slices"] * plan["slice"] >= d
    assert plan["stages"] * plan["tile_refs"] * plan["slice"] * 2 < plan["smem_bytes"] <= limits.smem_limit
    assert plan["fast"] is (precision == "fast")


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((1, 1_280_000, 4096), {}),
        ((65, 1_280_000, 1024), {}),
        ((26, 4095, 4096), {}),
        ((26, 1_280_000, 4104), {}),
        ((26, 2**31, 4096), {}),
        ((26, 1_280_000, 304), {}),
        ((26, 1_280_000, 4092), {"aligned": False}),
        ((26, 1_280_000, 4096), {"aligned": False}),
        ((26, 1_280_000, 4096), {"source": True}),
        ((26, 1_280_000, 4096), {"k": 1}),
        ((26, 1_280_000, 4096), {"refs_dtype": torch.bfloat16}),
        ((26, 1_280_000, 4096), {"refs_dtype": torch.float32}),
        ((26, 1_280_000, 4096), {"x_dtype": torch.float64}),
        ((26, 1_280_000, 4096), {"device": "b200"}),
        ((26, 1_280_000, 4096), {"device": "a100"}),
    ],
    ids=str,
)
def test_what_the_pool_kernel_leaves_to_others(sizes, other):
    for precision in ("exact", "fast"):
        assert info.plan(*sizes, **{**H100, "precision": precision, **other})["kernel"] != "pool"


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (256, 256, 4096, 1000),
        (256, 256, 1024, 1000),
        (30, 256, 4096, 1000),
        (4096, 256, 4096, 1000),
        (4096, 2**20, 4096, 2000),
        (256, 1, 4096, 5000),
    ],
)
def test_rows_of_the_null_label_beside_a_class_bank(n, m, d, k, device, precision):
    """Passes for all rows, since the host does not know how many are such; without the announcement nothing is else."""
    usual = info.plan(n, m, d, k, precision=precision, device=device)
    plan = info.plan(n, m, d, k, precision=precision, device=device, null_rows=True)
    differ = {"null_passes", "null_at_once", "workspace_bytes"}
    assert {name for name in plan if plan[name] != usual[name]} == differ
    assert usual["kernel"] == "bulk"
    assert usual["null_passes"] == usual["null_at_once"] == 0
    assert plan["null_passes"] == -(-n // 32)
    assert 0 < plan["null_at_once"] <= plan["null_passes"]
    room = plan["workspace_bytes"] - usual["workspace_bytes"]
    tiles = -(-k * m // 32)
    assert plan["null_at_once"] * 32 * (4 * 4096 + 16 * 4 * d) < room - 8 * tiles < 160 << 20


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((256, 256, 4096), {}),
        ((26, 256, 4096, 1000), {}),
        ((5000, 256, 4096, 1000), {}),
        ((256, 256, 256, 1000), {}),
        ((256, 4, 4096, 1000), {}),
        ((256, 256, 4104, 1000), {}),
        ((256, 2**22, 4096, 512), {}),
        ((256, 2000, 4096, 10), {}),
        ((256, 256, 4092, 1000), {"aligned": False}),
        ((256, 256, 4096, 1000), {"source": True}),
        ((256, 256, 4096, 1000), {"refs_dtype": torch.bfloat16}),
        ((256, 256, 4096, 1000), {"refs_dtype": torch.float32}),
        ((256, 256, 4096, 1000), {"x_dtype": torch.float64}),
        ((256, 256, 4096, 1000), {"device": "b200"}),
        ((256, 256, 4096, 1000), {"device": "a100"}),
    ],
    ids=str,
)
def test_null_rows_that_are_served_as_any_others(sizes, other):
    for precision in ("exact", "fast"):
        options = {**H100, "precision": precision, **other}
        assert info.plan(*sizes, null_rows=True, **options) == info.plan(*sizes, **options)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        *itertools.product((16, 256, 1024), (1, 64, 256, 1001, 2047), (256, 784, 4096), (None,)),
        *itertools.product((64, 256, 512), (256,), (4096,), (10,)),
        (50_000, 256, 3072, None),
        (16, 120, 40_000, None),
        (256, 800, 3080, 3),
    ],
)
def test_small_sets(n, m, d, k, device, refs_dtype, precision):
    """Blocks that all run at once have slices of chunks, which hold the set between them."""
    limits = info.DEVICES[device]
    plan = info.plan(n, m, d, k, refs_dtype=refs_dtype, precision=precision, device=device)
    assert plan["kernel"] == "held"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["smem_bytes"] <= limits.smem_limit
    teams = (k or 1) * -(-m // plan["tile_refs"])
    assert plan["slices"] * plan["slice"] >= d > (plan["slices"] - 1) * plan["slice"]
    assert plan["tile_refs"] % 16 == plan["slice"] % 64 == 0
    assert plan["blocks"] <= limits.sm_count
    assert plan["blocks"] % (teams * plan["slices"]) == 0
    assert 2 * plan["tile_refs"] * plan["slice"] < plan["smem_bytes"]
    assert plan["fast"] is (precision == "fast")


def test_batches_of_small_sets():
    """A narrow group of eight rows more, where it spares a block of the fullest class one of few batches."""
    for dtype, narrow, usual in ((torch.float16, 40, 32), (torch.bfloat16, 24, 16)):
        options = {**H100, "refs_dtype": dtype}
        assert info.plan(256, 256, 4096, 10, **options)["tile_rows"] == narrow
        assert info.plan(128, 256, 4096, 10, **options)["tile_rows"] == usual + 8 * (usual == 16)
        assert info.plan(1024, 1024, 4096, **options)["tile_rows"] == usual


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((15, 256, 4096), {}),
        ((256, 2561, 1024), {}),
        ((256, 257, 4096, 10), {}),
        ((32, 256, 4096, 10), {}),
        ((256, 256, 248), {}),
        ((256, 256, 60_000), {}),
        ((256, 256, 4096), {"source": True}),
        ((256, 256, 4096), {"aligned": False}),
        ((256, 256, 4096), {"refs_dtype": torch.float32}),
        ((256, 256, 4096), {"x_dtype": torch.float64}),
        ((256, 256, 4096), {"device": "b200"}),
        ((256, 256, 4096), {"device": "a100"}),
    ],
    ids=str,
)
def test_what_the_kernel_for_small_sets_leaves_to_others(sizes, other):
    for precision in ("exact", "fast"):
        assert info.plan(*sizes, **{**H100, "precision": precision, **other})["kernel"] != "held"


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        *itertools.product((64, 256, 4096), (300, 1024), (60_000, 65_544, 262_144), (None, 1)),
        (64, 64, 2**20, None),
        (256, 2000, 16_384, None),
        (16, 1024, 65_536, None),
    ],
)
def test_larger_small_sets(n, m, d, k, device, refs_dtype, precision):
    """Slices of samples, of which no block keeps any, and passes of rows that the workspace has room for."""
    limits = info.DEVICES[device]
    plan = info.plan(n, m, d, k, refs_dtype=refs_dtype, precision=precision, device=device)
    assert plan["kernel"] == "swept"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["smem_bytes"] <= limits.smem_limit
    assert plan["blocks"] == limits.sm_count
    assert plan["slices"] * plan["slice"] >= d > (plan["slices"] - 1) * plan["slice"]
    assert plan["slice"] % 64 == 0
    assert 1 <= plan["rows_per_pass"] <= min(n, 1024)
    assert plan["fast"] is (precision == "fast")


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((15, 1024, 65_536), {}),
        ((64, 63, 262_144), {}),
        ((256, 8193, 65_536), {}),
        ((256, 256, 65_536, 10), {}),
        ((256, 256, 4096), {}),
        ((256, 50_000, 4096), {}),
        ((256, 2048, 4096), {}),
        ((256, 1024, 65_536), {"source": True}),
        ((256, 1024, 65_536), {"aligned": False}),
        ((256, 1024, 65_536), {"refs_dtype": torch.float32}),
        ((256, 1024, 65_536), {"x_dtype": torch.float64}),
        ((256, 1024, 65_536), {"device": "b200"}),
        ((256, 1024, 65_536), {"device": "a100"}),
    ],
    ids=str,
)
def test_what_the_kernel_for_larger_small_sets_leaves_to_others(sizes, other):
    for precision in ("exact", "fast"):
        assert info.plan(*sizes, **{**H100, "precision": precision, **other})["kernel"] != "swept"


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    list(itertools.product((65, 256, 4096, 16_384), (8200, 50_000, 2**31 - 1024), (256, 3072, 51_200))),
)
def test_many_rows_beside_a_pool(n, m, d, device, refs_dtype, precision):
    limits = info.DEVICES[device]
    plan = info.plan(n, m, d, refs_dtype=refs_dtype, precision=precision, device=device)
    assert plan["kernel"] == "many_rows"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["smem_bytes"] <= limits.smem_limit
    assert plan["blocks"] <= limits.sm_count
    assert plan["rows_per_pass"] in (128, 256, 512, 768, 1024)  # whole tiles
    assert plan["refs_per_pass"] % plan["tile_refs"] == 0
    assert plan["fast"] is (precision == "fast")


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (27, 50_000, 3072, None),
        (256, 50_000, 3072, None),
        (1024, 50_000, 3072, None),
        (4096, 50_000, 1024, None),
        (4096, 50_000, 264, None),
        (16_384, 50_000, 3080, None),
        (128, 2**31 - 1024, 4096, None),
        (256, 50_000, 25_600, None),
        (256, 5000, 3072, 10),
        (1024, 5000, 3072, 10),
        (100, 5000, 4096, 1),
    ],
)
def test_many_rows_beside_float32(n, m, d, k, device, precision):
    """The halves of a round's references are in the workspace, which stays bounded."""
    limits = info.DEVICES[device]
    plan = info.plan(n, m, d, k, refs_dtype=torch.float32, precision=precision, device=device)
    assert plan["kernel"] == "many_rows"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["smem_bytes"] <= limits.smem_limit
    assert plan["refs_per_pass"] % plan["tile_refs"] == 0
    padded = -(-d // 128) * 128
    taken = plan["refs_per_pass"] * (4 * padded + 4) + 17 * plan["refs_per_pass"] * plan["rows_per_pass"] // 4
    assert taken < plan["workspace_bytes"]
    assert plan["bytes"] == 4 * (k or 1) * m * d + 8 * n * d


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((26, 50_000, 4096), {}),
        ((256, 50_000, 4096), {"source": True}),
        ((256, 2047, 4096), {}),
        ((256, 50_000, 248), {}),
        ((256, 50_000, 51_208), {}),
        ((256, 2**31 - 1023, 4096), {}),
        ((256, 50_000, 4100), {"aligned": False}),
        ((256, 50_000, 4096), {"aligned": False}),
        ((256, 50_000, 4096), {"x_dtype": torch.float64}),
        ((256, 50_000, 4096), {"device": "b200"}),
        ((256, 50_000, 4096), {"device": "a100"}),
        ((26, 50_000, 4096), {"refs_dtype": torch.float32}),
        ((256, 2047, 4096), {"refs_dtype": torch.float32}),
        ((65, 2568, 256), {"refs_dtype": torch.float32}),  # sooner done by units
        ((256, 50_000, 120), {"refs_dtype": torch.float32}),
        ((256, 50_000, 25_608), {"refs_dtype": torch.float32}),
        ((256, 50_000, 3076), {"refs_dtype": torch.float32}),  # a half of eight elements is no 16 bytes
        ((256, 50_000, 3072), {"refs_dtype": torch.float32, "aligned": False}),
        ((256, 50_000, 3072), {"refs_dtype": torch.float32, "source": True}),
        ((256, 50_000, 3072), {"refs_dtype": torch.float32, "device": "a100"}),
    ],
    ids=str,
)
def test_what_the_kernel_for_many_rows_leaves_to_others(sizes, other):
    assert info.plan(*sizes, **{**H100, **other})["kernel"] != "many_rows"


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (256, 5000, 3072, 10),
        (1024, 5000, 3072, 10),
        (128, 50_000, 3072, 10),
        (256, 5000, 4096, 1),
        (100, 5000, 4096, 1),
        (256, 6000, 1536, 10),
        (16_384, 128_000, 4096, 10),
        (256, 256, 40_000, 16),
        (256, 56, 32_776, 37),
    ],
)
def test_few_classes_beside_many_rows(n, m, d, k, device, refs_dtype, precision):
    limits, options = info.DEVICES[device], {"refs_dtype": refs_dtype, "precision": precision, "device": device}
    plan = info.plan(n, m, d, k, **options)
    assert plan["kernel"] == "many_rows"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["smem_bytes"] <= limits.smem_limit - 64  # and its barriers
    assert plan["refs_per_pass"] % plan["tile_refs"] == 0
    pool = info.plan(n, k * m, d, **options)
    same = ("rows_per_pass", "refs_per_pass", "blocks", "fast")
    assert [plan[name] for name in same] == [pool[name] for name in same]
    assert (plan["bytes"], plan["flops"]) == (min(n, k) * m * d * 2 + 8 * n * d, 4 * n * m * d)


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((256, 5000, 3072, 129), {}),  # more classes than it counts
        ((256, 1000, 3072, 100), {}),  # too many to read all of them for every row
        ((512, 1000, 3072, 50), {}),
        ((1024, 1000, 2048, 50), {}),
        ((1024, 1000, 3072, 100), {}),
        ((256, 256, 4096, 10), {}),  # in the L2
        ((32, 5000, 3072, 10), {}),
        ((26, 5000, 4096, 1), {}),
        ((256, 204, 3072, 10), {}),
        ((256, 5000, 248, 10), {}),
        ((256, 5000, 51_208, 10), {}),
        ((256, 2**29, 4096, 4), {}),
        ((256, 5000, 3072, 10), {"source": True}),
        ((256, 5000, 3072, 10), {"aligned": False}),
        ((256, 5000, 3076, 10), {"refs_dtype": torch.float32}),
        ((64, 256, 1024, 10), {"refs_dtype": torch.float32}),
        ((256, 5000, 3072, 10), {"x_dtype": torch.float64}),
        ((256, 5000, 3072, 10), {"device": "b200"}),
        ((256, 5000, 3072, 10), {"device": "a100"}),
    ],
    ids=str,
)
def test_class_banks_that_many_rows_leave_to_others(sizes, other):
    assert info.plan(*sizes, **{**H100, **other})["kernel"] != "many_rows"


@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 256, 512, 520, 1024, 1032, 2048, 2056, 4096, 4104, 8192, 16_384])
def test_class_banks_of_two_bytes_are_on_the_matrix_units(d, refs_dtype):
    sizes, options = (256, 256, d), {"refs_dtype": refs_dtype, "device": "h100"}
    for precision in ("exact", "fast"):
        plan = info.plan(*sizes, 1001, precision=precision, **options)
        assert plan["products"]
        assert plan["stages"] >= 3  # one tile is added while another is scored and the next comes
        assert plan["smem_bytes"] <= info.DEVICES["h100"].smem_limit
    others = [
        info.plan(*sizes, 1001, refs_dtype=torch.float32, device="h100"),
        info.plan(1, 256, d, **options),
        info.plan(*sizes, 1001, refs_dtype=refs_dtype, device="a100"),
        info.plan(256, 256, 32, 1001, **options),
    ]
    assert not any(plan["products"] for plan in others)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [
        *itertools.product((256, 4096, 100_000), (2048, 50_000, 2**31 - 1), (33, 64, 65, 128, 200, 255)),
        (128, 50_000, 48),
        (9000, 64, 128),
    ],
)
def test_many_short_rows_beside_a_pool(n, m, d, device, refs_dtype, precision):
    aligned = d * refs_dtype.itemsize % 16 == 0
    plan = info.plan(n, m, d, refs_dtype=refs_dtype, precision=precision, aligned=aligned, device=device)
    assert plan["kernel"] == "short_rows"
    assert plan["workspace_bytes"] < 256 << 20
    assert plan["smem_bytes"] <= info.DEVICES[device].smem_limit - 256  # and its barriers
    assert plan["rows_per_pass"] % plan["tile_rows"] == 0
    assert plan["refs_per_pass"] % plan["tile_refs"] == 0
    assert plan["blocks"] == plan["rows_per_pass"] // plan["tile_rows"] * plan["splits"]
    assert plan["fast"] == (precision == "fast")


def test_short_rows_fill_the_device():
    for n in (128, 256, 1000, 4096, 10_000):
        plan = info.plan(n, 50_000, 128, **H100)
        waves = plan["blocks"] / 132
        assert waves / -(-plan["blocks"] // 132) > 0.9


@pytest.mark.parametrize(
    ("sizes", "other"),
    [
        ((26, 50_000, 128), {}),
        ((256, 1000, 128), {}),  # few scores
        ((10_000, 63, 128), {}),
        ((256, 50_000, 32), {}),
        ((256, 50_000, 264), {"refs_dtype": torch.float32}),
        ((256, 50_000, 256), {}),  # the kernel for many rows has it
        ((64, 200_000, 128), {"precision": "fast"}),  # and the pool kernel this
        ((256, 5000, 128, 10), {}),
        ((256, 50_000, 128), {"x_dtype": torch.float64}),
        ((256, 50_000, 128), {"device": "b200"}),
        ((256, 50_000, 128), {"device": "a100"}),
    ],
    ids=str,
)
def test_what_the_kernel_for_short_rows_leaves_to_others(sizes, other):
    assert info.plan(*sizes, **{**H100, **other})["kernel"] != "short_rows"


@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_blocks_share_a_multiprocessor_where_samples_are_short(device, refs_dtype):
    limits = info.DEVICES[device]
    for n, d, k in itertools.product((9, 256, 257, 2048), (40, 264, 512, 520, 1024), (13, 1001, 1024)):
        plan = info.plan(n, 200, d, k, refs_dtype=refs_dtype, device=device)
        assert plan["products"]
        assert plan["blocks"] == 2 * limits.sm_count
        assert 2 * (plan["smem_bytes"] + 1024) <= limits.smem_limit + 1024
        assert 2 * plan["threads"] * 80 <= 65_536  # registers
    assert info.plan(256, 256, 2048, 1001, device=device)["blocks"] == limits.sm_count


@pytest.mark.parametrize("device", ["h100", "h200"])
@pytest.mark.parametrize(("n", "d", "blocks"), [(256, 8192, 2), (256, 16_384, 4), (256, 32_768, 8)])
def test_samples_of_more_elements_than_a_block_holds_have_clusters(n, d, blocks, device):
    plan = info.plan(n, 256, d, 101, device=device)
    assert plan["products"]
    assert (plan["slices"], plan["slice"]) == (blocks, 4096)


def test_what_the_clusters_leave_to_others():
    """What eight blocks do not hold."""
    assert not info.plan(8, 256, 32_776, 101, device="h100")["products"]
    assert not info.plan(8, 256, 65_544, 101, device="h100")["products"]


@pytest.mark.parametrize(("m", "rows"), [(20_000, 1024), (50_000, 512), (200_000, 1024)])
def test_a_pass_of_many_rows_holds_all_scores_if_half_the_rows_can(m, rows):
    plan = info.plan(4096, m, 4096, **H100)
    assert plan["rows_per_pass"] == rows
    assert (plan["refs_per_pass"] >= m) == (m < 200_000)


def test_every_multiprocessor_has_a_part_of_a_class_bank():
    for d in (1024, 4096):
        plan = info.plan(256, 256, d, 1001, **H100)
        assert plan["blocks"] >= info.DEVICES["h100"].sm_count
        in_flight = plan["stages"] * plan["tile_refs"] * d * 2 * plan["blocks"] / info.DEVICES["h100"].sm_count
        assert in_flight > 64 << 10  # twice what latency times bandwidth asks of one multiprocessor


@pytest.mark.parametrize(
    ("n", "d", "k", "rows"),
    [
        (256, 4096, 1001, 2),
        (257, 4096, 1001, 4),
        (2048, 2048, 1001, 4),
        (256, 4096, 128, 4),
        (256, 4096, 320, 4),
        (256, 4096, 350, 2),
        (257, 1024, 1001, 2),
        (2048, 1024, 1001, 4),
        (256, 1024, 32, 4),
        (256, 1024, 100, 2),
        (2048, 8192, 1001, 2),
        (100, 4096, 11, 2),
    ],
)
def test_many_rows_of_class_banks_share_a_pass_by_four(n, d, k, rows):
    plan = info.plan(n, 256, d, k, **H100)
    assert plan["products"]
    assert plan["tile_rows"] == rows
    assert info.plan(n, 256, d, k, refs_dtype=torch.bfloat16, **H100)["tile_rows"] == 2


@pytest.mark.parametrize(
    ("n", "m", "d", "k", "rows"),
    [
        (256, 1000, 4096, 501, 4),
        (256, 512, 4096, 501, 4),
        (256, 512, 4096, 1001, 2),
        (64, 4096, 4096, 65, 4),
        (32, 4096, 4096, 17, 2),
        (64, 256, 4096, 17, 2),
        (256, 1000, 2048, 201, 4),
        (256, 1024, 2048, 501, 2),
    ],
)
def test_rows_of_long_classes_share_a_pass_by_four(n, m, d, k, rows):
    """Where reading a class again costs more than such units do, and the list of units leaves them room."""
    plan = info.plan(n, m, d, k, **H100)
    assert plan["products"]
    assert (plan["tile_rows"], plan["deal"]) == (rows, rows == 4)
    assert plan["smem_bytes"] <= info.DEVICES["h100"].smem_limit


def test_before_hopper_a_class_bank_keeps_64_kilobytes_a_tile_in_flight_twice():
    plan = info.plan(256, 256, 4096, 1001, device="a100")
    assert (plan["tile_refs"], plan["threads"], plan["tile_d"], plan["stages"]) == (8, 512, 4096, 2)
    assert plan["blocks"] == info.DEVICES["a100"].sm_count


@pytest.mark.parametrize(
    ("n", "m", "d"), list(itertools.product((64, 256, 10_000, 10**6), (1, 2048, 100_000, 10**8), (9, 10, 13, 16)))
)
def test_small_samples_are_cut_into_parts_that_fit(n, m, d):
    """One round over the references at any size; the blocks and the workspace stay bounded, on small devices too."""
    for device in info.DEVICES:
        plan = info.plan(n, m, d, refs_dtype=torch.float32, device=device)
        assert (plan["kernel"], plan["wide"]) == ("small", False)
        assert plan["refs_per_pass"] >= m
        assert plan["splits"] < 65_536  # a grid's second dimension
        assert 0 < plan["smem_bytes"] <= info.DEVICES[device].smem_limit
        assert plan["workspace_bytes"] < 256 << 20


def test_a_few_small_rows_take_small_blocks():
    assert info.plan(256, 2048, 10, refs_dtype=torch.float32, **H100)["threads"] == 128
    assert info.plan(10_000, 100_000, 10, refs_dtype=torch.float32, **H100)["threads"] == 512


def test_float64_is_planned_in_two_passes():
    assert info.plan(256, 256, 4096, 1001, x_dtype=torch.float64, **H100)["kernel"] == "two_pass"


def test_unaligned_references_are_staged_by_plain_loads():
    plan = info.plan(256, 256, 4097, 1001, aligned=False, **H100)
    assert (plan["kernel"], plan["aligned"]) == ("stream", False)


def test_a_kernel_can_be_asked_for(monkeypatch):
    sizes = (256, 1000, 1024, 10)
    assert info.plan(*sizes, **H100)["kernel"] == "bulk"
    monkeypatch.setenv("SVEL_KERNEL", "many_rows")
    assert info.plan(*sizes, **H100)["kernel"] == "many_rows"
    assert info.plan(8, *sizes[1:], **H100)["kernel"] == "bulk"  # where it cannot serve
    monkeypatch.setenv("SVEL_KERNEL", "abacus")
    with pytest.raises(ValueError, match=r"SVEL_KERNEL: expected one of .*many_rows.*, got 'abacus'"):
        info.plan(*sizes, **H100)


def test_floor_counts_each_class_once_at_most():
    few, many = info.plan(4, 256, 4096, 1001, **H100), info.plan(5000, 256, 4096, 1001, **H100)
    assert few["bytes"] == 4 * 256 * 4096 * 2 + 2 * 4 * 4096 * 4
    assert many["bytes"] == 1001 * 256 * 4096 * 2 + 2 * 5000 * 4096 * 4


@pytest.mark.parametrize("bad", [{"n": -1}, {"m": -1}, {"d": -2}, {"precision": "sloppy"}])
def test_bad_problems_are_errors(bad):
    with pytest.raises(ValueError, match="plan"):
        info.plan(**{"n": 1, "m": 1, "d": 1, **bad}, **H100)


def shares_of_units(rng, deal, teams):
    """Of a random list of units: (team, unit, from, to, last) in order, tiles, what is told."""

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=rng)

    n = int(draw(1, 300))
    together = int(draw(0, n + 1)) if deal else 0
    tiles, rows = draw(1, int(draw(2, 200)), (n,)), draw(1, 3, (n,))
    if int(draw(0, 2)):  # of one class, as many tiles each
        tiles[:together] = tiles[0]
    costs = {"two": int(draw(8, 17)), "four": 24, "row": int(draw(0, 65)), "unit": int(draw(0, 60))}
    given = {"tiles": tiles.tolist(), "rows": rows.tolist(), "together": together, **costs}
    shares, told = info._C.unit_shares(**given, deal=deal, teams=teams)
    return shares, tiles.tolist(), told


@pytest.mark.parametrize("teams", [1, 2, 16, 33, 66, 132])
@pytest.mark.parametrize("deal", [False, True])
def test_teams_share_all_tiles_of_a_list(rng, deal, teams):
    for _ in range(200):
        shares, tiles, told = shares_of_units(rng, deal, teams)
        parts = {}
        for team, unit, begin, end, _last in shares:
            assert 0 <= begin < end <= tiles[unit]
            parts.setdefault(unit, []).append((begin, end, team))
        assert set(parts) == set(range(len(tiles)))
        for unit, of_unit in parts.items():
            of_unit.sort()
            starts, ends, by = zip(*of_unit, strict=True)
            assert starts[0] == 0
            assert ends == (*starts[1:], tiles[unit])
            assert list(by) == list(range(by[0], by[0] + len(by)))  # teams that follow one another
            if len(by) > 1:
                assert told[unit] == (by[0], by[-1])
        for team in {share[0] for share in shares}:  # of parts that others have too one is not the team's last
            assert sum(begin > 0 for of, _, begin, *_ in shares if of == team) <= 1  # room for one that began earlier
            of_team = [(len(parts[unit]) > 1, last) for of, unit, *_, last in shares if of == team]
            assert not any(last for _, last in of_team[:-1])
            assert sum(cut and not last for cut, last in of_team) <= 1


def test_units_of_one_class_are_read_at_the_same_time():
    """A tenth of 256 rows has one class of 64 tiles: a third of 132 teams begin with its units, one each."""
    rows = [2] * 13 + [1] * 230
    given = {"tiles": [64] * len(rows), "rows": rows, "two": 8, "four": 8, "row": 4, "unit": 18}
    shares, _ = info._C.unit_shares(**given, together=13, deal=True, teams=132)
    first = {}
    for team, unit, begin, end, _ in shares:
        first.setdefault(team, (unit, begin, end))
    assert [first[team] for team in range(13)] == [(unit, 0, 64) for unit in range(13)]
    costs = [0] * 132
    for team, unit, begin, end, _ in shares:
        costs[team] += 8 * (end - begin) + (18 + 4 * rows[unit] if end == 64 else 0)
    assert max(costs) - min(costs) <= 8 * 2 + 26  # by a unit's end and a tile at either side

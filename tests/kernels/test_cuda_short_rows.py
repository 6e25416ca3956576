"""The kernel of many rows against one pool of short samples: every path through it, edges and arguments."""

import math

import pytest
import torch
from cuda_cases import (
    GEOMETRIES,
    assert_served,
    check_graph_of_pool,
    check_mean_and_lse,
    check_merged_halves,
    check_pool,
    check_repeats,
    invalidate,
    kernels_run,
    make_crowds,
    make_large_pool,
    make_photograph_pool,
    make_pool,
    make_pool_of_size,
    on_two_streams,
    served_by,
    worst_row,
)
from kernel_cases import between, largest_logit, offset_by_one, with_gaps

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
prefer = served_by("short_rows")
# Rows: tiles of 128 whole and cut, the second half without rows. References: whole tiles and not, one tile and less for
# each part. D: one to four panels of 64, whole and cut, with and without loads of eight elements.
SHAPES = [
    (27, 20_011, 128),
    (64, 8192, 64),
    (65, 9001, 40),
    (127, 5003, 33),
    (128, 4096, 128),
    (129, 4099, 100),
    (256, 3001, 192),
    (300, 2600, 200),
    (1025, 700, 250),
    (4100, 129, 65),
    (9000, 64, 72),
]
SHAPE = (300, 4999, 120)
WIDE = (300, 4999, 200)
PRECISIONS = ("exact", "fast")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LIMIT = TOLERANCE[torch.float32, "exact"]


def check(x, refs, t, *args, precision="exact", **options):
    """`check_pool`, by this kernel."""
    assert_served("short_rows", x, refs, precision)
    return check_pool(x, refs, t, *args, precision=precision, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_shapes(rng, n, m, d, geometry, dtype, precision):
    check(*make_pool(n, m, d, geometry, rng, dtype=dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_float32_of_256_elements(rng, geometry, precision):
    check(*make_pool(300, 4999, 256, geometry, rng, dtype=torch.float32), precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.98, 0.999])
@pytest.mark.parametrize(("n", "side"), [(256, 4), (300, 8)])
def test_photographs_at_one_time(rng, n, side, time, dtype):
    """Smooth pieces, many of them near one another, off alike: up to t = 0.3 most rows are evaluated again."""
    x, refs, t = make_photograph_pool(n, 20_000, side, rng, dtype, times=(time,))
    check(x, refs, t)
    check(x, refs, t, precision="fast")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.05, 0.2, 0.5, 0.8, 0.95, 0.999])
@pytest.mark.parametrize("d", [48, 128, 256])
def test_one_time_for_all_rows(rng, d, time, geometry):
    check(*make_pool(300, 8200, d, geometry, rng, times=(time,), dtype=torch.float32))


def make_ties(n, m, d, dtype=torch.float16, copies=1):
    """Rows between two references each, and their times."""
    torch.manual_seed(0)
    refs = torch.randn(m // copies, d, device="cuda").to(dtype)
    t = torch.tensor([0.05, 0.2, 0.35, 0.5, 0.7], device="cuda").repeat(n // 5)
    first = torch.randint(len(refs), (n,), device="cuda")
    second = (first + torch.randint(1, len(refs), (n,), device="cuda")) % len(refs)
    x = between(refs[first], refs[second], (1 - t[:, None]).double(), t[:, None].double())
    return x, refs.repeat(copies, 1)[torch.randperm(len(refs) * copies, device="cuda")].contiguous(), t


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("copies", [1, 8, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [33, 64, 128, 200])
def test_near_ties(d, dtype, copies, precision):
    """With copies of all references too: they are off alike."""
    x, refs, t = make_ties(400, 6000, d, dtype, copies)
    assert_served("short_rows", x, refs, precision)
    limit = TOLERANCE[torch.float32, precision]
    for options in ({}, {"prediction": "x0"}):
        out = svel.stable_target(x, refs, t, precision=precision, **options)
        assert worst_row(out, reference.stable_target(x.double(), refs, t, **options)) <= limit


@pytest.mark.parametrize("d", [40, 128, 250])
@pytest.mark.parametrize(("n", "m"), [(30, 20_000), (200, 3001), (5000, 700)])
def test_rows_in_doubt(n, m, d):
    """They are evaluated again: groups of eight, whole and cut, by many blocks each; more groups than blocks."""
    x, refs, t = make_ties(n, m, d)
    assert_served("short_rows", x, refs, "exact")
    counts = torch.tensor([m - 100], device="cuda")
    source = refs[torch.randint(m, (n,), device="cuda")].float()
    source[::2] = (x / (1 - t[:, None]))[::2]
    for own in (None, source):
        wide = None if own is None else own.double()
        expected, expected_lse = reference.posterior_mean(x.double(), refs, 1 - t, t, None, counts, wide)
        mean, lse = svel.posterior_mean(x, invalidate(refs, m - 100), 1 - t, t, None, counts, own)
        assert worst_row(mean, expected) <= LIMIT
        assert ((lse - expected_lse).abs() <= LIMIT * largest_logit(x, refs, 1 - t, t)).all()
        out = svel.stable_target(x, refs, t, None, counts, own)
        assert worst_row(out, reference.stable_target(x.double(), refs, t, None, counts, wide)) <= LIMIT
        assert torch.equal(svel.stable_target(x, refs, t, None, counts, own), out)


@pytest.mark.parametrize("d", [64, 250])
def test_crowds_about_two_points(rng, d):
    check(*make_crowds(128, 6000, d, rng, (0.02, 0.05, 0.1, 0.3)))


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    names = kernels_run(svel.stable_target, *make_pool(*SHAPE, "gaussian", rng))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("weigh_kernel" in name and "Short" in name for name in names), names


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path):
    check(*make_pool(*SHAPE, "manifold", rng), prediction=prediction, path=path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [-3, 0, 1, 63, 64, 65, 128, 500, 4994, 4999, 6000])
@pytest.mark.parametrize("shape", [SHAPE, WIDE])
def test_counts(rng, shape, count, dtype):
    x, refs, t = make_pool(*shape, "manifold", rng)
    out = check(x, invalidate(refs, count), t, torch.tensor([count], dtype=dtype, device="cuda"))
    assert out.isnan().all() == (count <= 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("count", [0, 700, 4999])
def test_a_source_is_one_more_reference_of_its_row(rng, count, geometry, precision):
    """Near x, far away, and among weights that are spread."""
    x, refs, t = make_pool(*SHAPE, geometry, rng)
    source = refs[torch.randperm(len(refs), generator=rng)[: len(x)].cuda()].float()
    source[::3] = (x / (1 - t[:, None]).clamp_min(0.05))[::3]
    source[5, 7] = math.nan
    counts = torch.tensor([count], device="cuda")
    check(x, invalidate(refs, count), t, counts, source, precision=precision)


def test_rows_that_are_not_finite_stay_alone(rng):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
    n = len(x)
    x[3, 5], x[9, 0], x[n - 1, -1], t[4] = math.nan, math.inf, -math.inf, math.nan
    out = check(x, refs, t)
    assert out.isnan().all(1).nonzero()[:, 0].tolist() == [3, 4, 9, n - 1]
    assert svel.stable_target(x, refs, t * math.nan).isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-6, 3e3])
def test_data_of_any_size(rng, size, precision):
    check(*make_pool_of_size(*SHAPE, size, rng), precision=precision)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_float32_of_any_size(rng, size):
    """A reference far larger than the others leaves them their digits."""
    refs = size * torch.randn(5000, 120, generator=rng)
    refs[77] *= 1e3
    t = torch.tensor([0.3, 0.9]).repeat(150)
    x = (1 - t[:, None]) * refs[:300] + size * t[:, None] * torch.randn(300, 120, generator=rng)
    check(x.cuda(), refs.cuda(), t.cuda())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_dtype_and_alignment(rng, dtype):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
    check(x.to(dtype), refs, t)
    out = svel.stable_target(x, refs, t)
    assert torch.equal(svel.stable_target(offset_by_one(x), refs, t), out)
    assert torch.equal(svel.stable_target(x, offset_by_one(refs), t), out)
    assert torch.equal(svel.stable_target(with_gaps(x), with_gaps(refs), t), out)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_and_lse(rng, dtype, precision):
    x, refs, sigma = make_pool(*SHAPE, "gaussian", rng, times=(0.5, 0.8, 0.95), dtype=dtype)
    for left_out in (0, 700):
        check_mean_and_lse(x.clone(), refs, sigma.clone(), precision, left_out)


@pytest.mark.parametrize("op", ["posterior_mean", "posterior_part"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.5, 0.9, 0.98, 0.998])
def test_lse_merges_over_disjoint_halves(rng, time, geometry, op):
    x, refs, sigma = make_pool(130, 10_007, 120, geometry, rng, times=(time,))
    limit = TOLERANCE[torch.float32, "exact" if op == "posterior_part" else "fast"]
    check_merged_halves(getattr(svel, op), x, refs, sigma, 4997, limit)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_repeats_bit_for_bit(rng, geometry):
    """Rows in doubt too, whose order changes."""
    x, refs, t = make_pool(400, 8009, 128, geometry, rng)
    check_repeats(x, refs, t)


def test_nothing_waits_and_a_graph_follows_its_inputs(rng):
    def problem(geometry, count):
        return [*make_pool(*SHAPE, geometry, rng), torch.tensor([count], device="cuda")]

    others = (("shifted", 4999), ("gaussian", 4999), ("manifold", 17), ("shifted", 0))
    check_graph_of_pool(problem("manifold", 4000), (problem(*other) for other in others))


def test_two_streams_at_once(rng):
    problems = [make_pool(130, 6007, 64, "manifold", rng), make_pool(300, 5003, 200, "gaussian", rng)]
    for out, right in on_two_streams(svel.stable_target, problems):
        assert torch.equal(out, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(200, 700_001, 128), (70_001, 4000, 250)], ids=["rounds", "passes"])
def test_large(n, m, d, dtype):
    """References in several rounds, rows in several passes; the workspace stays bounded."""
    x, refs, t = make_large_pool(n, m, d)
    refs = refs.to(dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = svel.stable_target(x, refs, t)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < 256 << 20
    rows = torch.arange(0, n, max(1, n // 500), device="cuda")
    expected = reference.stable_target(x[rows].double(), refs, t[rows])
    for time in t[rows].unique():
        own = t[rows] == time
        assert relative_error(out[rows][own], expected[own]) <= LIMIT


def test_problems_that_others_serve(rng):
    x, refs, t = make_pool(300, 4999, 128, "manifold", rng)
    expected = reference.stable_target(x.double(), refs, t)
    for out in (
        svel.stable_target(x[:20], refs, t[:20]),
        svel.stable_target(x, refs[None], t, torch.zeros(300, dtype=torch.int64, device="cuda")),
        svel.stable_target(x.double(), refs.double(), t.double()),
    ):
        assert relative_error(out, expected[: len(out)]) <= LIMIT
    small = make_references(50, 128, "gaussian", rng).cuda()
    assert relative_error(svel.stable_target(x, small, t), reference.stable_target(x.double(), small, t)) <= LIMIT
    assert svel.stable_target(x[:0], refs, t[:0]).shape == (0, 128)

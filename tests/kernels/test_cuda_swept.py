"""The kernel of pools that shared memories do not hold: read twice, in tiles of rows, references and elements."""

import math

import pytest
import torch
from cuda_cases import (
    GEOMETRIES,
    assert_close_at_each_time,
    assert_served,
    check_graph_of_pool,
    check_pool,
    check_repeats,
    invalidate,
    kernels_run,
    make_photograph_pool,
    make_pool,
    on_two_streams,
    served_by,
    worst_row,
)
from kernel_cases import ALL_T, between, largest_logit, offset_by_one

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE, make_noisy, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
prefer = served_by("swept")
# Rows, references, D. Tiles of rows, of references and of D that are whole and cut; slices too; fewer units than blocks
# and several rounds of them. The last: several passes.
SHAPES = [
    (64, 1024, 65_536),
    (256, 515, 32_776),
    (77, 300, 65_544),
    (33, 1031, 20_008),
    (300, 2000, 8200),
    (130, 64, 262_152),
    (1100, 200, 66_000),
]
SHORT = (130, 515, 30_008)
PRECISIONS = ("exact", "fast")
DTYPES = (torch.float16, torch.bfloat16)


def check(x, refs, t, precision="exact", **options):
    assert_served("swept", x, refs, precision)
    return check_pool(x, refs, t, precision=precision, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(rng, shape, geometry, dtype, precision):
    check(*make_pool(*shape, geometry, rng, dtype=dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16, 33, 47, 48, 49, 64, 65, 96, 97, 127, 128, 129, 192, 193, 300])
def test_rows_of_any_number(rng, rows, dtype, precision):
    """Tiles of rows that are full, half full and all but empty; of sums as many as blocks, fewer and more."""
    for m, d in ((200, 16_648), (130, 34_824), (65, 1032)):
        check(*make_pool(rows, m, d, "gaussian", rng, dtype=dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.05, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_rows_of_other_samples(rng, time, geometry, dtype, precision):
    """Not of the set: several references that are far from one another may be near their best."""
    n, m, d = SHORT
    refs, t = make_references(n + m, d, geometry, rng), torch.full((n,), time)
    check(make_noisy(refs[:n], t, rng).cuda(), refs[n:].to(dtype).cuda(), t.cuda(), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 17, 64, 256, 257, 500, 515])
def test_a_pool_partly_filled(rng, count, dtype, precision):
    x, refs, t = make_pool(*SHORT, "shifted", rng, dtype=dtype)
    for kind in (torch.int32, torch.int64):
        counts = torch.tensor([count], dtype=kind, device="cuda")
        out = check(x, invalidate(refs, count), t, counts=counts, precision=precision)
        assert out.isnan().all() == (count == 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.02, 0.05, 0.2, 0.5, 0.8, 0.95, 0.98, 0.999])
def test_one_time_for_all_rows(rng, time, geometry, precision):
    check(*make_pool(*SHORT, geometry, rng, times=(time,)), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_photographs(rng, dtype, precision):
    check(*make_photograph_pool(128, 1000, 80, rng, dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_class(rng, precision):
    """Labels of a bank of one class: rows of it, of all classes and of none."""
    x, refs, t = make_pool(*SHORT, "manifold", rng)
    labels = torch.arange(len(x), device="cuda") % 3 - 1
    assert_served("swept", x, refs[None], precision)
    out = svel.stable_target(x, refs[None], t, labels, precision=precision)
    expected = reference.stable_target(x.double(), refs[None], t, labels)
    assert_close_at_each_time(out, expected, t, precision)
    assert torch.equal(out.isnan().all(1), labels == 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("times", [ALL_T, (0.97,), (0.3,)], ids=str)
def test_references_and_rows_that_are_not_finite(rng, times, precision):
    x, refs, t = make_pool(*SHORT, "gaussian", rng, times=times)
    x[3, 29_000], x[4, 5], t[5] = math.nan, math.inf, math.nan
    out = check(x, refs, t, precision)
    assert out.isnan().any(1).sum() == 3
    refs[100, 29_999] = math.inf
    assert check(x, refs, t, precision).isnan().all()
    assert not check(x[6:], refs, t[6:], precision, counts=torch.tensor([100], device="cuda")).isnan().any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_of_any_size(rng, size, dtype, precision):
    x, refs, t = make_pool(*SHORT, "gaussian", rng, times=(0.5, 0.97))
    check(x * size, (refs.float() * size).to(dtype), t, precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [1, 5])
def test_rows_between_two_references(rng, copies, dtype):
    """Their weights depend on the last digits of scores; copies of a sample tie."""
    n, m, d = SHORT
    own = m // copies
    refs, first = torch.randn(own, d, generator=rng).to(dtype), torch.randint(own // 2, (n,), generator=rng)
    t = torch.tensor([0.05, 0.2, 0.35, 0.5, 0.9])[torch.arange(n) % 5]
    sigma = t[:, None].double()
    x = between(refs[first], refs[first + own // 2], 1 - sigma, sigma)
    refs = refs.repeat(copies, 1)[torch.randperm(own * copies, generator=rng)].contiguous()
    x, refs, t = x.cuda(), refs.cuda(), t.cuda()
    assert_served("swept", x, refs, "exact")
    for options in ({}, {"prediction": "x0"}):
        out = svel.stable_target(x, refs, t, **options)
        expected = reference.stable_target(x.double(), refs, t, **options)
        assert worst_row(out, expected) <= TOLERANCE[torch.float32, "exact"]
        out = check(x, refs, t, "fast", **options)
        assert worst_row(out, expected) <= 3e-3  # a single row may be off by 2e-3, at small t


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_and_lse(rng, dtype, precision):
    """Any alpha: below zero, zero and NaN too."""
    x, refs, sigma = make_pool(*SHORT, "manifold", rng, times=(0.5, 0.8, 0.95), dtype=dtype)
    alpha, counts = 1 - sigma, torch.tensor([500], device="cuda")
    alpha[2], alpha[3], sigma[4] = 0, math.nan, math.nan
    alpha[10:] *= -1
    x[10:] *= -1
    assert_served("swept", x, refs, precision)
    mean, lse = svel.posterior_mean(x, refs, alpha, sigma, None, counts, precision=precision)
    expected_mean, expected = reference.posterior_mean(x.double(), refs, alpha, sigma, None, counts)
    assert torch.equal(lse.isnan(), expected.isnan())
    assert torch.equal(mean.isnan(), expected_mean.isnan())
    good = expected.isfinite()
    for value in sigma[good].unique():
        rows = good & (sigma == value)
        assert relative_error(mean[rows], expected_mean[rows]) <= TOLERANCE[torch.float32, precision]
    few = good.nonzero()[:40, 0]
    scale = largest_logit(x[few], refs[:500], alpha[few], sigma[few])
    assert ((lse - expected)[few].abs() <= TOLERANCE[torch.float32, precision] * scale).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path, precision):
    check(*make_pool(*SHORT, "manifold", rng), precision, prediction=prediction, path=path)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_dtype_and_alignment(rng, dtype, precision):
    x, refs, t = make_pool(*SHORT, "manifold", rng)
    check(x.to(dtype), refs, t, precision)
    out = check(offset_by_one(x), refs, t, precision)
    if precision == "exact":
        assert torch.equal(svel.stable_target(x, refs, t), out)


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    names = kernels_run(svel.stable_target, *make_pool(*SHORT, "gaussian", rng))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("swept_kernel" in name for name in names), names


def test_repeats_bit_for_bit(rng):
    x, refs, t = make_pool(*SHORT, "manifold", rng)
    check_repeats(x, refs, t)
    out = svel.stable_target(x, refs, t, precision="fast")
    assert all(torch.equal(svel.stable_target(x, refs, t, precision="fast"), out) for _ in range(5))


def test_two_streams(rng):
    problems = [make_pool(*SHORT, "manifold", rng), make_pool(70, 300, 40_008, "gaussian", rng)]
    for out, expected in on_two_streams(svel.stable_target, problems):
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_nothing_waits_and_a_graph_follows_its_inputs(rng):
    def fresh(geometry, count):
        x, refs, t = make_pool(*SHORT, geometry, rng)
        return [x, invalidate(refs, count), t, torch.tensor([count], device="cuda")]

    others = (("shifted", 400), ("gaussian", 515), ("manifold", 0))
    check_graph_of_pool(fresh("manifold", 515), (fresh(*other) for other in others))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tables_of_references_made_at_hand(rng, precision):
    """References of one element each, so that a result tells where each of them, and each of its parts, went."""
    n, m, d = 64, 512, 32_776
    refs = torch.zeros(m, d, dtype=torch.float16)
    places = torch.randperm(d, generator=rng)[:m]
    refs[torch.arange(m), places] = 64
    picked = torch.randint(m, (n,), generator=rng)
    t = torch.full((n,), 0.3)
    x = 0.7 * refs[picked].float()
    assert_served("swept", x, refs, precision)
    out = svel.stable_target(x.cuda(), refs.cuda(), t.cuda(), prediction="x0", precision=precision)
    assert torch.equal(out.cpu(), refs[picked].float())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_references_apart_in_few_elements(rng, precision):
    """Hundreds share the weight evenly: every reference is in the sums of every row."""
    n, m, d = SHORT
    refs = make_references(m, d, "gaussian", rng).half()
    x = torch.randn(n, d, generator=rng)
    t = torch.full((n,), 0.999)
    check(x.cuda(), refs.cuda(), t.cuda(), precision)

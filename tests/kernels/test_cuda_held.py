"""The kernel of small sets, which shared memories hold: pools and few classes, cut into chunks and slices."""

import math

import pytest
import torch
from cuda_cases import (
    GEOMETRIES,
    assert_close_at_each_time,
    assert_served,
    check_graph_of_classes,
    check_partly_filled,
    draw_rows,
    fill_partly,
    kernels_run,
    make_classes,
    on_two_streams,
    served_by,
    worst_row,
)
from kernel_cases import ALL_T, between, largest_logit, offset_by_one, photographs

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE, make_noisy, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
prefer = served_by("held")
# Rows, classes (None: a pool), references of each, D. Rows: one batch and several, parts of the rows; references: one
# chunk and several, a whole number of sixteen or not; D: slices that are whole and cut. The last: several passes.
SHAPES = [
    (256, 10, 256, 4096),
    (300, 10, 250, 3080),
    (256, None, 256, 4096),
    (200, None, 2000, 4096),
    (77, None, 1000, 3072),
    (1024, None, 515, 776),
    (300, 2, 1031, 1032),
    (500, 12, 57, 4104),
    (300, 4, 57, 8200),
    (2100, None, 256, 1032),
]
CLASSES = (300, 10, 250, 3080)
CHUNKS = (200, 3, 850, 3080)  # classes of several chunks
POOL = (256, None, 1000, 3080)
CASES = [CLASSES, CHUNKS, POOL]
PRECISIONS = ("exact", "fast")
DTYPES = (torch.float16, torch.bfloat16)


def make(n, k, m, d, geometry, rng, dtype=torch.float16, **options):
    """x, refs (k, m, d) or (m, d), t, labels or None."""
    x, refs, t, labels = make_classes(n, k or 1, m, d, geometry, rng, dtype, **options)
    return (x, refs[0], t, None) if k is None else (x, refs, t, labels)


def check(x, refs, t, labels=None, counts=None, precision="exact", **options):
    assert_served("held", x, refs, precision)
    out = svel.stable_target(x, refs, t, labels, counts, precision=precision, **options)
    expected = reference.stable_target(x.double(), refs, t, labels, counts, **options)
    assert_close_at_each_time(out, expected, t, precision)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(rng, shape, geometry, dtype, precision):
    check(*make(*shape, geometry, rng, dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", [s for s in [*SHAPES, CHUNKS] if s[1]], ids=str)
def test_partly_filled(rng, shape, geometry, dtype, precision):
    check_partly_filled(check, shape, geometry, rng, dtype, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("count", [0, 1, 17, 999, 1000])
def test_a_pool_partly_filled(rng, count, precision):
    x, refs, t, _ = make(*POOL, "shifted", rng)
    refs[count:] = math.nan
    x = make_noisy(refs.nan_to_num()[torch.randint(max(count, 1), (len(x),), generator=rng).cuda()].cpu(), t.cpu(), rng)
    out = check(x.cuda(), refs, t, None, torch.tensor([count], device="cuda"), precision)
    assert out.isnan().all() == (count == 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [16, 17, 24, 32, 33, 48, 64, 65, 96, 97, 127, 128, 129, 160, 193, 208, 257])
def test_rows_of_any_number(rng, rows, dtype, precision):
    """Batches and products of them that are full, half full and all but empty."""
    for m, d in ((1000, 3080), (256, 4096), (40, 392)):
        check(*make(rows, None, m, d, "gaussian", rng, dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("largest", [7, 8, 9, 16, 17, 24, 25, 31, 32, 33, 39, 40, 41, 48, 49, 71, 73, 80, 81, 120, 256])
def test_a_class_of_more_rows(rng, largest, dtype, precision):
    """Narrow products, batches with and without; what a row gets depends on no other, wherever it lies."""
    n, k, m, d = 256, 10, 256, 4096
    refs = make_references(k * m, d, "gaussian", rng).view(k, m, d).to(dtype)
    labels, t = torch.arange(n) % (k - 1) + 1, torch.tensor([0.2, 0.6, 0.9])[torch.arange(n) % 3]
    labels[torch.randperm(n, generator=rng)[:largest]] = 0
    x = make_noisy(refs[labels, torch.randint(m, (n,), generator=rng)], t, rng)
    x, refs, t, labels = (v.cuda() for v in (x, refs, t, labels))
    out = check(x, refs, t, labels, precision=precision)
    order = torch.randperm(n, generator=rng).cuda()
    moved = svel.stable_target(x[order], refs, t[order], labels[order], precision=precision)
    assert torch.equal(moved, out[order])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.05, 0.2, 0.3, 0.5, 0.7, 0.9])
def test_rows_of_other_samples(rng, time, geometry, dtype, precision):
    """Not of the set: several references that are far from one another may be near their best."""
    for n, m, d in ((256, 1000, 3080), (256, 1000, 256)):
        refs = make_references(n + m, d, geometry, rng)
        t = torch.full((n,), time)
        x = make_noisy(refs[:n], t, rng)
        check(x.cuda(), refs[n:].to(dtype).cuda(), t.cuda(), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.02, 0.05, 0.2, 0.5, 0.8, 0.95, 0.98, 0.999])
def test_one_time_for_all_rows(rng, time, geometry, precision):
    for shape in CASES:
        check(*make(*shape, geometry, rng, times=(time,)), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_photographs(rng, dtype, precision):
    refs = photographs(2000, 32, rng).to(dtype)
    x, t, labels = draw_rows(refs.view(4, 500, -1), 256, rng)
    check(x, refs.view(4, 500, -1).cuda(), t, labels, precision=precision)
    check(x, refs.cuda(), t, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", ["one class", "all classes", "no class", "two classes"])
@pytest.mark.parametrize("shape", [CLASSES, CHUNKS], ids=str)
def test_labels(rng, which, shape, precision):
    x, refs, t, labels = make(*shape, "manifold", rng, everywhere=0)
    labels = {
        "one class": torch.full_like(labels, len(refs) - 1),
        "all classes": torch.full_like(labels, -1),
        "no class": torch.full_like(labels, len(refs)),
        "two classes": labels % 2 * 2,
    }[which]
    out = check(x, refs, t, labels, precision=precision)
    assert out.isnan().all() == (which == "no class")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("times", [ALL_T, (0.97,), (0.3,)], ids=str)
def test_references_that_are_not_finite_are_seen_by_their_rows_alone(rng, times, precision):
    m = CHUNKS[2]
    x, refs, t, labels = make(*CHUNKS, "gaussian", rng, times=times, everywhere=20)
    refs[1, 100], refs[1, 101, 7], refs[2, m - 1, 0] = math.nan, math.inf, -math.inf
    out = check(x, refs, t, labels, precision=precision)
    assert torch.equal(out.isnan().all(1), labels != 0)
    counts = torch.tensor([m, 100, m - 1], device="cuda")
    assert not check(x, refs, t, labels, counts, precision).isnan().any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("apart", [0.1, 1.0])
def test_classes_that_differ_in_their_means(rng, apart, precision):
    x, refs, t, labels = make(*CLASSES, "gaussian", rng)
    shift = apart * torch.randn(len(refs), 1, refs.shape[2], generator=rng).cuda()
    x += (1 - t[:, None]) * shift[labels.clamp_min(0), 0]
    check(x, (refs + shift).half(), t, labels, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_of_any_size(rng, size, dtype, precision):
    for shape in CASES:
        x, refs, t, labels = make(*shape, "gaussian", rng, times=(0.5, 0.97))
        check(x * size, (refs.float() * size).to(dtype), t, labels, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_rows_between_two_references(rng, shape, copies, dtype):
    """Their weights depend on the last digits of scores; copies of a sample tie."""
    n, k, m, d = shape
    own = m // copies
    refs = torch.randn(k or 1, own, d, generator=rng).to(dtype)
    labels, first = torch.randint(k or 1, (n,), generator=rng), torch.randint(own // 2, (n,), generator=rng)
    t = torch.tensor([0.05, 0.2, 0.35, 0.5, 0.9])[torch.arange(n) % 5]
    sigma = t[:, None].double()
    x = between(refs[labels, first], refs[labels, first + own // 2], 1 - sigma, sigma)
    refs = refs.repeat(1, copies, 1)[:, torch.randperm(own * copies, generator=rng)].contiguous()
    x, refs, t, labels = (v.cuda() for v in (x, refs, t, labels))
    for options in ({}, {"prediction": "x0"}):
        out = svel.stable_target(x, refs if k else refs[0], t, labels if k else None, **options)
        expected = reference.stable_target(x.double(), refs if k else refs[0], t, labels if k else None, **options)
        assert worst_row(out, expected) <= TOLERANCE[torch.float32, "exact"]
        out = check(x, refs if k else refs[0], t, labels if k else None, precision="fast", **options)
        assert worst_row(out, expected) <= 3e-3  # a single row may be off by 2e-3, at small t


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [CLASSES, CHUNKS], ids=str)
def test_mean_and_lse(rng, shape, precision):
    """Any alpha: below zero, zero and NaN too."""
    n, k, m, d = shape
    refs = make_references(k * m, d, "gaussian", rng).view(k, m, d).half()
    counts = fill_partly(refs, rng)
    x, sigma, labels = draw_rows(refs.nan_to_num(), n, rng, (0.5, 0.8, 0.95), counts)
    refs, counts, alpha = refs.cuda(), counts.cuda(), 1 - sigma
    alpha[2], alpha[3], sigma[4] = 0, math.nan, math.nan
    alpha[10:] *= -1
    x[10:] *= -1
    assert_served("held", x, refs, precision)
    mean, lse = svel.posterior_mean(x, refs, alpha, sigma, labels, counts, precision=precision)
    expected_mean, expected = reference.posterior_mean(x.double(), refs, alpha, sigma, labels, counts)
    assert torch.equal(lse.isnan(), expected.isnan())
    assert torch.equal(lse.isinf(), expected.isinf())
    assert torch.equal(mean.isnan(), expected_mean.isnan())
    good = expected.isfinite()
    for value in sigma[good].unique():
        rows = good & (sigma == value)
        assert relative_error(mean[rows], expected_mean[rows]) <= TOLERANCE[torch.float32, precision]
    valid = torch.cat([group[: max(count, 0)] for group, count in zip(refs, counts.tolist(), strict=True)])
    few = good.nonzero()[:40, 0]
    scale = largest_logit(x[few], valid, alpha[few], sigma[few])
    assert ((lse - expected)[few].abs() <= TOLERANCE[torch.float32, precision] * scale).all()


def test_parts_of_a_set_merge(rng):
    """Two parts: an error of lse is an error of the mean."""
    for shape in CASES:
        n, k, m, d = shape
        x, refs, t, labels = make_classes(n, k or 1, 2 * m, d, "manifold", rng, times=(0.5, 0.9, 0.98))
        halves = [refs[:, :m].contiguous(), refs[:, m:].contiguous()]
        assert_served("held", x, halves[0], "exact")
        means, lses = zip(*(svel.posterior_part(x, half, 1 - t, t, labels) for half in halves), strict=True)
        share = torch.softmax(torch.stack(lses).double(), 0)[..., None]
        merged = (share * torch.stack(means)).sum(0)
        expected = reference.posterior_mean(x.double(), refs, 1 - t, t, labels)[0]
        assert relative_error(merged, expected) <= TOLERANCE[torch.float32, "exact"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path, precision):
    for shape in CASES:
        check(*make(*shape, "manifold", rng), prediction=prediction, path=path, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_dtype_and_alignment(rng, dtype, precision):
    for shape in CASES:
        x, refs, t, labels = make(*shape, "manifold", rng)
        check(x.to(dtype), refs, t, labels, precision=precision)
        out = check(offset_by_one(x), refs, t, labels, precision=precision)
        if precision == "exact":
            assert torch.equal(svel.stable_target(x, refs, t, labels), out)


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    names = kernels_run(svel.stable_target, *make(*CLASSES, "gaussian", rng))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("held_kernel" in name for name in names), names


@pytest.mark.parametrize("precision", PRECISIONS)
def test_repeats_bit_for_bit(rng, precision):
    for shape in CASES:
        x, refs, t, labels = make(*shape, "manifold", rng)
        first = svel.posterior_mean(x, refs, 1 - t, t, labels, precision=precision)
        for _ in range(5):
            again = svel.posterior_mean(x, refs, 1 - t, t, labels, precision=precision)
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))


def test_two_streams(rng):
    problems = [make(*CLASSES, "manifold", rng), make(*CHUNKS, "gaussian", rng)]
    for out, expected in on_two_streams(svel.stable_target, problems):
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [CLASSES, CHUNKS], ids=str)
def test_nothing_waits_and_a_graph_follows_its_inputs(rng, shape):
    check_graph_of_classes(shape, rng)

"""The pool kernel: results of two to 64 rows against one large pool of float16 references, edges and arguments."""

import math
from functools import partial

import pytest
import torch
from cuda_cases import (
    GEOMETRIES,
    assert_served,
    captured,
    check_pool,
    invalidate,
    kernels_run,
    make_crowds,
    make_large_pool,
    make_photograph_pool,
    make_pool,
    make_pool_of_size,
    nothing_waits,
    on_two_streams,
)
from kernel_cases import largest_logit, offset_by_one, with_gaps

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE, assert_close, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
FAST = {"precision": "fast"}
PRECISIONS = pytest.mark.parametrize("precision", ["exact", "fast"])
ROWS = 32  # of one pass
# Rows: fewer than a pass, one, one more, two. References: whole tiles and not. D: parts of 512 whole, cut, and empty.
SHAPES = [
    (2, 4100, 4096),
    (26, 5003, 4088),
    (31, 4999, 3400),
    (32, 4096, 4096),
    (33, 4129, 4096),
    (63, 8201, 2056),
    (64, 4101, 4096),
    (5, 6007, 3072),
    (32, 20_011, 1032),
    (32, 65_567, 256),
    (64, 131_101, 128),
]
SHAPE = (26, 4999, 3400)
LEAST_EXACT_D = 256  # shorter samples have another kernel where results are to be exact
# Of crowds: scores off by 50 to 2e-4. From 0.02 to 0.1 rows stay in doubt when the best references are scored again.
CROWDED = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.1, 0.3, 0.5)
NEAR_ZERO = (0.001, 0.005, 0.01, 0.02, 0.03)  # scores off by 250 to 0.2, and one reference has all the weight


def check(x, refs, t, counts=None, precision="fast", **options):
    """`check_pool`, by this kernel."""
    if precision == "fast" or refs.shape[1] >= LEAST_EXACT_D:
        assert_served("pool", x, refs, precision)
    return check_pool(x, refs, t, counts, precision=precision, **options)


@PRECISIONS
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_shapes(rng, n, m, d, geometry, precision):
    check(*make_pool(n, m, d, geometry, rng), precision=precision)


@PRECISIONS
@pytest.mark.parametrize(("n", "m", "side"), [(26, 40_000, 32), (12, 22_001, 16)])
def test_photographs(rng, n, m, side, precision):
    check(*make_photograph_pool(n, m, side, rng), precision=precision)


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    x, refs, t = make_pool(*SHAPE, "gaussian", rng)
    names = kernels_run(svel.stable_target, x, refs, t, **FAST)
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("pool_kernel" in name for name in names), names


@PRECISIONS
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path, precision):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
    check(x, refs, t, prediction=prediction, path=path, precision=precision)


@PRECISIONS
def test_the_mean_of_shifted_references(rng, precision):
    check(*make_pool(*SHAPE, "shifted", rng), prediction="x0", precision=precision)


@pytest.mark.parametrize("d", [512, 4096])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_exact_results_where_float32_products_are_not_enough(rng, geometry, d):
    """At a small sigma far from the origin: the best references are scored again, or the rows are evaluated again."""
    check(*make_pool(32, (1 << 25) // d, d, geometry, rng, times=(0.05, 0.2)), path="cosine", precision="exact")


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_exact_results_near_zero(rng, geometry, path):
    x, refs, t = make_pool(25, 4999, 4096, geometry, rng, times=NEAR_ZERO)
    check(x, refs, t * (1 + 1e-3 * torch.arange(25, device="cuda")), path=path, precision="exact")


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
@pytest.mark.parametrize(("n", "m", "d"), [(2, 4999, 4096), (26, 8201, 4096), (40, 5003, 4088), (64, 65_567, 256)])
def test_rows_in_doubt(rng, n, m, d, prediction):
    """Each row by itself, since none has another's time."""
    given = make_crowds(n, m, d, rng, CROWDED[3:] + CROWDED[:3])
    if d > 256:
        check(*given, prediction=prediction, precision="exact")
    else:  # not within the contract yet: thousands of references that are nearly alike, whose errors are too
        x, refs, t = given
        out = svel.stable_target(x, refs, t, prediction=prediction, precision="exact")
        expected = reference.stable_target(x.double(), refs, t, prediction=prediction)
        assert ((out - expected).norm(dim=1) <= 5e-6 * expected.norm(dim=1)).all()


def test_rows_in_doubt_among_counted_references(rng):
    x, refs, t = make_crowds(26, 4999, 3400, rng, CROWDED)
    check(x, invalidate(refs, 4400), t, torch.tensor([4400], device="cuda"), precision="exact")


def test_rows_in_doubt_repeat_bit_for_bit_and_in_a_graph(rng):
    static = make_crowds(40, 4999, 3400, rng, CROWDED)
    replay = captured(lambda *given: (svel.stable_target(*given),), static)
    for new in (static, make_pool(40, 4999, 3400, "gaussian", rng), make_crowds(40, 4999, 3400, rng, CROWDED)):
        new = [given.clone() for given in new]
        expected = svel.stable_target(*new)
        for _ in range(3):
            assert torch.equal(replay(new)[0], expected)
    problems = [make_crowds(26, 5003, 3400, rng, CROWDED), make_crowds(40, 4999, 4096, rng, CROWDED)]
    for out, right in on_two_streams(svel.stable_target, problems):
        assert torch.equal(out, right)


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [-3, 0, 1, 31, 32, 33, 500, 4994, 4999, 6000])
def test_counts(rng, count, dtype, precision):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
    out = check(x, invalidate(refs, count), t, torch.tensor([count], dtype=dtype, device="cuda"), precision=precision)
    assert out.isnan().all() == (count <= 0)


@PRECISIONS
@pytest.mark.parametrize("n", [26, 40])
def test_rows_that_are_not_finite_stay_alone(rng, n, precision):
    x, refs, t = make_pool(n, *SHAPE[1:], "manifold", rng)
    x[3, 5], x[9, 0], x[n - 1, -1], t[4] = math.nan, math.inf, -math.inf, math.nan
    out = check(x, refs, t, precision=precision)
    assert out.isnan().all(1).nonzero()[:, 0].tolist() == [3, 4, 9, n - 1]
    assert svel.stable_target(x, refs, t * math.nan, precision=precision).isnan().all()


@PRECISIONS
@pytest.mark.parametrize("size", [1e-6, 3e3])
def test_data_of_any_size(rng, size, precision):
    check(*make_pool_of_size(*SHAPE, size, rng), precision=precision)


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_of_any_dtype_and_alignment(rng, dtype, precision):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
    check(x.to(dtype), refs, t, precision=precision)
    out = svel.stable_target(x, refs, t, precision=precision)
    assert torch.equal(svel.stable_target(offset_by_one(x), refs, t, precision=precision), out)
    assert torch.equal(svel.stable_target(with_gaps(x), with_gaps(refs), t, precision=precision), out)


def test_samples_of_several_dimensions(rng):
    x, refs, t = make_pool(26, 4999, 4096, "gaussian", rng)
    out = svel.stable_target(x.view(26, 4, 32, 32), refs.view(4999, 4, 32, 32), t, **FAST)
    assert torch.equal(out.view(26, 4096), svel.stable_target(x, refs, t, **FAST))


def test_mean_and_lse(rng):
    """Any alpha: below zero, zero and NaN too."""
    n, m, d = SHAPE
    x, refs, sigma = make_pool(n, m, d, "gaussian", rng, times=(0.5, 0.8, 0.95))
    alpha = 1 - sigma
    alpha[2], alpha[3], sigma[4] = 0, math.nan, math.nan
    alpha[10:] *= -1
    x[10:20] *= -1
    for counts in (None, torch.tensor([m - 700], device="cuda")):
        valid = refs if counts is None else invalidate(refs, m - 700)
        mean, lse = svel.posterior_mean(x, valid, alpha, sigma, None, counts, **FAST)
        expected_mean, expected = reference.posterior_mean(x.double(), valid, alpha, sigma, None, counts)
        good = ~expected.isnan()
        assert torch.equal(lse.isnan(), expected.isnan())
        assert torch.equal(mean.isnan(), expected_mean.isnan())
        for rows in good.nonzero().split(4):
            assert_close(mean[rows[:, 0]], expected_mean[rows[:, 0]], "fast")
        scale = largest_logit(x[good], refs[: m if counts is None else m - 700], alpha[good], sigma[good])
        assert ((lse - expected)[good].abs() <= TOLERANCE[torch.float32, "fast"] * scale).all()


@pytest.mark.parametrize("op", ["posterior_mean", "posterior_part"])
@pytest.mark.parametrize("geometry", ["gaussian", "manifold"])
@pytest.mark.parametrize("time", [0.9, 0.98, 0.998])
def test_lse_merges_over_disjoint_halves(rng, time, geometry, op):
    x, refs, sigma = make_pool(9, 10_007, 3400, geometry, rng, times=(time,))
    halves = (refs[:4997], refs[4997:])
    assert_served("pool", x, halves[0], "fast")
    means, lses = zip(*(getattr(svel, op)(x, half, 1 - sigma, sigma, **FAST) for half in halves), strict=True)
    share = torch.softmax(torch.stack(lses).double(), 0)[..., None]
    merged = (share * torch.stack(means)).sum(0).float()
    assert_close(merged, reference.posterior_mean(x.double(), refs, 1 - sigma, sigma)[0], "fast")


def merged_error(x, refs, t, sizes):
    """Of the velocity from parts of these sizes, merged as processes merge them; the worst of the times."""
    alpha, sigma = 1 - t.double(), t.double()
    parts = [svel.posterior_part(x, part, alpha, sigma) for part in refs.split(sizes)]
    for part in refs.split(sizes):
        assert_served("pool", x, part, "exact")
    share = torch.softmax(torch.stack([lse for _, lse in parts]), 0)
    mean = sum(s.float()[:, None] * mean for s, (mean, _) in zip(share, parts, strict=True))
    out = (x.double() - mean) / sigma[:, None]
    expected = svel.stable_target(x.double(), refs, t.double())
    return max(relative_error(out[t == time].float(), expected[t == time]) for time in t.unique())


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [256, 1032, 4096])
def test_exact_parts_merge_within_the_contract(rng, d, geometry, parts):
    least = -(-(1 << 24) // d)
    sizes = [least + 7 * i for i in range(parts)]
    x, refs, t = make_pool(32, sum(sizes), d, geometry, rng)
    assert merged_error(x, refs, t, sizes) <= TOLERANCE[torch.float32, "exact"]


@pytest.mark.parametrize("among", [2, 3, 40])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_near_ties_between_references_of_parts(rng, geometry, among):
    """Rows in the middle of as many references, of one part and of several: scores are all but equal."""
    d, sizes = 4096, [4101, 4096, 4111]
    _, refs, _ = make_pool(1, sum(sizes), d, geometry, rng)
    t = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.9, 0.97], device="cuda").repeat_interleave(5)
    picked = torch.randint(len(refs), (len(t), among), generator=rng).cuda()
    picked[::5] %= sizes[0]  # of one part
    middle = refs[picked].double().mean(1)
    noise = torch.randn(len(t), d, generator=rng).cuda().double()
    # Noise at right angles to what the references differ by leaves the tie.
    gaps = (refs[picked].double() - middle[:, None])[:, 1:]
    noise -= torch.linalg.lstsq(gaps.mT, noise[..., None]).solution.mT.matmul(gaps)[:, 0]
    x = ((1 - t)[:, None] * middle + t[:, None] * noise).float()
    assert merged_error(x, refs, t, sizes) <= TOLERANCE[torch.float32, "exact"]
    check_pool(x, refs, t)


def test_exact_mean_and_lse(rng):
    x, refs, t = make_pool(32, 4999, 4096, "gaussian", rng)
    alpha, sigma = 1 - t, t
    expected_mean, expected = reference.posterior_mean(x.double(), refs, alpha.double(), sigma.double())
    for op, dtype in ((svel.posterior_mean, torch.float32), (svel.posterior_part, torch.float64)):
        mean, lse = op(x, refs, alpha, sigma)
        assert lse.dtype == dtype
        assert ((lse - expected).abs() <= 1e-6 + 1e-6 * expected.abs()).all()
        for time in t.unique():
            assert_close(mean[t == time], expected_mean[t == time])


@pytest.mark.parametrize("data", ["crowds", *GEOMETRIES])
def test_exact_parts_where_float32_scores_are_a_guess(rng, data):
    """Each row's mean and log-sum-exp of a part, with its nearest reference and without."""
    if data == "crowds":
        x, refs, t = make_crowds(24, 10_007, 3400, rng, CROWDED[:8])
    else:
        x, refs, t = make_pool(25, 10_007, 3400, data, rng, times=NEAR_ZERO)
    alpha, sigma = 1 - t.double(), t.double()
    for part in refs.split([5000, 5007]):
        assert_served("pool", x, part, "exact")
        mean, lse = svel.posterior_part(x, part, alpha, sigma)
        expected_mean, expected = reference.posterior_mean(x.double(), part, alpha, sigma)
        # Beside what the contract leaves to a part, float64's own rounding of the largest distances.
        limit = (1e-4 if data == "shifted" else 1e-5) + 1e-13 * largest_logit(x, part, alpha, sigma)
        assert ((lse - expected).abs() <= limit).all(), ((lse - expected).abs() / limit).tolist()
        for row in range(len(x)):
            assert_close(mean[row], expected_mean[row])


def test_parts_merge_with_what_other_kernels_give(rng):
    x, refs, sigma = make_pool(9, 5003, 3400, "manifold", rng, times=(0.9, 0.98))
    halves = (refs[:4990], refs[4990:])
    assert_served("pool", x, halves[0], "fast")
    assert_served("bulk", x, halves[1], "fast")
    means, lses = zip(*(svel.posterior_part(x, half, 1 - sigma, sigma, **FAST) for half in halves), strict=True)
    merged = (torch.softmax(torch.stack(lses), 0)[..., None] * torch.stack(means)).sum(0).float()
    assert_close(merged, reference.posterior_mean(x.double(), refs, 1 - sigma, sigma)[0], "fast")


def test_repeats_bit_for_bit(rng):
    x, refs, t = make_pool(40, 8009, 4096, "manifold", rng)
    first = svel.posterior_mean(x, refs, 1 - t, t, **FAST)
    for _ in range(5):
        for ours, theirs in zip(svel.posterior_mean(x, refs, 1 - t, t, **FAST), first, strict=True):
            assert torch.equal(ours, theirs)


def test_nothing_waits_and_a_graph_follows_its_inputs(rng):
    counts = torch.tensor([4000], device="cuda")
    static = [*make_pool(*SHAPE, "manifold", rng), counts]

    def target(x, refs, t, counts):
        mean, lse = svel.posterior_mean(x, refs, 1 - t, t, None, counts, **FAST)
        outs = [svel.stable_target(x, refs, t, None, counts, precision=p) for p in ("exact", "fast")]
        return *outs, mean, lse

    replay = captured(target, static)
    with nothing_waits():
        target(*static)
    for count in (4999, 17, 0):
        new = [*make_pool(*SHAPE, "shifted", rng), torch.tensor([count], device="cuda")]
        for out, expected in zip(replay(new), target(*new), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_two_streams_at_once(rng):
    problems = [make_pool(26, 6007, 4096, "manifold", rng), make_pool(40, 5003, 3400, "gaussian", rng)]
    for out, right in on_two_streams(partial(svel.stable_target, **FAST), problems):
        assert torch.equal(out, right)


@PRECISIONS
@pytest.mark.parametrize(("n", "m", "d"), [(32, 530_003, 264), (6, 540_001, 4096)], ids=["two segments", "2^31"])
def test_large(n, m, d, precision):
    """More tiles to a cluster than one segment adds up, and more elements than 32 bits count."""
    x, refs, t = make_large_pool(n, m, d)
    check(x, refs, t, precision=precision)
    check(x, refs, t, prediction="x0", precision=precision)


def test_problems_that_others_serve(rng):
    """One row, few elements, a source, labels, other dtypes: right as before."""
    x, refs, t = make_pool(4, 4999, 3400, "manifold", rng)
    assert_served("bulk", x[:1], refs, "fast")
    assert_served("bulk", x, refs[:4000], "fast")
    assert_served("bulk", x, refs.bfloat16(), "fast")
    assert_served("bulk", x, refs.float(), "fast")
    expected = svel.stable_target(x.double(), refs, t)
    source = x * 0 - 50
    for out in (
        svel.stable_target(x[:1], refs, t[:1]),
        svel.stable_target(x, refs, t, source=source),
        svel.stable_target(x, refs[None], t, torch.zeros(4, dtype=torch.int64, device="cuda")),
        svel.stable_target(x, offset_by_one(refs), t),
    ):
        assert_close(out, expected[: len(out)])
    assert svel.stable_target(x[:0], refs, t[:0]).shape == (0, 3400)

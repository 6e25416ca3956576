"""Rows of label -1 among those of classes, announced: the pool kernel serves them, the bulk kernel the others."""

import math

import pytest
import stablevelocity as sv
import torch
from cuda_cases import (
    GEOMETRIES,
    assert_close_at_each_time,
    captured,
    draw_rows,
    fill_partly,
    kernels_run,
    make_crowds,
    nothing_waits,
    on_two_streams,
)
from kernel_cases import ALL_T, between, largest_logit, offset_by_one, photographs, with_gaps

import stablevelocity_kernels as svel
from stablevelocity_kernels import info, reference
from stablevelocity_kernels.testing import TOLERANCE, assert_close, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
# Rows, classes, references of each, D. Classes end where a tile of 32 references does, within one, or share one with
# others. D: slices of 512 whole, cut and empty, by all forms of the bulk kernel that serve such samples.
SHAPES = [
    (256, 150, 32, 4096),
    (256, 150, 33, 4088),
    (70, 200, 25, 3400),
    (300, 301, 40, 2056),
    (256, 1001, 20, 1032),
    (400, 2001, 33, 256),
    (160, 6001, 1, 4096),
    (1100, 150, 33, 4096),
]
SHAPE = (256, 150, 33, 3400)
NULLS = (0, 1, 2, 26, 32, 33, 70, 256)  # of 256 rows
PRECISIONS = pytest.mark.parametrize("precision", ["exact", "fast"])
NEAR_ZERO = (0.001, 0.005, 0.01, 0.02, 0.03)
CROWDED = (0.02, 0.03, 0.05, 0.08, 0.1, 0.3, 0.5)


def make_bank(n, k, m, d, geometry, rng, nulls=26, partly=False, **options):
    """x (n, d), refs (k, m, d), t (n,), labels (n,) with `nulls` of -1 anywhere, counts (k,) or None. On the GPU."""
    refs = make_references(k * m, d, geometry, rng).view(k, m, d).half()
    counts = fill_partly(refs, rng) if partly else None
    x, t, labels = draw_rows(refs.nan_to_num(), n, rng, counts=counts, everywhere=0, **options)
    labels[torch.randperm(n, generator=rng)[:nulls].cuda()] = -1
    return x, refs.cuda(), t, labels, None if counts is None else counts.cuda()


def assert_announced(x, refs, precision):
    """A test of these rows is none if they are served as any others."""
    if torch.cuda.get_device_capability() == (9, 0) and info._C is not None:
        k, m, d = refs.shape
        options = {"x_dtype": x.dtype, "refs_dtype": refs.dtype, "precision": precision, "null_rows": True}
        assert info.plan(len(x), m, d, k, **options)["null_passes"] == -(-len(x) // 32)


def check(x, refs, t, labels, counts=None, precision="exact", served=True, **options):
    """stable_target against the reference in float64: rows of each time together, those of label -1 apart."""
    if served:
        assert_announced(x, refs, precision)
    out = svel.stable_target(x, refs, t, labels, counts, precision=precision, null_rows=True, **options)
    expected = reference.stable_target(x.double(), refs, t, labels, counts, **options)
    for rows in (labels == -1, labels != -1):
        assert_close_at_each_time(out[rows], expected[rows], t[rows], precision)
    return out


@PRECISIONS
@pytest.mark.parametrize("partly", [False, True], ids=["full", "partly"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "k", "m", "d"), SHAPES)
def test_shapes(rng, n, k, m, d, geometry, partly, precision):
    if m == 1 and partly:
        pytest.skip("half of one reference is none")
    check(*make_bank(n, k, m, d, geometry, rng, n // 10, partly), precision=precision)


@PRECISIONS
@pytest.mark.parametrize("partly", [False, True], ids=["full", "partly"])
@pytest.mark.parametrize("nulls", NULLS)
def test_any_number_of_null_rows(rng, nulls, partly, precision):
    check(*make_bank(*SHAPE, "manifold", rng, nulls, partly), precision=precision)


def test_the_kernels_serve(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    x, refs, t, labels, _ = make_bank(*SHAPE, "gaussian", rng)
    for announced in (True, False):
        names = kernels_run(svel.stable_target, x, refs, t, labels, null_rows=announced)
        if not names:
            pytest.skip("the profiler sees no kernels here")
        assert any("products_kernel" in name for name in names), names
        assert any("pool_kernel" in name for name in names) == announced, names


@PRECISIONS
def test_rows_that_others_leave_out(rng, precision):
    """Labels of no class, times and samples that are not finite, of null rows and of others, each stays alone."""
    x, refs, t, labels, counts = make_bank(*SHAPE, "manifold", rng, 40, partly=True)
    labels[:8] = torch.tensor([-1, -1, -1, -1, 0, 0, -2, refs.shape[0]], device="cuda")
    t[0], x[1, 7], x[2, -1], t[4], x[5, 0] = math.nan, math.inf, math.nan, math.nan, -math.inf
    out = check(x, refs, t, labels, counts, precision)
    empty = (labels >= 0) & (labels < len(counts)) & (counts[labels.clamp(0, len(counts) - 1)] <= 0)
    alone = torch.zeros_like(empty)
    alone[[0, 1, 2, 4, 5, 6, 7]] = True
    assert torch.equal(out.isnan().any(1), empty | alone)
    assert torch.equal(out.isnan().all(1), empty | alone)


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("filled", ["nothing", "one reference", "one class", "one each", "beyond"])
def test_counts(rng, filled, dtype, precision):
    """References that do not count are NaN."""
    x, refs, t, labels, _ = make_bank(*SHAPE, "manifold", rng, 40)
    k, m = refs.shape[:2]
    counts = torch.zeros(k, dtype=dtype, device="cuda")
    if filled == "one reference":
        counts[k // 2] = 1
    elif filled == "one class":
        counts[k - 1] = m
    elif filled != "nothing":
        counts += 1 if filled == "one each" else m + 7
    refs.masked_fill_((torch.arange(m, device="cuda") >= counts[:, None])[..., None], math.nan)
    out = check(x, refs, t, labels, counts, precision)
    assert out[labels == -1].isnan().all() == (filled == "nothing")


@PRECISIONS
@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path, precision):
    options = {"precision": precision, "path": path, "prediction": prediction}
    check(*make_bank(*SHAPE, "manifold", rng, partly=True), **options)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [*NEAR_ZERO, *ALL_T, 0.9, 0.98])
def test_one_time_for_all_rows(rng, time, geometry):
    check(*make_bank(*SHAPE, geometry, rng, 40, partly=True, times=(time,)))


@PRECISIONS
def test_photographs(rng, precision):
    refs = photographs(30_000, 32, rng).half().view(300, 100, -1)
    x, t, labels = draw_rows(refs, 256, rng, everywhere=6)
    check(x, refs.cuda(), t, labels, precision=precision)


def test_near_ties(rng):
    """Null rows in the middle of two references of one class or of two."""
    x, refs, t, labels, counts = make_bank(*SHAPE, "gaussian", rng, 60, partly=True, times=(0.05, 0.2, 0.5, 0.8))
    valid = (torch.arange(refs.shape[1], device="cuda") < counts[:, None]).nonzero()
    rows = (labels == -1).nonzero()[:, 0]
    one, other = valid[torch.randperm(len(valid), generator=rng)[: 2 * len(rows)].cuda()].chunk(2)
    other[::2, 0], other[::2, 1] = one[::2, 0], (one[::2, 1] + 1) % counts[one[::2, 0]]
    a, b = (refs[at[:, 0], at[:, 1]].double() for at in (one, other))
    alpha, sigma = (1 - t[rows, None]).double(), t[rows, None].double()
    x[rows] = between(a, b, alpha, sigma).float()
    check(x, refs, t, labels, counts)


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_rows_in_doubt(rng, prediction):
    """Hundreds of references that float32 cannot tell apart: null rows are evaluated again, each by itself."""
    n, (_, k, m, d) = 70, SHAPE
    x, refs, t = make_crowds(n, k * m, d, rng, CROWDED)
    refs, labels = refs.view(k, m, d), torch.full((n,), -1, device="cuda")
    counts = torch.full((k,), m, device="cuda")
    counts[7::3] = 20
    refs = refs.masked_fill((torch.arange(m, device="cuda") >= counts[:, None])[..., None], math.nan)
    check(x, refs, t, labels, counts, prediction=prediction)


@PRECISIONS
@pytest.mark.parametrize("partly", [False, True], ids=["full", "partly"])
def test_mean_and_lse(rng, partly, precision):
    """Any alpha: below zero, zero and NaN too."""
    x, refs, sigma, labels, counts = make_bank(*SHAPE, "gaussian", rng, 40, partly, times=(0.5, 0.8, 0.95))
    alpha = 1 - sigma
    rows = (labels == -1).nonzero()[:, 0]
    alpha[rows[2]], alpha[rows[3]], sigma[rows[4]] = 0, math.nan, math.nan
    alpha[rows[10:15]] *= -1
    x[rows[10:15]] *= -1
    assert_announced(x, refs, precision)
    mean, lse = svel.posterior_mean(x, refs, alpha, sigma, labels, counts, precision=precision, null_rows=True)
    given = x.double(), refs, alpha.double(), sigma.double(), labels, counts
    expected_mean, expected = reference.posterior_mean(*given)
    assert torch.equal(mean.isnan(), expected_mean.isnan())
    assert torch.equal(lse.isnan(), expected.isnan())
    good = ~expected.isnan() & (labels == -1)
    for some in good.nonzero()[:, 0].split(4):
        assert_close(mean[some], expected_mean[some], precision)
    pool = refs.flatten(0, 1)
    if counts is not None:
        pool = pool[(torch.arange(refs.shape[1], device="cuda") < counts[:, None]).flatten()]
    scale = largest_logit(x[good], pool, alpha[good], sigma[good])
    assert ((lse - expected)[good].abs() <= TOLERANCE[torch.float32, precision] * scale).all()


@PRECISIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_x_of_any_dtype_and_alignment(rng, dtype, precision):
    x, refs, t, labels, counts = make_bank(*SHAPE, "manifold", rng, partly=True)
    check(x.to(dtype), refs, t, labels, counts, precision)
    options = {"precision": precision, "null_rows": True}
    rows = labels == -1  # x that is not aligned takes other rows to another kernel
    out = svel.stable_target(x, refs, t, labels, counts, **options)[rows]
    for other in (offset_by_one(x), with_gaps(x)):
        assert torch.equal(svel.stable_target(other, refs, t, labels, counts, **options)[rows], out)


def test_what_is_served_as_without_the_announcement(rng):
    """Other dtypes of references, a source, a small bank, few rows, no label: bit for bit the same."""
    x, refs, t, labels, counts = make_bank(*SHAPE, "manifold", rng, 8, partly=True)
    source = torch.randn_like(x)
    zeros = torch.zeros_like(labels)
    for given in (
        (x, refs.bfloat16(), t, labels, counts),
        (x, refs.float(), t, labels, counts),
        (x, refs, t, labels, counts, source),
        (x, refs[:60], t, labels.clamp(-1, 59), counts[:60]),
        (x[:20], refs, t[:20], labels[:20], counts),
        (x, refs[3, :20], t),
        (x, refs, t, zeros, counts),
    ):
        out = svel.stable_target(*given, null_rows=True)
        torch.testing.assert_close(out, svel.stable_target(*given), rtol=0, atol=0, equal_nan=True)


def test_repeats_bit_for_bit(rng):
    x, refs, t, labels, counts = make_bank(*SHAPE, "manifold", rng, 70, partly=True)
    first = svel.posterior_mean(x, refs, 1 - t, t, labels, counts, null_rows=True)
    for _ in range(5):
        again = svel.posterior_mean(x, refs, 1 - t, t, labels, counts, null_rows=True)
        for ours, theirs in zip(again, first, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_nothing_waits_and_a_graph_follows_its_inputs(rng):
    """Other labels, counts and numbers of null rows in every replay, crowds with rows in doubt among them."""

    def target(x, refs, t, labels, counts):
        mean, lse = svel.posterior_mean(x, refs, 1 - t, t, labels, counts, null_rows=True)
        outs = [svel.stable_target(x, refs, t, labels, counts, precision=p, null_rows=True) for p in ("exact", "fast")]
        return *outs, mean, lse

    static = make_bank(*SHAPE, "manifold", rng, 26, partly=True)
    replay = captured(target, static)
    with nothing_waits():
        target(*static)
    n, k, m, d = SHAPE
    x, crowd, t = make_crowds(n, k * m, d, rng, CROWDED)
    all_null = torch.full_like(static[3], -1)
    problems = [make_bank(*SHAPE, "shifted", rng, nulls, partly=True) for nulls in (0, 1, 70, 33, 256, 0)]
    problems[3:3] = [(x, crowd.view(k, m, d), t, all_null, torch.full_like(static[4], m))]
    problems.append((*static[:4], torch.zeros_like(static[4])))
    for new in [[given.clone() for given in problem] for problem in problems]:
        for out, expected in zip(replay(new), target(*new), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_two_streams_at_once(rng):
    def target(*given):
        return svel.stable_target(*given, null_rows=True)

    problems = [make_bank(*SHAPE, "manifold", rng, 40), make_bank(*SHAPES[3], "gaussian", rng, 30)]
    for out, right in on_two_streams(target, problems):
        assert torch.equal(out, right)


def test_more_passes_than_share_the_launches_around(rng):
    """More tiles to a cluster than one segment adds up, so that parts of few passes fill the workspace."""
    n, k, m, d = 200, 2100, 256, 1024
    refs = torch.randn(k, m, d, device="cuda").half()
    if torch.cuda.get_device_capability() == (9, 0) and info._C is not None:
        plan = info.plan(2048, m, d, k, null_rows=True)
        assert plan["null_at_once"] < plan["null_passes"] == 64
    t = torch.tensor(ALL_T, device="cuda")[torch.arange(2048, device="cuda") % len(ALL_T)]
    labels = torch.randint(k, (2048,), generator=rng).cuda()
    x0 = refs[labels, torch.randint(m, (2048,), generator=rng).cuda()]
    x = (1 - t[:, None]) * x0 + t[:, None] * torch.randn(2048, d, device="cuda")
    labels[torch.randperm(2048, generator=rng)[:1900].cuda()] = -1
    out = svel.stable_target(x, refs, t, labels, null_rows=True)
    nulls = (labels == -1).nonzero()[:, 0]
    some = nulls[torch.randperm(len(nulls), generator=rng)[:n].cuda()]
    expected = reference.stable_target(x[some].double(), refs.flatten(0, 1), t[some])
    assert_close_at_each_time(out[some], expected, t[some], "exact")
    assert out.isfinite().all()


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_a_bank_announces_them(rng, interpolant):
    """`ReferenceBank(null="all")`, and no other bank."""
    _, k, m, d = SHAPE
    x, refs, t, labels, _ = make_bank(*SHAPE, "manifold", rng)
    bank = sv.ReferenceBank((d,), k, m, null="all", device="cuda")
    bank.refs.copy_(refs)
    bank.counts.fill_(m)
    out = bank.target(x, t, labels.masked_fill(labels == -1, k), interpolant=interpolant)
    expected = svel.stable_target(x, refs, t, labels, bank.counts, path=interpolant, null_rows=True)
    assert torch.equal(out, expected)
    unannounced = svel.stable_target(x, refs, t, labels, bank.counts, path=interpolant)
    assert relative_error(out, unannounced) <= 2 * TOLERANCE[torch.float32, "exact"]
    names = kernels_run(bank.target, x, t, labels.masked_fill(labels == -1, k))
    if names and torch.cuda.get_device_capability() == (9, 0):
        assert any("pool_kernel" in name for name in names), names
    ring = sv.ReferenceBank((d,), k - 1, m, null="ring", device="cuda")
    assert not any("pool_kernel" in name for name in kernels_run(ring.target, x, t, labels.clamp(0, k - 1)))

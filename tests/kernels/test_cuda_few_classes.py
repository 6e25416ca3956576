"""The kernel of many rows on banks of few classes: a row sees the valid references of its class, or of all, alone."""

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
)
from kernel_cases import ALL_T, largest_logit, offset_by_one, photographs

import stablevelocity_kernels as svel
from stablevelocity_kernels import info, reference
from stablevelocity_kernels.testing import TOLERANCE, make_noisy, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
prefer = served_by("many_rows")
# Rows, classes, references of each, D. Rows: tiles of 64, 128 and 256, whole and cut, and more than one pass.
# Classes: one, which is a pool, and more; they begin anywhere in a tile, and may be shorter than one. D: in the tiles
# of the sums two by two and alone, lists that shared memory holds and longer samples.
SHAPES = [
    (30, 1, 3301, 1032),
    (700, 1, 2600, 520),
    (27, 2, 2501, 3400),
    (200, 2, 1301, 784),
    (300, 2, 1301, 1032),
    (128, 10, 1009, 1032),
    (256, 10, 501, 3072),
    (321, 10, 4219, 1032),
    (700, 10, 1337, 520),
    (1100, 10, 1511, 784),
    (1800, 2, 1031, 520),
    (256, 37, 57, 32_776),
]
SHAPE = (300, 2, 1301, 1032)
CUT = (321, 10, 4219, 1032)  # as many rows and classes, none of which ends where a tile does
ROUNDS = (1100, 10, 7001, 1032)
PRECISIONS = ("exact", "fast")
DTYPES = (torch.float16, torch.bfloat16)


def check(x, refs, t, labels, counts=None, precision="exact", **options):
    """stable_target against the reference in float64, rows of each time together."""
    assert_served("many_rows", x, refs, precision)
    out = svel.stable_target(x, refs, t, labels, counts, precision=precision, **options)
    expected = reference.stable_target(x.double(), refs, t, labels, counts, **options)
    assert_close_at_each_time(out, expected, t, precision)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "k", "m", "d"), SHAPES)
def test_shapes(rng, n, k, m, d, geometry, dtype, precision):
    check(*make_classes(n, k, m, d, geometry, rng, dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "k", "m", "d"), SHAPES)
def test_partly_filled(rng, n, k, m, d, geometry, dtype, precision):
    check_partly_filled(check, (n, k, m, d), geometry, rng, dtype, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.02, 0.05, 0.2, 0.5, 0.8, 0.95, 0.98, 0.999])
def test_one_time_for_all_rows(rng, time, geometry, precision):
    """No row has many references that matter, or every row has."""
    for shape in (SHAPE, CUT):
        check(*make_classes(*shape, geometry, rng, times=(time,)), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_photographs(rng, dtype, precision):
    refs = photographs(20_000, 32, rng).to(dtype).view(4, 5000, -1)
    x, t, labels = draw_rows(refs, 256, rng)
    check(x, refs.cuda(), t, labels, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["one class", "the last class", "all classes", "no class", "two classes"])
def test_labels(rng, which, dtype):
    x, refs, t, labels = make_classes(*CUT, "manifold", rng, dtype, everywhere=0)
    k = len(refs)
    labels = {
        "one class": torch.full_like(labels, 3),
        "the last class": torch.full_like(labels, k - 1),
        "all classes": torch.full_like(labels, -1),
        "no class": torch.full_like(labels, k),
        "two classes": labels % 2 * 8,
    }[which]
    out = check(x, refs, t, labels)
    assert out.isnan().all() == (which == "no class")


def order_labels(which, n, k, rng):
    """Labels (n,) of rows that are more than one tile, in any order: the kernel puts them in that of their classes."""
    drawn, rows = torch.randint(k, (n,), generator=rng), torch.arange(n)
    return {
        "rising": drawn.sort().values,
        "falling": drawn.sort(descending=True).values,
        "turn by turn": rows % k,
        "half of all classes": torch.where(rows % 2 == 0, -1, drawn),
        "one row of all classes": torch.where(rows == n // 2, -1, drawn),
        "every third class": drawn // 3 * 3,
        "the first and the last": torch.where(drawn == 0, 0, k - 1),
        "nearly all of one": torch.where(rows % 29 == 5, drawn, k // 2),
        "a tile of none": torch.where(rows < 300, k, drawn),
    }[which]


ORDERS = [
    "rising",
    "falling",
    "turn by turn",
    "half of all classes",
    "one row of all classes",
    "every third class",
    "the first and the last",
    "nearly all of one",
    "a tile of none",
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("times", [ALL_T, (0.97,), (0.3, 0.9)], ids=str)
@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("shape", [CUT, (1100, 10, 1511, 784), (700, 19, 901, 2056)], ids=str)
def test_rows_in_the_order_of_classes(rng, shape, which, times, precision):
    """Passes of several tiles and of one, all rows of a tile dense or some; what no row of a tile has is skipped."""
    n, k, m, d = shape
    refs = make_references(k * m, d, "manifold", rng).view(k, m, d).half()
    t = torch.tensor([times[i % len(times)] for i in range(n)])[torch.randperm(n, generator=rng)]
    labels = order_labels(which, n, k, rng)
    x = make_noisy(refs[labels.clamp(0, k - 1), torch.randint(m, (n,), generator=rng)], t, rng)
    check(x.cuda(), refs.cuda(), t.cuda(), labels.cuda(), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_that_rows_of_few_classes_have_references_in(rng, dtype, which, precision):
    n, k, m, d = ROUNDS
    refs = make_references(k * m, d, "shifted", rng).view(k, m, d).to(dtype)
    counts = fill_partly(refs, rng)
    labels = order_labels(which, n, k, rng)
    t = torch.tensor([(0.2, 0.8, 0.97)[i % 3] for i in range(n)])
    picked = (torch.rand(n, generator=rng) * counts[labels.clamp(0, k - 1)].clamp(1, m)).long()
    x = make_noisy(refs.nan_to_num()[labels.clamp(0, k - 1), picked], t, rng)
    check(x.cuda(), refs.cuda(), t.cuda(), labels.cuda(), counts.cuda(), precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["gaussian", "shifted"])
@pytest.mark.parametrize("shape", [CUT, (1024, 10, 1511, 1032), (1800, 10, 1511, 1032)], ids=str)
def test_tiles_of_any_number_of_early_rows(rng, shape, geometry, dtype):
    """Late times are a share of the rows of each class, from none to all."""
    n, k, m, d = shape
    refs = make_references(k * m, d, geometry, rng).view(k, m, d).to(dtype)
    for shares in ([0.0, 0.1, 0.2, 0.28, 0.35, 0.45, 0.6, 0.8, 1.0, 1.0], [0.0] * 9 + [0.1], [1.0] * 9 + [0.2]):
        labels = torch.randint(k, (n,), generator=rng)
        is_late = torch.rand(n, generator=rng) < torch.tensor(shares)[labels]
        t = torch.where(is_late, 0.97, 0.3 + 0.2 * torch.randint(2, (n,), generator=rng))
        x = make_noisy(refs[labels, torch.randint(m, (n,), generator=rng)], t, rng)
        check(x.cuda(), refs.cuda(), t.cuda(), labels.cuda())


def test_dense_rows_that_were_not_expected_in_some_tiles(rng):
    """Of photographs at small times, where scores leave much in doubt; in other tiles dense rows are expected."""
    refs = photographs(20_000, 32, rng).half().view(4, 5000, -1)
    n = 1024
    labels = torch.randint(4, (n,), generator=rng)
    for few in (0, 1, 2):  # classes of rows that are not expected
        t = torch.where(labels < few, 0.2, torch.tensor([0.6, 0.8, 0.95])[torch.arange(n) % 3])
        t[:5] = 0.3  # a few in any tile
        x = make_noisy(refs[labels, torch.randint(5000, (n,), generator=rng)], t, rng)
        check(x.cuda(), refs.cuda(), t.cuda(), labels.cuda())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("n", [257, 512, 700, 1100])
def test_rows_do_not_depend_on_those_beside_them(rng, n, precision):
    x, refs, t, labels = make_classes(n, 5, 2100, 1032, "gaussian", rng, times=(0.3, 0.7, 0.95))
    assert_served("many_rows", x, refs, precision)
    order = torch.randperm(n, generator=rng).cuda()
    out = svel.stable_target(x, refs, t, labels, precision=precision)
    other = svel.stable_target(x[order], refs, t[order], labels[order], precision=precision)
    assert relative_error(other, out[order]) <= 2 * TOLERANCE[torch.float32, precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("label", [0, 4, 9, -1])
def test_one_class_alone_has_references(rng, label, precision):
    """Few of them, from which the centre follows, or none."""
    for count in (0, 1, 33, 4000):
        x, refs, t, labels = make_classes(*CUT, "shifted", rng, everywhere=0)
        own = max(label, 0)
        counts = torch.zeros(len(refs), dtype=torch.int64)
        counts[own] = count
        for k in range(len(refs)):
            refs[k, counts[k] :] = math.nan
        x = make_noisy(refs[own, torch.randint(max(count, 1), (len(x),), generator=rng)].cpu(), t.cpu(), rng)
        x = x.nan_to_num().cuda()
        labels[: len(x) // 2] = label
        out = check(x, refs, t, labels, counts.cuda(), precision)
        assert out[labels == label].isnan().any() == (count == 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_that_lie_in_some_rounds_alone(rng, dtype, geometry, precision):
    """Also dense rows, of which a list or nothing follows; and rows of all classes."""
    n, k, m, d = ROUNDS
    refs = make_references(k * m, d, geometry, rng).view(k, m, d).to(dtype)
    plan = info.plan(n, m, d, k, refs_dtype=dtype, precision=precision)
    assert plan["kernel"] != "many_rows" or plan["refs_per_pass"] < k * m / 2
    for times in (ALL_T, (0.97,)):
        x, t, labels = draw_rows(refs, n, rng, times)
        check(x, refs.cuda(), t, labels, precision=precision)
    counts = fill_partly(refs, rng)
    x, t, labels = draw_rows(refs.nan_to_num(), n, rng, counts=counts)
    check(x, refs.cuda(), t, labels, counts.cuda(), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("times", [ALL_T, (0.97,), (0.3,)], ids=str)
@pytest.mark.parametrize("geometry", ["gaussian", "shifted"])
def test_references_that_are_not_finite_are_seen_by_their_rows_alone(rng, geometry, times, dtype, precision):
    """Whether these are dense or have lists; sums over the references of others pass them."""
    n, k, m, d = CUT
    x, refs, t, labels = make_classes(n, k, m, d, geometry, rng, dtype, times=times, everywhere=50)
    refs[2, 100], refs[2, 101, 7], refs[5, m - 1, 0], refs[7, 0, d - 1] = math.nan, math.inf, math.nan, -math.inf
    out = check(x, refs, t, labels, precision=precision)
    broken = (labels == 2) | (labels == 5) | (labels == 7) | (labels == -1)
    assert torch.equal(out.isnan().all(1), broken)
    # No row has what these classes do not count.
    counts = torch.tensor([m, m, 100, m, m, m - 1, m, 0, m, m], device="cuda")
    assert torch.equal(check(x, refs, t, labels, counts, precision).isnan().all(1), labels == 7)


@pytest.mark.parametrize("n", [300, 1100])
def test_a_class_of_references_that_are_not_finite(rng, n):
    """Half of the samples that the centre follows from are of it."""
    x, refs, t, labels = make_classes(n, 2, 1511, 1032, "shifted", rng, everywhere=7)
    refs[0] = math.nan
    out = check(x, refs, t, labels)
    assert torch.equal(out.isnan().all(1), labels != 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("apart", [0.1, 0.3])
def test_classes_that_differ_in_their_means(rng, apart, precision):
    x, refs, t, labels = make_classes(*CUT, "gaussian", rng)
    shift = apart * torch.randn(len(refs), 1, refs.shape[2], generator=rng).cuda()
    x += (1 - t[:, None]) * shift[labels.clamp_min(0), 0]
    check(x, (refs + shift).half(), t, labels, precision=precision)


@pytest.mark.parametrize("k", [2, 10])
def test_rows_between_two_references(rng, k):
    """Their weights depend on the last digits of scores."""
    n, m, d = 256, 2100, 1032
    refs = torch.randn(k, m, d, generator=rng).half()
    labels, first = torch.randint(k, (n,), generator=rng), torch.randint(m // 2, (n,), generator=rng)
    a, b = refs[labels, first].double(), refs[labels, first + m // 2].double()
    sigma = torch.tensor([0.05, 0.2, 0.35, 0.5], dtype=torch.float64)[torch.arange(n) % 4, None]
    noise, gap = torch.randn(n, d, generator=rng, dtype=torch.float64), a - b
    noise -= (noise * gap).sum(1, keepdim=True) / gap.square().sum(1, keepdim=True) * gap
    x = ((1 - sigma) * (a + b) / 2 + sigma * noise).float()
    check(*(v.cuda() for v in (x, refs, sigma[:, 0].float(), labels)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [SHAPE, CUT, ROUNDS], ids=str)
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
    assert_served("many_rows", x, refs, precision)
    mean, lse = svel.posterior_mean(x, refs, alpha, sigma, labels, counts, precision=precision)
    expected_mean, expected = reference.posterior_mean(x.double(), refs, alpha, sigma, labels, counts)
    assert torch.equal(lse.isnan(), expected.isnan())
    assert torch.equal(mean.isnan(), expected_mean.isnan())
    good = ~expected.isnan()
    for value in sigma[good].unique():
        rows = good & (sigma == value)
        assert relative_error(mean[rows], expected_mean[rows]) <= TOLERANCE[torch.float32, precision]
    valid = torch.cat([group[: max(count, 0)] for group, count in zip(refs, counts.tolist(), strict=True)])
    few = good.nonzero()[:40, 0]
    scale = largest_logit(x[few], valid, alpha[few], sigma[few])
    assert ((lse - expected)[few].abs() <= TOLERANCE[torch.float32, precision] * scale).all()


def test_parts_of_classes_merge(rng):
    """Two parts of every class: an error of lse is an error of the mean."""
    x, refs, t, labels = make_classes(321, 10, 8600, 1032, "manifold", rng, times=(0.5, 0.9, 0.98))
    halves = [refs[:, :4217].contiguous(), refs[:, 4217:].contiguous()]
    for half in halves:
        assert_served("many_rows", x, half, "exact")
    means, lses = zip(*(svel.posterior_part(x, half, 1 - t, t, labels) for half in halves), strict=True)
    share = torch.softmax(torch.stack(lses).double(), 0)[..., None]
    merged, expected = (share * torch.stack(means)).sum(0), reference.posterior_mean(x.double(), refs, 1 - t, t, labels)
    assert relative_error(merged, expected[0]) <= TOLERANCE[torch.float32, "exact"]


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path):
    check(*make_classes(*CUT, "manifold", rng), prediction=prediction, path=path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_dtype_and_alignment(rng, dtype):
    x, refs, t, labels = make_classes(*CUT, "manifold", rng)
    check(x.to(dtype), refs, t, labels)
    out = svel.stable_target(x, refs, t, labels)
    assert torch.equal(svel.stable_target(offset_by_one(x), refs, t, labels), out)


def test_more_rows_than_one_list_holds(rng):
    """Labels go with their rows from one list to the next."""
    refs = torch.randn(2, 1500, 256, generator=rng).half()
    x, t, labels = draw_rows(refs, 16_384 + 77, rng)
    check(x, refs.cuda(), t, labels)


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    names = kernels_run(svel.stable_target, *make_classes(*CUT, "gaussian", rng))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("sum_kernel" in name and "Many" in name for name in names), names


def test_repeats_bit_for_bit(rng):
    x, refs, t, labels = make_classes(*CUT, "manifold", rng)
    first = svel.posterior_mean(x, refs, 1 - t, t, labels)
    for _ in range(5):
        for ours, theirs in zip(svel.posterior_mean(x, refs, 1 - t, t, labels), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [SHAPE, CUT, (700, 1, 2600, 520)], ids=str)
def test_nothing_waits_and_a_graph_follows_its_inputs(rng, shape):
    check_graph_of_classes(shape, rng)


def test_two_streams_at_once(rng):
    problems = [make_classes(*SHAPE, "manifold", rng), make_classes(*CUT, "gaussian", rng)]
    for out, right in on_two_streams(svel.stable_target, problems):
        assert torch.equal(out, right)

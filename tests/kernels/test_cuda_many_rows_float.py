"""The kernel of many rows on float32 references, whose halves it multiplies: pools and few classes."""

import math

import pytest
import torch
from cuda_cases import (
    GEOMETRIES,
    assert_close_at_each_time,
    assert_served,
    check_beside_far,
    check_graph_of_pool,
    check_mean_and_lse,
    check_mean_near_each,
    check_merged_halves,
    check_outliers,
    check_partly_filled,
    check_pool,
    check_repeats,
    invalidate,
    kernels_run,
    make_classes,
    make_photograph_pool,
    make_pool,
    make_two_sizes,
    make_zeros_and_few_others,
    on_two_streams,
    rows_of,
    samples_and_ends,
    samples_and_neighbours,
    samples_of,
    served_by,
    worst_row,
)
from kernel_cases import between, largest_logit, offset_by_one, with_gaps

import stablevelocity_kernels as svel
from stablevelocity_kernels import info, reference
from stablevelocity_kernels.testing import TOLERANCE, make_noisy, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
prefer = served_by("many_rows")
# Rows: tiles of 64, 128 and 256 whole and cut, and more than one pass. D: steps of 64 and tiles of 128 whole and cut,
# lists that shared memory holds and longer samples.
SHAPES = [
    (33, 20_000, 1032),
    (64, 30_000, 520),
    (127, 5003, 1032),
    (700, 20_001, 136),
    (200, 4999, 3400),
    (256, 4096, 3072),
    (257, 3001, 4104),
    (300, 5003, 200),
    (600, 2600, 784),
    (1025, 2569, 384),
]
SHAPE = (130, 4999, 1032)
ROUNDS = (300, 30_011, 3080)  # more references than the workspace has room for halves of
CLASSES = [(256, 10, 1001, 3072), (321, 4, 4219, 2056), (200, 2, 1301, 1032), (1100, 3, 2507, 784)]
PRECISIONS = ("exact", "fast")
LIMIT = TOLERANCE[torch.float32, "exact"]


def make(n, m, d, geometry, rng, **options):
    return make_pool(n, m, d, geometry, rng, dtype=torch.float32, **options)


def check(x, refs, t, counts=None, precision="exact", **options):
    assert_served("many_rows", x, refs, precision)
    return check_pool(x, refs, t, counts, precision=precision, **options)


def check_classes(x, refs, t, labels, counts=None, precision="exact", **options):
    assert_served("many_rows", x, refs, precision)
    out = svel.stable_target(x, refs, t, labels, counts, precision=precision, **options)
    expected = reference.stable_target(x.double(), refs, t, labels, counts, **options)
    assert_close_at_each_time(out, expected, t, precision)
    return out


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_shapes(rng, n, m, d, geometry, precision):
    check(*make(n, m, d, geometry, rng), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rounds(rng, geometry, precision):
    n, m, d = ROUNDS
    x, refs, t = make(n, m, d, geometry, rng)
    plan = info.plan(n, m, d, refs_dtype=refs.dtype, precision=precision)
    assert plan["refs_per_pass"] < m or plan["kernel"] != "many_rows"
    check(x, refs, t, precision=precision)
    count = torch.tensor([m // 3], device="cuda")  # the last rounds have no references
    check(x, invalidate(refs, m // 3), t, count, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.05, 0.5, 0.8, 0.95, 0.999])
def test_one_time_for_all_rows(rng, time, geometry, precision):
    """No row has many references that matter, or every row has."""
    check(*make(300, 8200, 1024, geometry, rng, times=(time,)), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("time", [0.02, 0.1, 0.2, 0.3, 0.6, 0.68, 0.8, 0.98])
def test_photographs_at_one_time(rng, time, precision):
    check(*make_photograph_pool(256, 20_000, 32, rng, torch.float32, times=(time,)), precision=precision)


@pytest.mark.parametrize(
    "time", [0.05, 0.1, pytest.param(0.15, marks=pytest.mark.xfail(reason="a row is off by 5.4e-6", strict=False))]
)
def test_every_row_of_photographs_with_little_noise(rng, time):
    for m, side in ((50_000, 32), (5000, 40)):
        x, refs, t = make_photograph_pool(256, m, side, rng, torch.float32, times=(time,))
        assert worst_row(check(x, refs, t), reference.stable_target(x.double(), refs, t)) <= LIMIT


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0, 1000.0])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_data_of_any_size_and_far_from_the_origin(rng, size, offset, precision):
    """Noise of the size of the data: weights are those of size one, which spread or not."""
    n, m, d = SHAPE
    refs = size * (offset * torch.randn(d, generator=rng) + torch.randn(m, d, generator=rng))
    sigma = size * torch.tensor([0.05, 0.3, 0.8, 5.0, 40.0, 600.0])[torch.arange(n) % 6]
    alpha = torch.ones(n)
    x = refs[torch.randint(m, (n,), generator=rng)] + sigma[:, None] * torch.randn(n, d, generator=rng)
    x, refs, alpha, sigma = x.cuda(), refs.cuda(), alpha.cuda(), sigma.cuda()
    assert_served("many_rows", x, refs, precision)
    mean, lse = svel.posterior_mean(x, refs, alpha, sigma, precision=precision)
    expected_mean, expected = reference.posterior_mean(x.double(), refs, alpha, sigma)
    for value in sigma.unique():
        rows = sigma == value
        assert relative_error(mean[rows], expected_mean[rows]) <= TOLERANCE[torch.float32, precision]
        if precision == "exact" and value <= 50 * size:  # beside what the common part hides, but for its last digits
            apart = (expected_mean[rows] - refs.double().mean(0)).norm()
            assert (mean[rows] - expected_mean[rows]).norm() <= LIMIT * apart + 2**-24 * expected_mean[rows].norm()
    scale = largest_logit(x, refs, alpha, sigma)
    assert ((lse - expected).abs() <= TOLERANCE[torch.float32, precision] * scale).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("copies", [2, 250, 256, 257, 400])
def test_as_many_survivors_as_the_list_holds(rng, copies, precision):
    x, refs, t = make(70, 4096, 1032, "gaussian", rng, times=(0.3,))
    refs[1000 : 1000 + copies] = refs[1000]
    x = (0.7 * refs[1000] + 0.3 * torch.randn(x.shape, generator=rng).cuda()).contiguous()
    check(x, refs, t, precision=precision, prediction="x0")


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("n", [70, 300, 1300])
def test_rows_of_many_survivors_lie_anywhere(rng, n, share):
    x, refs, t = make(n, 4096, 1032, "gaussian", rng, times=(0.3,))
    refs[1000:1300] = refs[1000]
    near = torch.rand(n, generator=rng).cuda() < share
    x[near] = 0.7 * refs[1000] + 0.3 * torch.randn(int(near.sum()), x.shape[1], generator=rng).cuda()
    for precision in PRECISIONS:
        check(x, refs, t, precision=precision, prediction="x0")
    check(x, refs, t, counts=torch.tensor([4000], device="cuda"))


@pytest.mark.parametrize("time", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("d", [264, 1032, 4104])
def test_rows_between_two_references(rng, d, time):
    """Weights depend on the last digits of scores. Each row by itself."""
    n, m = 256, 8000
    refs = torch.randn(m, d, generator=rng).cuda()
    t = torch.full((n,), time, device="cuda")
    a, b = (refs[torch.randint(m, (n,), generator=rng).cuda()] for _ in range(2))
    x = between(a, b, (1 - t[:, None]).double(), t[:, None].double())
    assert worst_row(check(x, refs, t), reference.stable_target(x.double(), refs, t)) <= LIMIT


@pytest.mark.parametrize(("apart", "time"), [(1e-4, 0.1), (1e-3, 0.1), (1e-3, 0.3), (1e-2, 0.3)])
def test_references_next_to_one_another(rng, apart, time):
    """Crowds about two opposite points, so that no centre makes scores small: halves hardly tell members apart."""
    m, d = 4000, 1032
    point = torch.randn(d, generator=rng)
    side = 1 - 2 * (torch.arange(m)[:, None] % 2)
    check(*rows_of(point * side + apart * torch.randn(m, d, generator=rng), 128, rng, (time,)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("factor", "geometry"), [(2e3, "gaussian"), (1e6, "gaussian"), (1e12, "gaussian"), (1e6, "shifted")]
)
@pytest.mark.parametrize("shape", [(130, 4999, 1032), ROUNDS], ids=str)
def test_one_sample_is_far_larger_than_others(rng, shape, factor, geometry, precision):
    """Nor is it among those that the scale is from. Halves do not reach a million times the others."""
    x, refs, t = make(*shape, geometry, rng)
    refs[1] *= factor
    x[7] = (1 - t[7]) * refs[1] + t[7] * torch.randn(refs.shape[1], generator=rng).cuda()
    assert_served("many_rows", x, refs, precision)
    keep = torch.arange(len(x), device="cuda") != 7
    out = svel.stable_target(x, refs, t, precision=precision)
    # It has all the weight or none; beside it float64 would not tell the others apart.
    expected = reference.stable_target(x.double(), torch.cat([refs[:1], refs[2:]]), t)
    assert_close_at_each_time(out[keep], expected[keep], t[keep], precision)
    expected = reference.stable_target(x[7:8].double(), refs[1:2], t[7:8])
    assert relative_error(out[7:8], expected) <= TOLERANCE[torch.float32, precision]


def make_far(refs, size):
    """Four in a row after each of those that the scale is from, `size` times as large as they were."""
    m = len(refs)
    far = (m * torch.arange(64)[:, None] // 64 + torch.arange(1, 5)).flatten().to(refs.device)
    refs[far] *= size
    return far


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e6, 1e12])
def test_many_far_samples_and_noise_of_any_size(rng, size, precision):
    """With noise of their size they weigh as others do; each has a row of its own, too."""
    n, m, d = 300, *SHAPE[1:]
    refs = torch.randn(m, d, generator=rng)
    far = make_far(refs, size)
    sigma = torch.tensor([0.3, 30.0, 0.1 * size, 12 * size, 1e3 * size])[torch.arange(n) % 5]
    near = m * torch.randint(64, (n,), generator=rng) // 64
    near = torch.where(torch.arange(n) % 3 == 0, far[torch.arange(n) % len(far)], near)
    x = refs[near] + sigma[:, None] * torch.randn(n, d, generator=rng)
    x, refs, sigma, alpha = x.cuda(), refs.cuda(), sigma.cuda(), torch.ones(n).cuda()
    assert_served("many_rows", x, refs, precision)
    mean, lse = svel.posterior_mean(x, refs, alpha, sigma, precision=precision)
    expected_mean, expected = reference.posterior_mean(x.double(), refs, alpha, sigma)
    # With little noise far ones have all the weight or none; beside them float64 would not tell the others apart.
    is_far, little = (torch.arange(n) % 3 == 0).cuda(), sigma <= 30
    others = refs[~torch.isin(torch.arange(m, device="cuda"), far.cuda())]
    rows = little & ~is_far
    expected_mean[rows], expected[rows] = reference.posterior_mean(x[rows].double(), others, alpha[rows], sigma[rows])
    expected_mean[little & is_far] = refs[near.cuda()][little & is_far].double()
    for value in sigma.unique():
        for rows in ((sigma == value) & is_far, (sigma == value) & ~is_far):
            assert relative_error(mean[rows], expected_mean[rows]) <= TOLERANCE[torch.float32, precision]
    assert lse.isfinite().all()
    for rows, seen in ((little & ~is_far, others), (~little, refs)):
        scale = largest_logit(x[rows], seen, alpha[rows], sigma[rows])
        assert ((lse - expected)[rows].abs() <= TOLERANCE[torch.float32, precision] * scale).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_far_samples_where_there_is_noise_alone(rng, precision):
    """All references weigh the same, or nearly, however far."""
    x, refs, sigma = make(*SHAPE, "gaussian", rng, times=(1.0,))
    make_far(refs, 1e6)
    alpha = torch.tensor([0.0, 1e-12, 1e-8], device="cuda")[torch.arange(len(x)) % 3]
    assert_served("many_rows", x, refs, precision)
    mean = svel.posterior_mean(x, refs, alpha, sigma, precision=precision)[0]
    expected = reference.posterior_mean(x.double(), refs, alpha, sigma)[0]
    for value in alpha.unique():
        assert relative_error(mean[alpha == value], expected[alpha == value]) <= TOLERANCE[torch.float32, precision]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", CLASSES, ids=str)
def test_outliers_among_the_samples_of_classes(rng, shape, precision):
    x, refs, t, labels = make_classes(*shape, "gaussian", rng, torch.float32)
    flat = refs.view(-1, refs.shape[2])
    flat[samples_of(len(flat))[[3, 40, 63]].cuda()] *= 1e6
    flat[samples_of(len(flat))[[5]].cuda(), 77] = 1e7
    check_classes(x, refs, t, labels, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", CLASSES, ids=str)
def test_far_samples_of_classes(rng, shape, precision):
    x, refs, t, labels = make_classes(*shape, "gaussian", rng, torch.float32)
    refs[0, 1], refs[-1, -2] = 1e6 * refs[0, 1], 1e6 * refs[-1, -2]
    check_classes(x, refs, t, labels, precision=precision)
    x[5] = (1 - t[5]) * refs[-1, -2] + t[5] * torch.randn(refs.shape[2], generator=rng).cuda()
    labels[5] = refs.shape[0] - 1
    out = svel.stable_target(x, refs, t, labels, precision=precision)[5]
    expected = reference.stable_target(x[5:6].double(), refs, t[5:6], labels[5:6])[0]
    assert relative_error(out, expected) <= TOLERANCE[torch.float32, precision]


def test_far_samples_beside_what_is_not_finite(rng):
    x, refs, t = make(*SHAPE, "gaussian", rng)
    far = make_far(refs, 1e6)
    for value in (math.nan, math.inf):
        refs[4000, 7] = value
        assert svel.stable_target(x, refs, t).isnan().all()
    out = svel.stable_target(x, refs, t, counts=torch.tensor([4000], device="cuda"))
    # Far ones have no weight; centred between them float64 would not tell the others apart.
    others = refs[:4000][~torch.isin(torch.arange(4000, device="cuda"), far)]
    assert_close_at_each_time(out, reference.stable_target(x.double(), others, t), t, "exact")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [100.0, 600.0, 3e3, 2e4, 1e6, 1e12])
@pytest.mark.parametrize("among", [True, False], ids=["sample", "beside"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "element"])
def test_an_outlier(rng, whole, among, size, precision):
    """Among the references that the scale is from, or beside them; not far, nearly and far. Others keep digits."""
    x, refs, t = make(*SHAPE, "gaussian", rng)
    far = samples_of(len(refs))[[17]] + (0 if among else 1)
    if whole:
        refs[far] *= size
    else:
        refs[far, 77] = size
    assert_served("many_rows", x, refs, precision)
    check_beside_far(x, refs, t, far, precision, only_beside=size >= 1e6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("count", [3, 8, 9, 28])
def test_outliers_among_the_samples_and_beside_them(rng, count, geometry, precision):
    x, refs, t = make(*SHAPE, geometry, rng)
    check_outliers(x, refs, t, samples_and_neighbours(len(refs), count), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_outliers_of_many_rounds(rng, precision):
    x, refs, t = make(*ROUNDS, "gaussian", rng)
    check_outliers(x, refs, t, samples_and_ends(len(refs)), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["half", "few", "most"])
@pytest.mark.parametrize("size", [2.0**-7, 2.0**-12, 2.0**-18])
def test_references_of_two_sizes(rng, size, kind, precision):
    """By nature, not by accident: halves reach both, or those that they do not reach are summed as stored."""
    refs, kinds = make_two_sizes(*SHAPE[1:], size, kind, rng)
    check_mean_near_each(refs, kinds, (1.0, size), rng, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [2.0**-18, 2.0**-30])
def test_small_references_that_no_sample_shows(rng, size, precision):
    """So small that beside scores of the others float64 has no digits for theirs."""
    m, d = SHAPE[1:]
    kinds = (torch.arange(m) % 40 == 7).long()
    kinds[samples_of(m)] = 0
    refs = torch.randn(m, d, generator=rng) * torch.where(kinds == 1, size, 1.0)[:, None]
    check_mean_near_each(refs, kinds, (1.0, size), rng, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_and_few_others(rng, precision):
    """Nearly all are copies of zero, one that is far is among the samples."""
    refs, far = make_zeros_and_few_others(*SHAPE[1:], rng)
    x, refs, t = rows_of(refs, 130, rng)
    assert_served("many_rows", x, refs, precision)
    check_beside_far(x, refs, t, far, precision)


def test_copies_of_one_sample_alone(rng):
    """All samples that the centre is from are equal, and the others are far away."""
    refs = torch.full((6400, 1032), 3e4)
    refs[50::100] = 3e4 + torch.randn(64, 1032, generator=rng)
    t = torch.tensor([0.3, 0.9])[torch.arange(70) % 2]
    x = make_noisy(refs[torch.arange(70) * 91], t, rng)
    check(x.cuda(), refs.cuda(), t.cuda())


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    names = kernels_run(svel.stable_target, *make(*SHAPE, "gaussian", rng))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("halves_kernel" in name for name in names), names


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path):
    check(*make(*SHAPE, "manifold", rng), prediction=prediction, path=path)


@pytest.mark.parametrize("count", [-3, 0, 1, 31, 32, 33, 500, 4994, 4999, 6000])
def test_counts(rng, count):
    x, refs, t = make(*SHAPE, "manifold", rng)
    out = check(x, invalidate(refs, count), t, torch.tensor([count], device="cuda"))
    assert out.isnan().all() == (count <= 0)


def test_what_is_not_finite(rng):
    """Rows stay alone; a reference is seen by every row."""
    x, refs, t = make(300, *SHAPE[1:], "manifold", rng)
    x[3, 5], x[9, 0], x[299, -1], t[4] = math.nan, math.inf, -math.inf, math.nan
    out = check(x, refs, t)
    assert out.isnan().all(1).nonzero()[:, 0].tolist() == [3, 4, 9, 299]
    for value in (math.nan, math.inf):
        refs[4000, 7] = value
        assert svel.stable_target(x, refs, t).isnan().all()


def test_x_of_any_dtype_and_alignment(rng):
    x, refs, t = make(*SHAPE, "manifold", rng)
    for dtype in (torch.float16, torch.bfloat16):
        check(x.to(dtype), refs, t)
    check(offset_by_one(x), refs, t)
    check(with_gaps(x), with_gaps(refs), t)


@pytest.mark.parametrize("d", [1031, 1028])
def test_samples_that_others_serve(rng, d):
    """References that are no whole number of eight elements."""
    check_pool(*make(130, 4999, d, "manifold", rng))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mean_and_lse(rng, precision):
    check_mean_and_lse(*make(*SHAPE, "gaussian", rng, times=(0.5, 0.8, 0.95)), precision)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.5, 0.9, 0.98, 0.998])
def test_parts_merge_over_disjoint_halves(rng, time, geometry):
    x, refs, sigma = make(90, 12_007, 1032, geometry, rng, times=(time,))
    check_merged_halves(svel.posterior_part, x, refs, sigma, 5997, LIMIT)


def test_repeats_bit_for_bit(rng):
    for shape in ((300, 8009, 1024), ROUNDS):
        check_repeats(*make(*shape, "manifold", rng), times=3)


def test_nothing_waits_and_a_graph_follows_its_inputs(rng):
    def problem(geometry, count):
        return [*make(*SHAPE, geometry, rng), torch.tensor([count], device="cuda")]

    others = (("shifted", 4999), ("gaussian", 4999), ("manifold", 17), ("shifted", 0))
    check_graph_of_pool(problem("manifold", 4000), (problem(*other) for other in others))


def test_two_streams_at_once(rng):
    problems = [make(130, 6007, 1024, "manifold", rng), make(300, 5003, 784, "gaussian", rng)]
    for out, right in on_two_streams(svel.stable_target, problems):
        assert torch.equal(out, right)


def test_large(rng):
    """More elements than 32 bits count; the workspace stays bounded."""
    n, m, d = 65, 540_001, 4096
    refs = torch.empty(m, d, device="cuda")
    for chunk in refs.split(1 << 15):
        chunk.normal_()
    t = torch.tensor([0.2, 0.8, 0.95, 0.999], device="cuda")[torch.arange(n) % 4]
    x = (1 - t[:, None]) * refs[m - n :] + t[:, None] * torch.randn(n, d, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = svel.stable_target(x, refs, t)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < 256 << 20
    del out
    check(x, refs, t)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "k", "m", "d"), CLASSES)
def test_classes(rng, n, k, m, d, geometry, precision):
    check_classes(*make_classes(n, k, m, d, geometry, rng, torch.float32), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", CLASSES, ids=str)
def test_classes_partly_filled(rng, shape, geometry, precision):
    check_partly_filled(check_classes, shape, geometry, rng, torch.float32, precision)

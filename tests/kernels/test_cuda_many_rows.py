"""The kernel of many rows against one pool of 16-bit references: every path through it, edges and arguments."""

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
    check_pool,
    check_repeats,
    invalidate,
    kernels_run,
    make_classes,
    make_large_pool,
    make_photograph_pool,
    make_pool,
    make_pool_of_size,
    make_two_sizes,
    make_zeros_and_few_others,
    on_two_streams,
    rows_of,
    samples_and_ends,
    samples_and_neighbours,
    samples_of,
    served_by,
)
from kernel_cases import largest_logit, offset_by_one, with_gaps

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.paths import path_coefficients
from stablevelocity_kernels.testing import TOLERANCE, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
prefer = served_by("many_rows")
# Rows: tiles of 64, 128 and 256 whole and cut, and more than one pass. References: whole tiles and not. D: steps of 64
# and tiles of 128 whole and cut.
SHAPES = [
    (65, 2568, 256),
    (70, 2611, 264),
    (127, 5003, 1032),
    (129, 4100, 520),
    (200, 4999, 3400),
    (256, 4096, 3072),
    (257, 3001, 4096),
    (600, 2600, 784),
    (1025, 2569, 384),
]
SHAPE = (130, 4999, 1032)
PRECISIONS = ("exact", "fast")
DTYPES = (torch.float16, torch.bfloat16)


def check(x, refs, t, counts=None, source=None, precision="exact", **options):
    """`check_pool`, by this kernel."""
    if source is None:  # which has other kernels; their tests hold here too
        assert_served("many_rows", x, refs, precision)
    return check_pool(x, refs, t, counts, source, precision=precision, **options)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def test_shapes(rng, n, m, d, geometry, dtype, precision):
    check(*make_pool(n, m, d, geometry, rng, dtype=dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "side"), [(66, 20_000, 32), (300, 5003, 16)])
def test_photographs(rng, n, m, side, dtype, precision):
    check(*make_photograph_pool(n, m, side, rng, dtype), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("time", [0.02, 0.1, 0.15, 0.2, 0.3, 0.6, 0.68, 0.8])
@pytest.mark.parametrize("n", [256, 520])
def test_photographs_at_one_time(rng, n, time, precision):
    """Rows near some references have thousands that matter, others one; all are expected to be dense, or none."""
    check(*make_photograph_pool(n, 20_000, 32, rng, times=(time,)), precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("time", [0.05, 0.1, 0.15])
def test_every_row_of_photographs_with_little_noise(rng, time, dtype):
    """Scores are large for their digits, where references near one another share the weight. D whose lists fit shared
    memory, and beyond."""
    for m, side in ((50_000, 32), (5000, 40)):
        x, refs, t = make_photograph_pool(256, m, side, rng, dtype, times=(time,))
        out, expected = check(x, refs, t), reference.stable_target(x.double(), refs, t)
        errors = (out - expected).norm(dim=1) / expected.norm(dim=1)
        assert (errors <= TOLERANCE[torch.float32, "exact"]).all(), errors.max().item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.05, 0.5, 0.8, 0.95, 0.999])
def test_one_time_for_all_rows(rng, time, geometry, precision):
    """No row has many references that matter, or every row has."""
    check(*make_pool(300, 8200, 1024, geometry, rng, times=(time,)), precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("copies", [2, 250, 256, 257, 400])
def test_as_many_survivors_as_the_list_holds(rng, copies, precision):
    """The weights of `copies` equal references are equal: the list is full, or one too short."""
    x, refs, t = make_pool(70, 4096, 512, "gaussian", rng, times=(0.3,))
    refs[1000 : 1000 + copies] = refs[1000]
    x = (0.7 * refs[1000] + 0.3 * torch.randn(x.shape, generator=rng).cuda()).contiguous()
    check(x, refs, t, precision=precision, prediction="x0")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
@pytest.mark.parametrize("n", [70, 300, 1300])
def test_rows_of_many_survivors_lie_anywhere(rng, n, share, precision):
    """All rows have one time, but some are near references that have hundreds of equals. Several passes too."""
    x, refs, t = make_pool(n, 4096, 512, "gaussian", rng, times=(0.3,))
    refs[1000:1300] = refs[1000]
    near = torch.rand(n, generator=rng).cuda() < share
    x[near] = 0.7 * refs[1000].float() + 0.3 * torch.randn(int(near.sum()), 512, generator=rng).cuda()
    check(x, refs, t, precision=precision, prediction="x0")
    check(x, refs, t, precision=precision, counts=torch.tensor([4000], device="cuda"))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("noisy", [1, 65, 90, 128, 250])
@pytest.mark.parametrize("n", [64, 128, 256, 330])
def test_some_rows_are_expected_to_be_dense(rng, n, noisy, geometry):
    """Their scores are formed in full at once, in tiles of other shapes; that of others later, if at all."""
    x, refs, t = make_pool(n, 4999, 1032, geometry, rng, times=(0.3,))
    near = torch.randperm(n, generator=rng)[:noisy].cuda()
    noise = torch.randn(len(near), x.shape[1], generator=rng).cuda()
    t[near], x[near] = 0.97, 0.03 * refs[: len(near)].float() + 0.97 * noise
    check(x, refs, t)
    lse = svel.posterior_mean(x, refs, 1 - t, t)[1]
    expected = reference.posterior_mean(x.double(), refs, 1 - t, t)[1]
    scale = largest_logit(x, refs, 1 - t, t)
    assert ((lse - expected).abs() <= TOLERANCE[torch.float32, "exact"] * scale).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [100.0, 600.0, 3e3, 2e4, 1e6, 1e12])
@pytest.mark.parametrize("among", [True, False], ids=["sample", "beside"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "element"])
def test_an_outlier_of_bfloat16(rng, whole, among, size, precision):
    """Among the references that the scale is from, or beside them; not far, nearly and far. Others keep digits."""
    x, refs, t = make_pool(*SHAPE, "gaussian", rng, dtype=torch.bfloat16)
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
def test_bfloat16_outliers_among_the_samples_and_beside_them(rng, count, geometry, precision):
    x, refs, t = make_pool(*SHAPE, geometry, rng, dtype=torch.bfloat16)
    check_outliers(x, refs, t, samples_and_neighbours(len(refs), count), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bfloat16_outliers_of_many_rounds(rng, precision):
    x, refs, t = make_pool(256, 150_001, 264, "gaussian", rng, dtype=torch.bfloat16)
    check_outliers(x, refs, t, samples_and_ends(len(refs)), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["half", "few", "most"])
@pytest.mark.parametrize("size", [2.0**-7, 2.0**-12, 2.0**-18])
def test_bfloat16_of_two_sizes(rng, size, kind, precision):
    """By nature, not by accident: halves reach both, or those that they do not reach are summed as stored."""
    refs, kinds = make_two_sizes(*SHAPE[1:], size, kind, rng)
    check_mean_near_each(refs.to(torch.bfloat16), kinds, (1.0, size), rng, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bfloat16_zeros_and_few_others(rng, precision):
    """Nearly all are copies of zero, one that is far is among the samples."""
    refs, far = make_zeros_and_few_others(*SHAPE[1:], rng)
    x, refs, t = rows_of(refs.to(torch.bfloat16), 130, rng)
    assert_served("many_rows", x, refs, precision)
    check_beside_far(x, refs, t, far, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("shape", [(256, 10, 1001, 3072), (321, 4, 4219, 2056), (1100, 3, 2507, 784)], ids=str)
def test_bfloat16_outliers_of_classes(rng, shape, geometry, precision):
    x, refs, t, labels = make_classes(*shape, geometry, rng, torch.bfloat16)
    k, valid = shape[1], shape[2] - 1
    samples = samples_of(k * valid).cuda()
    classes, own = samples // valid, samples % valid
    for s in (3, 40, 63):
        refs[classes[s], own[s]] *= 1e6
    refs[classes[5], own[5] + 1, 77] = 1e7
    counts = torch.full((k,), valid, device="cuda")
    refs[:, -1] = math.nan
    labels[4], own, t[4] = classes[3], own[3], 0.51
    x[4] = (1 - t[4]) * refs[labels[4], own] + t[4] * torch.randn(shape[3], generator=rng).cuda()
    assert_served("many_rows", x, refs, precision)
    out = svel.stable_target(x, refs, t, labels, counts, precision=precision)
    expected = reference.stable_target(x.double(), refs, t, labels, counts)
    assert_close_at_each_time(out, expected, t, precision)


def test_bfloat16_outliers_beside_what_is_not_finite(rng):
    """All rows of a pool see it, also where it is far as well; beyond the count none does."""
    x, refs, t = make_pool(*SHAPE, "gaussian", rng, dtype=torch.bfloat16)
    far = samples_of(len(refs))[[2, 50]] + torch.tensor([0, 1])
    refs[far] *= 1e6
    for value in (math.nan, math.inf, -math.inf):
        refs[4500, 7] = value
        assert svel.stable_target(x, refs, t).isnan().all()
    check_beside_far(x, refs, t, far, counts=torch.tensor([4500], device="cuda"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bfloat16_outliers_where_there_is_noise_alone(rng, precision):
    x, refs, sigma = make_pool(*SHAPE, "gaussian", rng, dtype=torch.bfloat16, times=(1.0,))
    refs[samples_of(len(refs))[5:9] + 1] *= 1e6
    alpha = torch.tensor([0.0, 1e-12, 1e-8], device="cuda")[torch.arange(len(x)) % 3]
    mean = svel.posterior_mean(x, refs, alpha, sigma, precision=precision)[0]
    expected = reference.posterior_mean(x.double(), refs, alpha, sigma)[0]
    for value in alpha.unique():
        assert relative_error(mean[alpha == value], expected[alpha == value]) <= TOLERANCE[torch.float32, precision]


def test_the_kernel_serves(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("another kernel serves this device")
    x, refs, t = make_pool(*SHAPE, "gaussian", rng)
    names = kernels_run(svel.stable_target, x, refs, t)
    if not names:
        pytest.skip("the profiler sees no kernels here")
    assert any("sum_kernel" in name and "Many" in name for name in names), names


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0", "noise", "score"])
def test_every_prediction_and_path(rng, prediction, path):
    check(*make_pool(*SHAPE, "manifold", rng), prediction=prediction, path=path)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("count", [-3, 0, 1, 31, 32, 33, 500, 4994, 4999, 6000])
def test_counts(rng, count, dtype):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
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


@pytest.mark.parametrize("n", [70, 300])
def test_rows_that_are_not_finite_stay_alone(rng, n):
    x, refs, t = make_pool(n, *SHAPE[1:], "manifold", rng)
    x[3, 5], x[9, 0], x[n - 1, -1], t[4] = math.nan, math.inf, -math.inf, math.nan
    out = check(x, refs, t)
    assert out.isnan().all(1).nonzero()[:, 0].tolist() == [3, 4, 9, n - 1]
    assert svel.stable_target(x, refs, t * math.nan).isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [1e-6, 3e3])
def test_data_of_any_size(rng, size, precision):
    check(*make_pool_of_size(*SHAPE, size, rng), precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_any_dtype_and_alignment(rng, dtype):
    x, refs, t = make_pool(*SHAPE, "manifold", rng)
    check(x.to(dtype), refs, t)
    out = svel.stable_target(x, refs, t)
    assert torch.equal(svel.stable_target(offset_by_one(x), refs, t), out)
    assert torch.equal(svel.stable_target(with_gaps(x), with_gaps(refs), t), out)


def test_samples_of_several_dimensions(rng):
    x, refs, t = make_pool(130, 2999, 1024, "gaussian", rng)
    out = svel.stable_target(x.view(130, 4, 16, 16), refs.view(2999, 4, 16, 16), t)
    assert torch.equal(out.view(130, 1024), svel.stable_target(x, refs, t))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mean_and_lse(rng, precision):
    x, refs, sigma = make_pool(*SHAPE, "gaussian", rng, times=(0.5, 0.8, 0.95))
    for left_out in (0, 700):
        check_mean_and_lse(x.clone(), refs, sigma.clone(), precision, left_out)


@pytest.mark.parametrize("op", ["posterior_mean", "posterior_part"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("time", [0.5, 0.9, 0.98, 0.998])
def test_lse_merges_over_disjoint_halves(rng, time, geometry, op):
    x, refs, sigma = make_pool(90, 10_007, 1032, geometry, rng, times=(time,))
    limit = TOLERANCE[torch.float32, "exact" if op == "posterior_part" else "fast"]
    check_merged_halves(getattr(svel, op), x, refs, sigma, 4997, limit)


@pytest.mark.parametrize("n", [32, 64, 128])
def test_every_row_of_a_pool_that_few_rows_share(n):
    """The tiles of few rows wait for their references, which arrive in any order. Up to 64 rows `stable_target` leaves
    this kernel what the pool kernel has doubts about."""
    torch.manual_seed(0)
    t = torch.tensor([0.7, 0.9, 0.98, 0.999], device="cuda").repeat(n // 4)
    alpha, sigma = (v.float() for v in path_coefficients("cosine", t.double())[:2])
    for _ in range(5):
        refs = make_large_pool(n, 16_384, 4096)[1]
        x0 = refs[torch.randint(len(refs), (n,), device="cuda")]
        x = alpha[:, None] * x0 + sigma[:, None] * torch.randn(x0.shape, device="cuda")
        for call in (
            lambda of, x, refs=refs: of.posterior_mean(x, refs, alpha, sigma)[0],
            lambda of, x, refs=refs: of.stable_target(x, refs, t, path="cosine", prediction="x0"),
        ):
            out, expected = call(svel, x), call(reference, x.double())
            assert torch.equal(call(svel, x), out)
            errors = (out - expected).norm(dim=1) / expected.norm(dim=1)
            assert (errors <= TOLERANCE[torch.float32, "exact"]).all(), errors.view(-1, 4).amax(0).tolist()


def test_repeats_bit_for_bit(rng):
    x, refs, t = make_pool(300, 8009, 1024, "manifold", rng)
    check_repeats(x, refs, t)


def test_nothing_waits_and_a_graph_follows_its_inputs(rng):
    def problem(geometry, count):
        return [*make_pool(*SHAPE, geometry, rng), torch.tensor([count], device="cuda")]

    others = (("shifted", 4999), ("gaussian", 4999), ("manifold", 17), ("shifted", 0))
    check_graph_of_pool(problem("manifold", 4000), (problem(*other) for other in others))


def test_two_streams_at_once(rng):
    problems = [make_pool(130, 6007, 1024, "manifold", rng), make_pool(300, 5003, 784, "gaussian", rng)]
    for out, right in on_two_streams(svel.stable_target, problems):
        assert torch.equal(out, right)


@pytest.mark.parametrize(("n", "m", "d"), [(256, 150_001, 264), (65, 540_001, 4096)], ids=["many rounds", "2^31"])
def test_large(n, m, d):
    """More references than one round scores, and more elements than 32 bits count; the workspace stays bounded."""
    x, refs, t = make_large_pool(n, m, d)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = svel.stable_target(x, refs, t)
    assert torch.cuda.max_memory_allocated() - before - out.nbytes < 256 << 20
    del out
    check(x, refs, t)
    check(x, refs, t, prediction="x0", precision="fast")


def test_more_rows_than_one_list_holds():
    x, refs, t = make_large_pool(2 * 16_384 + 77, 2050, 256)
    check(x, refs, t)


def test_problems_that_others_serve(rng):
    """One row, few references, other alignments and dtypes: right as before. Labels of one class are for this one."""
    x, refs, t = make_pool(70, 4999, 1032, "manifold", rng)
    assert_served("held", x, refs[:2000], "exact")
    assert_served("bulk", x, refs[:2000].float(), "exact")
    expected = reference.stable_target(x.double(), refs, t)
    for out in (
        svel.stable_target(x[:1], refs, t[:1]),
        svel.stable_target(x, refs[None], t, torch.zeros(70, dtype=torch.int64, device="cuda")),
        svel.stable_target(x, offset_by_one(refs), t),
        svel.stable_target(x, refs.float(), t),  # other forms of this one
    ):
        assert relative_error(out, expected[: len(out)]) <= TOLERANCE[torch.float32, "exact"]
    assert svel.stable_target(x[:0], refs, t[:0]).shape == (0, 1032)

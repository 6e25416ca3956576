"""What only the CUDA kernels can get wrong: every planned kernel at its edges, no synchronisation, repeatability.

The contract of each op is tested on every implementation in test_<op>.py; here shapes are chosen so that each launch
the planner can make is reached, with rows that straddle thread blocks.
"""

import math

import pytest
import torch
from cuda_cases import assert_close_at_each_time, captured, make_pool, nothing_waits, on_two_streams
from kernel_cases import ALL_T, direct_mean, largest_logit, make_problem, offset_by_one, photographs

import stablevelocity_kernels as svel
from stablevelocity_kernels import info, reference
from stablevelocity_kernels.testing import TOLERANCE, assert_close, make_noisy, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
EXACT = TOLERANCE[torch.float32, "exact"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
WITHIN_A_BLOCK = [12, 16, 24, 784, 1024, 1032, 2048, 2056, 3080, 4096]
OVER_BLOCKS = [4100, 4104, 8192, 12_288, 16_384, 16_392, 20_000, 32_768, 32_776, 40_000, 65_536, 65_544, 131_072]
# A size for each form of the bulk kernels: groups in a block of one, two, four, eight and sixteen warps, clusters of
# two and of more, all over the grid.
FORMS = [16, 1000, 1032, 4096, 8192, 8200, 16_392, 40_000, 65_544]


def on_gpu(*tensors):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors]


def check_bank(x, refs, t, labels, counts=None, source=None, prediction="velocity", unaligned=(), precision="exact"):
    """stable_target on the GPU against the reference in float64, rows of each time together; labels of any value.

    unaligned: which of "x", "refs" and "source" start one element off any alignment.
    """
    named = {"x": x, "refs": refs, "t": t, "labels": labels, "counts": counts, "source": source}
    args = {name: a if a is None else a.cuda() for name, a in named.items()}
    args.update({name: offset_by_one(args[name]) for name in unaligned})
    out = svel.stable_target(**args, prediction=prediction, precision=precision)
    wide = {name: args[name].double() for name in ("x", "source") if args[name] is not None}
    expected = reference.stable_target(**{**args, **wide}, prediction=prediction)
    assert_close_at_each_time(out, expected, args["t"], precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [4, 16, 32, 64])
def test_class_banks_of_photographs(rng, side, dtype):
    groups, m, n = 3, 200, 12
    refs = photographs(groups * m, side, rng).to(dtype).view(groups, m, -1)
    labels = torch.arange(n) % groups
    t = torch.tensor(ALL_T)[torch.arange(n) % len(ALL_T)]
    x = make_noisy(refs[labels, torch.randint(m, (n,), generator=rng)], t, rng)
    assert_kernel("bulk", n, refs)
    check_bank(x, refs, t, labels)


def assert_kernel(kernel, n, refs, labels=True, aligned=True):
    """A test of one kernel is none if another serves: bulk needs a GPU that can run it, the others are always there."""
    if kernel != "bulk" or torch.cuda.get_device_capability() >= (9, 0):
        k, m, d = refs.shape if labels else (None, *refs.shape)
        assert info.plan(n, m, d, k, refs_dtype=refs.dtype, aligned=aligned)["kernel"] == kernel


def make_bank(n, k, m, d, dtype, rng, geometry="shifted"):
    """x (n, d), refs (k, m, d) with NaN beyond the counts, t, labels with some null and out-of-range ones, counts."""
    refs = make_references(k * m, d, geometry, rng).reshape(k, m, d).to(dtype)
    counts = torch.randint(1, m + 1, (k,), generator=rng)
    counts[0] = m
    labels = torch.randint(k, (n,), generator=rng)
    t = torch.tensor([0.2, 0.5, 0.9, 0.98])[torch.randint(4, (n,), generator=rng)]
    picked = torch.stack([refs[y, torch.randint(int(counts[y]), (), generator=rng)] for y in labels])
    x = make_noisy(picked, t, rng)
    for group, count in zip(refs, counts.tolist(), strict=True):
        group[count:] = math.nan
    labels[:: max(2, n // 3)] = -1
    if n > 4:
        labels[3] = k
        labels[4] = -2
        t[1] = math.nan
    return x, refs, t, labels, counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [10, 127, 784, 1032, 2056, 4096, 4100, 8200, 16384])
def test_class_banks_of_unaligned_references(rng, d, dtype):
    x, refs, t, labels, counts = make_bank(9, 3, 37, d, dtype, rng)
    assert_kernel("stream", 9, refs, aligned=False)
    check_bank(x, refs, t, labels, counts, unaligned=["refs"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [*WITHIN_A_BLOCK, *OVER_BLOCKS])
def test_class_banks(rng, d, dtype):
    x, refs, t, labels, counts = make_bank(9, 3, 37 if d <= 8192 else 11, d, dtype, rng)
    if d * dtype.itemsize % 16 == 0:
        assert_kernel("bulk", 9, refs)
    check_bank(x, refs, t, labels, counts)


@pytest.mark.parametrize(
    ("n", "k", "m", "d", "dtype"),
    [
        (40_000, 50, 5, 64, torch.float32),
        (20_000, 3, 4, 24, torch.float16),
        (600, 5, 3, 65_544, torch.float16),
        (300, 3, 3, 131_072, torch.float32),
        (70, 2, 3, 1_048_584, torch.float16),
    ],
    ids=str,
)
def test_many_rows_have_room(n, k, m, d, dtype):
    """What is kept of every row, by groups of warps and by every block of a team."""
    gpu = torch.Generator("cuda").manual_seed(5)
    refs = torch.randn(k, m, d, device="cuda", generator=gpu).to(dtype)
    assert_kernel("bulk", n, refs)
    labels = torch.arange(n, device="cuda") % k
    t = torch.linspace(0.02, 0.99, n, device="cuda")
    noise = torch.randn(n, d, device="cuda", generator=gpu)
    x = noise.mul_(t[:, None]).add_((1 - t[:, None]) * refs[labels, 0].float())
    out = svel.stable_target(x, refs, t, labels)
    for rows in torch.arange(n, device="cuda").split(max(1, (1 << 27) // d)):
        expected = reference.stable_target(x[rows].double(), refs, t[rows], labels[rows])
        assert_close(out[rows], expected)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("k", "m", "d"), [(3, 5, 1_200_000), (3, 5, 2_097_152), (1, 300, 1_048_584)])
def test_longest_samples(k, m, d, x_dtype, source):
    """Up to 2,097,152 elements, where a thread has up to 32; a class without references, one of two segments."""
    gpu = torch.Generator("cuda").manual_seed(4)
    refs = torch.randn(k, m, d, device="cuda", generator=gpu, dtype=torch.float16)
    counts = torch.tensor([m, 0, m - 2][:k], device="cuda")
    for group, count in zip(refs, counts.tolist(), strict=True):
        group[count:] = math.nan
    labels = torch.tensor([0, 1, 2, -1, 2] if k > 1 else [0, -1], device="cuda")
    assert_kernel("bulk", len(labels), refs)
    # Of 300 references few have weight: the mean of all is so small that float32 sums are off by 3.6e-6 of it.
    t = torch.tensor([0.9995 if k > 1 else 0.997, 0.5, 0.3, 0.9999, 0.98], device="cuda")[: len(labels)]
    picked = refs[labels.clamp_min(0), 0].nan_to_num().float()
    x = ((1 - t[:, None]) * picked + t[:, None] * torch.randn(picked.shape, device="cuda", generator=gpu)).to(x_dtype)
    own = torch.randn(picked.shape, device="cuda", generator=gpu).to(x_dtype) if source else None
    together = svel.stable_target(x, refs, t, labels, counts, own)
    for i in range(len(labels)):  # one at a time: in float64 they are large
        row = slice(i, i + 1)
        its = None if own is None else own[row]
        mean, lse = svel.posterior_mean(x[row], refs, 1 - t[row], t[row], labels[row], counts, its)
        alone = svel.stable_target(x[row], refs, t[row], labels[row], counts, its)
        wide, rest = x[row].double(), (labels[row], counts, None if its is None else its.double())
        expected, expected_lse = reference.posterior_mean(wide, refs, 1 - t[row], t[row], *rest)
        empty = expected.isnan().any()
        assert empty == (counts[labels[i]] == 0 and not source and labels[i] >= 0)
        for ours, theirs in ((mean, expected), (lse, expected_lse)):
            assert torch.equal(ours.isnan(), theirs.isnan())
        target = reference.stable_target(wide, refs, t[row], *rest)
        for ours in (alone, together[row]):
            assert torch.equal(ours.isnan(), target.isnan())
        if not empty:
            assert_close(mean, expected)
            assert_close(alone, target)
            assert_close(together[row], target)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("geometry", ["gaussian", "manifold", "shifted"])
@pytest.mark.parametrize(
    ("n", "m", "d"),
    [
        (9, 37, 40),
        (2, 700, 128),
        (9, 37, 264),
        (300, 21, 512),
        (9, 37, 520),
        (2, 700, 1016),
        (300, 21, 1024),
        (9, 37, 1032),
        (300, 21, 2048),
        (3, 3000, 2056),
        (9, 5, 3080),
        (300, 37, 4096),
        (9, 37, 4104),
        (300, 21, 8192),
        (3, 3000, 8200),
        (9, 5, 12_288),
        (60, 37, 16_384),
        (5, 300, 16_392),
        (3, 70, 32_768),
    ],
)
def test_class_banks_on_the_matrix_units(rng, monkeypatch, n, m, d, geometry, source, precision):
    monkeypatch.setenv("SVEL_KERNEL", "bulk")
    x, refs, t, labels, counts = make_bank(n, 4, m, d, torch.float16, rng, geometry)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert info.plan(n, m, d, 4, precision=precision)["products"]
    check_bank(x, refs, t, labels, counts, x.flip(0) * 0.5 if source else None, precision=precision)
    labels = labels.clamp(max=0)  # two classes for all rows
    check_bank(x, refs, t, labels, counts, prediction="x0", precision=precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("d", "n", "m"),
    [
        (16, 2000, 37),
        (64, 2048, 21),
        (400, 2048, 21),
        (1000, 2048, 21),
        (1032, 1000, 21),
        (2056, 500, 21),
        (4096, 300, 37),
        (8200, 100, 19),
        (32_768, 40, 13),
        (40_000, 40, 9),
        (65_544, 30, 9),
        (131_072, 20, 6),
    ],
)
def test_many_rows_of_class_banks(rng, d, n, m, dtype):
    """More tiles than blocks: those of several units follow one another in a block, and blocks meet inside units."""
    x, refs, t, labels, counts = make_bank(n, 4, m, d, dtype, rng, "manifold")
    check_bank(x, refs, t, labels, counts, x.flip(0) * 0.5)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "m", "d", "dtype"),
    [
        (700, 300, 21, 64, torch.float16),
        (700, 300, 21, 512, torch.float16),
        (700, 300, 21, 1024, torch.float16),
        (700, 300, 600, 520, torch.bfloat16),
        (700, 300, 21, 1032, torch.float16),
        (700, 300, 21, 4096, torch.float16),
        (700, 300, 21, 4096, torch.bfloat16),
        (300, 40, 600, 2056, torch.float16),
        (40, 7, 1300, 4096, torch.float16),
    ],
)
def test_classes_of_a_few_rows(rng, n, k, m, d, dtype, source):
    """Up to four rows share a pass; of some rows one block has all, in one segment or in several; of few rows none."""
    if torch.cuda.get_device_capability() >= (9, 0) and dtype == torch.float16:
        assert info.plan(n, m, d, k)["tile_rows"] == 4
    x, refs, t, labels, counts = make_bank(n, k, m, d, dtype, rng, "manifold")
    check_bank(x, refs, t, labels, counts, x.flip(0) * 0.5 if source else None)


@pytest.mark.parametrize(
    ("n", "k", "m", "d", "dtype"), [(200, 40, 128, 8192, torch.float32), (100, 15, 128, 16_384, torch.float16)]
)
def test_units_that_share_a_long_class(rng, n, k, m, d, dtype):
    """They are dealt out; a quarter of the rows has one class, and not all classes are full."""
    refs = torch.randn(k, m, d, generator=rng).to(dtype)
    labels, t = torch.arange(n) % k, torch.tensor([0.7, 0.9])[torch.arange(n) % 2]
    labels[: n // 4] = 1
    x = make_noisy(refs[labels, 0].float(), t, rng)
    if torch.cuda.get_device_capability() >= (9, 0):
        assert info.plan(n, m, d, k, refs_dtype=dtype)["deal"]
    for counts in (None, torch.randint(m // 2, m + 1, (k,), generator=rng)):
        check_bank(x, refs, t, labels, counts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", FORMS)
def test_rows_of_one_class(rng, d, dtype):
    """Whole units and a last one that is not: rows of a unit have their own times, sources and weights."""
    x, refs, t, labels, counts = make_bank(14, 3, 13, d, dtype, rng, "manifold")
    for n in (1, 2, 3, 14):
        labels = torch.full((n,), 2)
        labels[8:] = 1
        check_bank(x[:n], refs, t[:n], labels, counts, x[:n].flip(0) * 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("d", "n", "m"),
    [
        (16, 1, 3000),
        (16, 3, 5000),
        (1024, 1, 3001),
        (1032, 1, 3001),
        (1032, 3, 5003),
        (4096, 1, 3000),
        (4096, 3, 4001),  # more would be for the pool kernel
        (8200, 3, 999),
        (40_000, 1, 301),
        (40_000, 3, 150),
        (65_544, 1, 203),
        (65_544, 3, 101),
    ],
)
def test_few_rows_over_all_blocks(rng, d, n, m, dtype):
    """Every block has a part of a row, which one of them, or a launch of its own, merges."""
    refs = make_references(m, d, "manifold", rng).to(dtype)
    t = torch.tensor([0.9, 0.5, 0.98])[:n]
    x = make_noisy(refs[torch.randint(m, (n,), generator=rng)].float(), t, rng)
    assert_kernel("bulk", n, refs, labels=False)
    check_bank(x, refs, t, None)
    check_bank(x, refs, t, None, torch.tensor([m - 5]), x.flip(0) * 0.5)
    check_bank(x, refs[None], t, torch.zeros(n, dtype=torch.int64), prediction="x0")


@pytest.mark.parametrize(
    ("d", "n", "dtype"),
    [
        (16, 1600, torch.float16),
        (16, 1600, torch.float32),
        (1024, 1100, torch.float16),
        (1024, 1100, torch.bfloat16),
        (1032, 1100, torch.float16),
        (4096, 350, torch.float16),
        (4096, 350, torch.bfloat16),
        (8200, 200, torch.float16),
        (40_000, 60, torch.float16),
    ],
)
def test_sums_of_more_references_than_float32_takes(rng, d, n, dtype):
    """Enough rows for a block to add up well over a thousand references of one unit."""
    refs = make_references(1700, d, "manifold", rng).to(dtype)[None]
    t = torch.tensor([0.9, 0.98, 0.999])[torch.randint(3, (n,), generator=rng)]
    x = make_noisy(refs[0, torch.randint(1700, (n,), generator=rng)], t, rng)
    for prediction in ("velocity", "x0"):
        check_bank(x, refs, t, torch.zeros(n, dtype=torch.int64), prediction=prediction)


@pytest.mark.parametrize("d", FORMS)
@pytest.mark.parametrize("source", [False, True])
def test_empty_classes_and_rows_that_are_not_finite(rng, d, source):
    """Each next to rows of the same class that are whole."""
    x, refs, t, labels, counts = make_bank(20, 6, 11, d, torch.float16, rng, "manifold")
    labels = torch.arange(20) % 6
    labels[18:] = -1
    counts[torch.tensor([1, 4])] = torch.tensor([0, -3])
    refs[torch.tensor([1, 4])] = math.nan
    own = x * 0.5 if source else None
    t[6], x[2, -1], x[9, 0] = math.nan, math.inf, math.nan
    if source:
        own[5, d // 2], own[7, 0] = math.nan, math.inf
    check_bank(x, refs, t, labels, counts, own)
    check_bank(x, refs, t, labels, torch.zeros(6, dtype=torch.int32), own)
    check_bank(x, refs[:, :0], t, labels, None, own)
    check_bank(x, refs, t * math.nan, labels, counts, own)


@pytest.mark.parametrize(
    ("d", "n", "dtype"),
    [
        (16, 3000, torch.float16),
        (1000, 900, torch.float16),
        (1032, 600, torch.float16),
        (4096, 600, torch.float16),
        (4096, 600, torch.bfloat16),
        (4096, 600, torch.float32),
        (16_384, 150, torch.float16),
        (65_544, 6, torch.float16),
    ],
)
def test_many_classes_without_references(rng, d, n, dtype):
    """A block has several of them in turn, behind one whose references are evaluated again; rows have their sources."""
    labels, t = torch.arange(n), torch.full((n,), 0.1)
    counts = 5 * (labels % 4 == 0)
    refs = make_references(5 * n, d, "gaussian", rng).reshape(n, 5, d).to(dtype)
    x = make_noisy(refs[:, 0].float(), t, rng)
    refs[counts == 0] = math.nan
    check_bank(x, refs, t, labels, counts, x * 0.5)
    check_bank(x, refs, t, labels, counts * 0, x * 0.5)


@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize(
    ("d", "k"), [(16, 900), (1000, 300), (1032, 300), (4096, 100), (8200, 40), (40_000, 12), (65_544, 9)]
)
def test_rows_that_take_all_of_many_classes(rng, d, k, source):
    """Classes of less than a tile, of more than one, and without references, the first one too."""
    x, refs, t, labels, counts = make_bank(7, k, 6, d, torch.float16, rng, "manifold")
    counts = torch.randint(7, (k,), generator=rng)
    counts[0] = 0
    for group, count in zip(refs, counts.tolist(), strict=True):
        group[:] = x[0].half()
        group += 0.05 * torch.randn(group.shape, generator=rng)
        group[count:] = math.nan
    for labels in (torch.full((7,), -1), torch.tensor([-1, 3, -1, 3, -1, k - 1, -1])):
        check_bank(x, refs, t, labels, counts, x.flip(0) * 0.5 if source else None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", FORMS)
def test_data_far_from_the_origin_beside_data_near_it(rng, d, dtype):
    """The classes of one call are scored in two ways; their rows have their own times, so that errors are apart."""
    near = make_references(2 * 19, d, "gaussian", rng).reshape(2, 19, d)
    far = make_references(2 * 19, d, "shifted", rng).reshape(2, 19, d)
    refs = torch.stack([near[0], far[0], near[1], far[1]]).to(dtype)
    labels = torch.randint(4, (25,), generator=rng)
    t = torch.tensor([[0.5, 0.9, 0.98], [0.51, 0.91, 0.981]])[labels % 2, torch.randint(3, (25,), generator=rng)]
    x = make_noisy(refs[labels, torch.randint(19, (25,), generator=rng)], t, rng)
    check_bank(x, refs, t, labels)
    check_bank(x, refs, t, labels, torch.tensor([19, 18, 1, 2]), x - 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", FORMS)
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_data_of_any_size(rng, d, dtype, size):
    """Rows of zeros too. float16 itself ends at 65,504."""
    size = 3e3 if dtype == torch.float16 and size > 1 else size
    refs = (size * torch.randn(2, 11, d, generator=rng)).to(dtype)
    labels = torch.arange(7) % 2
    t = torch.tensor([0.3, 0.9, 0.3, 0.9, 0.9, 0.5, 0.5])
    x = (1 - t[:, None]) * refs[labels, 3] + size * t[:, None] * torch.randn(7, d, generator=rng)
    x[5:] = 0
    check_bank(x, refs, t, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", FORMS)
def test_rows_of_one_class_of_different_sizes(rng, d, dtype):
    """A unit scales its rows to the range of float16, each by its own power of two; a time to each size."""
    refs = torch.randn(1, 21, d, generator=rng).to(dtype)
    sizes = torch.tensor([1.0, 1e-6, 1e4, 0.0, 1e6, 1.0, 1e-3])
    t = torch.tensor([0.9, 0.98, 0.6, 0.97, 0.8, 0.91, 0.96])
    x = sizes[:, None] * torch.randn(7, d, generator=rng)
    x[5, 0] = 3e4  # one element above all others
    check_bank(x, refs, t, torch.zeros(7, dtype=torch.int64))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("d", FORMS)
def test_x_and_source_of_any_dtype_and_alignment(rng, d, x_dtype):
    x, refs, t, labels, counts = make_bank(9, 3, 13, d, torch.float16, rng, "manifold")
    x, source = x.to(x_dtype), (0.9 * x).to(x_dtype)
    for unaligned in ([], ["x"], ["source"], ["x", "source"]):
        check_bank(x, refs, t, labels, counts, source, unaligned=unaligned)
    check_bank(x, refs, t, labels, counts, source.half())  # the dtype of the references


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "x0"])
@pytest.mark.parametrize("d", FORMS)
def test_every_prediction_at_every_time(rng, d, prediction):
    times = (0.05, 0.2, 0.5, 0.8, 0.95, 0.999)
    problem = make_problem(d, 23, "manifold", rng, times=times, each=3, dtype=torch.float16)
    check_bank(problem.x, problem.refs[None], problem.t, torch.zeros(18, dtype=torch.int64), prediction=prediction)


@pytest.mark.parametrize("d", [*FORMS, 131_072])
def test_lse_of_class_banks(rng, d):
    x, refs, _, labels, counts = make_bank(9, 2, 12, d, torch.float16, rng, "gaussian")
    sigma = torch.full((9,), 0.8)
    sigma[1] = math.nan
    args = on_gpu(x, refs, 1 - sigma, sigma, labels, counts)
    for source in (None, args[0] * 0.5):
        mean, lse = svel.posterior_mean(*args, source)
        wide = None if source is None else source.double()
        expected_mean, expected = reference.posterior_mean(args[0].double(), *args[1:], wide)
        good = ~expected.isnan()
        assert torch.equal(lse.isnan(), expected.isnan())
        assert torch.equal(mean.isnan(), expected_mean.isnan())
        assert_close(mean[good], expected_mean[good])
        valid = torch.cat([group[:count] for group, count in zip(args[1], counts.tolist(), strict=True)])
        scale = largest_logit(args[0][good], valid, args[2][good], args[3][good])
        assert ((lse - expected)[good].abs() <= EXACT * scale).all()


@pytest.mark.parametrize("n", [1, 2, 131, 1000, 5000])
def test_any_number_of_rows(rng, n):
    """One row over all blocks, and several chunks of the work list."""
    refs = make_references(6 * 50, 64, "manifold", rng).reshape(6, 50, 64).half()
    labels = torch.randint(-1, 6, (n,), generator=rng)
    t = torch.full((n,), 0.9)
    x = make_noisy(refs[labels.clamp_min(0), torch.randint(50, (n,), generator=rng)], t, rng)
    check_bank(x, refs, t, labels)


@pytest.mark.parametrize("m", [1, 2, 3, 17, 256, 1000, 20_000])
@pytest.mark.parametrize("d", [10, 384])
def test_one_row_and_any_number_of_references(rng, m, d):
    problem = make_problem(d, m, "manifold", rng, times=(0.5, 0.95), each=1, dtype=torch.float16)
    for row in range(2):
        x, t = problem.x[row : row + 1], problem.t[row : row + 1]
        check_bank(x, problem.refs, t, None)


@pytest.mark.parametrize("geometry", ["gaussian", "shifted"])
@pytest.mark.parametrize(("n", "d", "m"), [(70, 4160, 130), (130, 3080, 4500), (3100, 65, 2100), (64, 6150, 63)])
def test_shared_pool_of_many_rows(rng, n, d, m, geometry):
    """The tiled kernel: edges in rows, references and D, and several rounds over the references."""
    refs = make_references(m, d, geometry, rng).half()
    t = torch.tensor([0.3, 0.9, 0.999])[torch.randint(3, (n,), generator=rng)]
    x = make_noisy(refs[torch.randint(m, (n,), generator=rng)], t, rng)
    source = refs[torch.randint(m, (n,), generator=rng)]
    refs[m - 3 :] = math.nan
    check_bank(x, refs, t, None, torch.tensor([m - 3]), source)


@pytest.mark.parametrize("d", [1, 3, 4, 5, 8, 10, 12, 16, 17, 32])
def test_shared_pool_of_small_samples(rng, d):
    refs = make_references(1500, d, "gaussian", rng)
    t = torch.tensor([0.3, 0.9, 0.999])[torch.randint(3, (300,), generator=rng)]
    x = make_noisy(refs[torch.randint(1500, (300,), generator=rng)], t, rng)
    refs[1490:] = math.nan
    check_bank(x, refs, t, None, torch.tensor([1490], dtype=torch.int32), make_references(300, d, "gaussian", rng))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", ["gaussian", "manifold", "shifted"])
@pytest.mark.parametrize(
    ("n", "m", "d"), [(5000, 9001, 10), (1300, 20_000, 9), (700, 1, 11), (2000, 3000, 14), (65, 129, 15)]
)
def test_shared_pool_of_samples_of_9_to_16(rng, n, m, d, geometry, dtype):
    """Several rows to a thread and one, parts of references with and without valid ones, rows that are not finite."""
    refs = make_references(m, d, geometry, rng).to(dtype)
    t = torch.tensor([0.2, 0.5, 0.9, 0.999])[torch.randint(4, (n,), generator=rng)]
    x = make_noisy(refs[torch.randint(m, (n,), generator=rng)], t, rng)
    check_bank(x, refs, t, None, prediction="x0")
    t[3], x[7, d - 1], x[40, 0] = math.nan, math.nan, math.inf
    refs[m * 2 // 3 :] = math.nan
    for count in (m * 2 // 3, 0):
        check_bank(x, refs, t, None, torch.tensor([count]), None)
        check_bank(x, refs, t, None, torch.tensor([count], dtype=torch.int32), x.flip(0) * 0.5)
    check_bank(x, refs[:0], t, None, None, x.flip(0) * 0.5)


@pytest.mark.parametrize("geometry", ["gaussian", "manifold", "shifted"])
@pytest.mark.parametrize(
    ("m", "d"), [(12_000, 9), (12_000, 10), (500, 11), (12_000, 12), (500, 13), (9000, 14), (9000, 16)]
)
def test_small_samples_at_every_time(rng, m, d, geometry):
    """Rows of one time side by side, so that warps score some of them as products and some as differences."""
    times = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 0.98, 0.999])
    refs = make_references(m, d, geometry, rng)
    t = times.repeat_interleave(512)
    x = make_noisy(refs[torch.randint(m, (len(t),), generator=rng)], t, rng)
    source = refs[torch.randint(m, (len(t),), generator=rng)]
    for prediction in ("velocity", "x0", "noise"):
        check_bank(x, refs, t, None, prediction=prediction)
        check_bank(x, refs, t, None, None, source, prediction=prediction)
    shuffled = torch.randperm(len(t), generator=rng)
    check_bank(x[shuffled], refs, t[shuffled], None)


@pytest.mark.parametrize("d", [10, 16])
def test_more_rows_than_a_round_of_small_samples(rng, d):
    """Rounds over rows and, since their parts would not fit, over references."""
    n, m = 70_000, 60_000
    refs = make_references(m, d, "manifold", rng)
    t = torch.tensor([0.5, 0.9])[torch.randint(2, (n,), generator=rng)]
    x = make_noisy(refs[torch.randint(m, (n,), generator=rng)], t, rng)
    out = svel.stable_target(*on_gpu(x, refs, t, None, torch.tensor([m - 5000])))
    rows = torch.tensor([0, 1, 65_535, 65_536, n - 1])
    expected = reference.stable_target(x[rows].double(), refs[: m - 5000].double(), t[rows])
    assert_close(out.cpu()[rows], expected)


@pytest.mark.parametrize(("n", "d"), [(64, 10), (3000, 13)])
def test_lse_of_small_samples_merges_over_disjoint_parts(rng, n, d):
    refs = make_references(3000, d, "manifold", rng)
    sigma = torch.tensor([0.3, 0.9])[torch.randint(2, (n,), generator=rng)]
    x = make_noisy(refs[torch.randint(3000, (n,), generator=rng)], sigma, rng)
    parts = [svel.posterior_mean(*on_gpu(x, half, 1 - sigma, sigma)) for half in (refs[:1100], refs[1100:])]
    share = torch.softmax(torch.stack([lse for _, lse in parts]).double(), 0)[..., None]
    merged = (share[0] * parts[0][0] + share[1] * parts[1][0]).float().cpu()
    assert_close(merged, direct_mean(x, refs, 1 - sigma, sigma)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("d", "m", "unaligned"), [(16392, 20, True), (65536, 40, True), (65537, 5, True), (2**21 + 8, 3, False)]
)
def test_large_samples_in_two_passes(rng, d, m, unaligned, dtype):
    x, refs, t, labels, counts = make_bank(3, 2, m, d, dtype, rng, "manifold")
    assert_kernel("two_pass", 3, refs, aligned=not unaligned)
    check_bank(x, refs, t, labels, counts, x - 0.1, unaligned=["refs"] if unaligned else [])


@pytest.mark.parametrize("d", [2**20 + 8, 2**21])
def test_the_largest_samples_that_are_read_once(rng, d):
    x, refs, t, labels, counts = make_bank(3, 2, 7, d, torch.float16, rng, "manifold")
    assert_kernel("bulk", 3, refs)
    check_bank(x, refs, t, labels, counts, x - 0.1)


@pytest.mark.parametrize(("d", "k"), [(1, 2), (10, None), (4100, 2), (20_000, None)])
def test_float64(rng, d, k):
    lead = (11,) if k is None else (k, 11)
    refs, x = torch.randn(*lead, d, generator=rng).double(), torch.randn(5, d, generator=rng).double()
    labels = None if k is None else torch.tensor([0, 1, -1, 1, 0])
    check_bank(x, refs, torch.full((5,), 0.7), labels)


def test_the_mean_of_many_references_near_its_centre(rng):
    """At t near 1 the mean is far shorter than any reference: sums must not lose it."""
    for n, d in ((2, 256), (100, 3200)):
        refs = torch.randn(20_000 if n == 2 else 6000, d, generator=rng).half()
        t = torch.full((n,), 0.999)
        x = make_noisy(refs[:n], t, rng)
        check_bank(x, refs, t, None, prediction="x0")


@pytest.mark.parametrize("d", [300, *FORMS, 131_072])
def test_lse_merges_over_disjoint_halves(rng, d):
    refs = make_references(31, d, "manifold", rng).half()
    sigma = torch.full((4,), 0.9)
    x = make_noisy(refs[:4], sigma, rng)
    parts = [svel.posterior_mean(*on_gpu(x, half, 1 - sigma, sigma)) for half in (refs[:11], refs[11:])]
    share = torch.softmax(torch.stack([lse for _, lse in parts]).double(), 0)[..., None]
    merged = (share[0] * parts[0][0] + share[1] * parts[1][0]).float().cpu()
    assert_close(merged, direct_mean(x, refs, 1 - sigma, sigma)[0])


@pytest.mark.parametrize("d", [300, *FORMS, 131_072])
def test_parts_merge_within_the_contract_where_their_means_differ(rng, d):
    """Two parts of one reference each, with like weights: any error of lse is an error of the mean."""
    refs = make_references(2, d, "gaussian", rng).half()
    sigma = torch.full((6,), 0.998)
    x = make_noisy(refs[torch.arange(6) % 2], sigma, rng)
    parts = [svel.posterior_part(*on_gpu(x, ref[None], 1 - sigma, sigma)) for ref in refs]
    share = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[..., None]
    merged = (share[0] * parts[0][0] + share[1] * parts[1][0]).float().cpu()
    assert_close(merged, direct_mean(x, refs, 1 - sigma, sigma)[0])


@pytest.mark.parametrize("d", FORMS)
def test_bulk_repeats_bit_for_bit(rng, d):
    """Blocks that merge in whatever order they arrive, with rows enough for several units to a block and with few."""
    for n, m in ((41, 13), (2, 150)):
        x, refs, t, labels, counts = make_bank(n, 3, m, d, torch.float16, rng, "manifold")
        args = on_gpu(x, refs, 1 - t, t, labels, counts, x)
        first = svel.posterior_mean(*args)
        for _ in range(5):
            for ours, theirs in zip(svel.posterior_mean(*args), first, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("d", FORMS)
def test_bulk_in_a_graph_follows_its_inputs(rng, d):
    """What the host decides at capture must hold for other labels, counts and times: it never sees them."""
    static = on_gpu(*make_bank(11, 4, 13, d, torch.float16, rng, "manifold"))

    def target(x, refs, t, labels, counts):
        mean, lse = svel.posterior_mean(x, refs, 1 - t, t, labels, counts)
        return svel.stable_target(x, refs, t, labels, counts, x), mean, lse

    replay = captured(target, static)
    for round_ in range(4):
        new = list(make_bank(11, 4, 13, d, torch.float16, rng, "manifold"))
        if round_ == 1:
            new[3] = torch.full((11,), -1)  # more work than at capture
        if round_ == 2:
            new[2] = torch.full((11,), math.nan)  # and none
        for out, expected in zip(replay(new), target(*static), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 9001, 4096), (1, 263, 1000), (1, 700, 128), (1, 2003, 16_384), (3, 3001, 2048)]
)
def test_few_rows_of_a_pool_in_a_graph(rng, n, m, d):
    """The launch that merges their parts begins before these are there: it must not take those of an earlier one."""
    x, refs, t = make_pool(12, m, d, "manifold", rng, times=(0.1, 0.5, 0.9), dtype=torch.bfloat16)
    x, t = x.view(-1, n, d), t.view(-1, n)
    replay = captured(lambda x, t: svel.stable_target(x, refs, t), [x[0].clone(), t[0].clone()])
    right = []
    for its_x, its_t in zip(x, t, strict=True):
        right.append(replay([its_x, its_t]).clone())
        expected = reference.stable_target(its_x.double(), refs, its_t)
        for row in range(n):
            assert relative_error(right[-1][row], expected[row]) <= EXACT
    for i in range(200):
        assert torch.equal(replay([x[i % len(x)], t[i % len(x)]]), right[i % len(x)])


@pytest.mark.parametrize(("d", "other"), [(1000, 1000), (4096, 4096), (4096, 16_384)])
def test_one_row_of_a_pool_on_two_streams_at_once(rng, d, other):
    problems = [make_pool(1, 3001, size, "manifold", rng) for size in (d, other)]
    for out, right in on_two_streams(svel.stable_target, problems):
        assert torch.equal(out, right)


@pytest.mark.parametrize(("d", "other"), [(1032, 1032), (4096, 65_544), (8200, 8200), (8200, 40_000), (65_544, 65_544)])
def test_two_streams_at_once(rng, d, other):
    """Blocks that wait for one another must not wait for room that another stream holds."""
    problems = [on_gpu(*make_bank(17, 3, 29, size, torch.float16, rng, "manifold")) for size in (d, other)]
    for out, right in on_two_streams(svel.stable_target, problems):
        torch.testing.assert_close(out, right, rtol=0, atol=0, equal_nan=True)


def test_samples_without_elements():
    x, refs, t = torch.empty(3, 0), torch.empty(2, 5, 0), torch.full((3,), 0.5)
    out = svel.stable_target(*on_gpu(x, refs.half(), t, torch.tensor([0, 1, -1])))
    assert out.shape == (3, 0)


def calls():
    """One call of every op, of every kernel of the target, as functions of nothing."""
    labels, t = torch.tensor([0, -1, 1, 5], device="cuda"), torch.full((4,), 0.7, device="cuda")
    counts, bank = torch.tensor([5, 3], device="cuda"), torch.randn(2, 5, 64, device="cuda").half()
    x = torch.randn(4, 64, device="cuda")
    many, pool = torch.randn(100, 4000, device="cuda"), torch.randn(9, 4000, device="cuda")
    rows = torch.randn(100, 10, device="cuda")
    times = torch.full((100,), 0.7, device="cuda")
    heads = torch.zeros_like(counts)
    z = torch.randn(3, 5, 16, device="cuda")
    wide = {d: (torch.ones(4, d, device="cuda"), torch.ones(2, 5, d, device="cuda").half()) for d in FORMS}
    for samples, classes in wide.values():
        yield lambda x=samples, bank=classes: svel.stable_target(x, bank, t, labels, counts, x)
        yield lambda x=samples, bank=classes: svel.posterior_mean(x, bank, 1 - t, t, labels, counts)
    yield lambda: svel.stable_target(x, offset_by_one(bank), t, labels, counts, x)
    yield lambda: svel.stable_target(x, bank, t, labels, counts, x)
    yield lambda: svel.posterior_mean(x, bank, 1 - t, t, labels, counts)
    yield lambda: svel.stable_target(many[:2], pool, t[:2])
    yield lambda: svel.stable_target(many, pool, times)
    yield lambda: svel.stable_target(rows, rows, times)
    yield lambda: svel.stable_target(x.double(), bank, t, labels)
    yield lambda: svel.stable_target(torch.ones(1, 2**20 + 8, device="cuda"), many.new_ones(3, 2**20 + 8), t[:1])
    yield lambda: svel.bank_push_(bank, counts, heads, x, labels)
    yield lambda: svel.bank_push_(bank, counts, heads, x, labels, all_to_last=True)
    yield lambda: svel.bank_draw(bank, counts, t.double(), labels, x, x, t)
    yield lambda: svel.conditional_target_(x.clone(), x, x, t, t * math.nan)
    yield lambda: svel.affine_step(x, x, t, t, t, x, x)
    yield lambda: svel.stablevs_step(x, x, t, t * 0.5)
    yield lambda: svel.va_repa_loss(z, z + 1, torch.ones(3, device="cuda"))
    yield lambda: torch.ops.svel.va_repa_loss_backward(t[0], z, z + 1, torch.ones(3, device="cuda"))


def test_nothing_waits_for_the_device():
    for call in calls():
        call()
        with nothing_waits():
            call()


def test_results_repeat_bit_for_bit():
    for call in calls():
        first, second = call(), call()
        if first is not None:
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def test_push_and_target_in_a_graph_follow_their_inputs(rng):
    """The training step's two ops, captured once and replayed on changed inputs, do what they do outside the graph."""

    def fresh():
        values, labels = torch.randn(6, 128, generator=rng), torch.randint(-1, 4, (6,), generator=rng)
        return on_gpu(values, labels, 0.4 + 0.5 * torch.rand(6, generator=rng))

    def empty_bank():
        zeros = torch.zeros(4, dtype=torch.int32, device="cuda")
        return torch.zeros(4, 3, 128, dtype=torch.float16, device="cuda"), zeros, zeros.clone()

    def step(bank, values, labels, t):
        refs, counts, heads = bank
        svel.bank_push_(refs, counts, heads, values, labels)
        return svel.stable_target(values, refs, t, labels, counts)

    static, bank, eager_bank = fresh(), empty_bank(), empty_bank()
    step(empty_bank(), *static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(bank, *static)
    for _ in range(4):
        new = fresh()
        for s, v in zip(static, new, strict=True):
            s.copy_(v)
        graph.replay()
        expected = step(eager_bank, *new)
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
        assert all(torch.equal(a, b) for a, b in zip(bank, eager_bank, strict=True))


def test_a_side_stream(rng):
    x, refs = torch.randn(4, 256, generator=rng), torch.randn(50, 256, generator=rng)
    t = torch.full((4,), 0.8)
    expected = svel.stable_target(*on_gpu(x, refs, t))
    inputs, stream = on_gpu(x, refs, t), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        out = svel.stable_target(*inputs)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("all_to_last", [False, True])
def test_labels_beyond_one_chunk_push_in_order(rng, all_to_last):
    """bank_push_ takes 4096 rows at a time: the ring goes on where the last chunk left it."""
    labels = torch.randint(2 if all_to_last else 3, (9000,), generator=rng)
    values = torch.arange(9000)[:, None].expand(-1, 2).contiguous()
    refs, counts, heads = torch.full((3, 700, 2), -1), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 699, 5])
    ours = on_gpu(refs, counts, heads)
    svel.bank_push_(*ours, *on_gpu(values, labels), all_to_last=all_to_last)
    reference.bank_push_(refs, counts, heads, values, labels, all_to_last=all_to_last)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, (refs, counts, heads), strict=True))

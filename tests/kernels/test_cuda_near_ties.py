"""Rows between two references, or among many, far from a class's first one: float32 scores cannot weigh them."""

import pytest
import torch
from cuda_cases import GEOMETRIES, check_pool, make_pool, worst_row
from kernel_cases import between
from torch import Tensor

import stablevelocity_kernels as svel
from stablevelocity_kernels import info, reference
from stablevelocity_kernels.paths import path_coefficients
from stablevelocity_kernels.testing import TOLERANCE, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
TIMES = (0.05, 0.2, 0.35, 0.5)
# Samples in 32 to 512 threads of a block, and over several blocks.
SIZES = [128, 1000, 1032, 4096, 8192, 16_384, 65_536]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LIMIT = TOLERANCE[torch.float32, "exact"]
# By groups of warps and teams of blocks.
SUMMED = [
    (32, torch.float16),
    (64, torch.float32),
    (128, torch.float32),
    (512, torch.float32),
    (1024, torch.float32),
    (2048, torch.float32),
    (4096, torch.float32),
    (8192, torch.float32),
    (32_768, torch.float32),
    (65_536, torch.float16),
    (131_072, torch.bfloat16),
]


def make_ties(
    n: int,
    k: int,
    m: int,
    d: int,
    dtype=torch.float16,
    path: str = "linear",
    seed: int = 0,
    copies: int = 1,
    favour: float = 0.0,
):
    """x, refs, t, labels, and the references a and b that each row is between; of b's logit `favour` is taken. Every
    reference is there `copies` times."""
    torch.manual_seed(seed)
    refs = torch.randn(k, m // copies, d, device="cuda").to(dtype)
    t = torch.tensor(TIMES, device="cuda")[torch.arange(n, device="cuda") % len(TIMES)]
    labels = torch.randint(k, (n,), device="cuda")
    first = torch.randint(m // copies, (n,), device="cuda")
    second = (first + torch.randint(1, m // copies, (n,), device="cuda")) % (m // copies)
    at = path_coefficients(path, t.double())
    alpha, sigma = at.alpha[:, None], at.sigma[:, None]
    a, b = refs[labels, first], refs[labels, second]
    x = between(a, b, alpha, sigma)
    if favour:
        gap = (a - b).double()
        x = (x.double() + favour * sigma**2 / alpha * gap / gap.square().sum(1, keepdim=True)).float()
    if copies > 1:
        refs = refs.repeat(1, copies, 1)[:, torch.randperm(m // copies * copies, device="cuda")].contiguous()
    return x, refs, t, labels, a, b


def check(x, refs, t, labels=None, source=None, counts=None, **options) -> None:
    out = svel.stable_target(x, refs, t, labels, counts, source, **options)
    wide = None if source is None else source.double()
    expected = reference.stable_target(x.double(), refs, t, labels, counts, wide, **options)
    error = worst_row(out, expected)
    assert error <= LIMIT, f"a row is off by {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_classes(d, dtype):
    n, m = (8, 64) if d > 16_384 else (24, 256)
    x, refs, t, labels, *_ = make_ties(n, 5, m, d, dtype)
    check(x, refs, t, labels)


@pytest.mark.parametrize("d", [1024, 4096])
@pytest.mark.parametrize(
    ("n", "k", "m"),
    [
        (1, 3, 700),
        (3, 3, 700),
        (40, 129, 24),
        (256, 129, 24),
        (700, 129, 40),
        (2000, 500, 40),
        (40, 3, 680),  # by other kernels
        (256, 3, 680),
        (700, 3, 680),
        (256, 3, 700),
    ],
)
@pytest.mark.parametrize("copies", [1, 4])
def test_rows_that_share_a_class(n, k, m, d, copies):
    """One to four rows take a class together, in one part or several, in one segment or several."""
    x, refs, t, labels, *_ = make_ties(n, k, m, d, copies=copies)
    check(x, refs, t, labels)
    plan = info.plan(n, m, d, k, refs_dtype=refs.dtype)
    assert plan["kernel"] == "bulk" or k == 3
    if n >= 700 and k > 3:
        assert plan["tile_rows"] == 4


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_predictions(path, prediction):
    x, refs, t, labels, *_ = make_ties(24, 5, 256, 2048, path=path)
    check(x, refs, t, labels, path=path, prediction=prediction)


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(1, 5000, 128), (3, 9001, 1024), (64, 20_011, 128), (3200, 5000, 128), (8, 3000, 4096), (2, 300, 65_536)],
)
def test_pools(n, m, d):
    """The two references lie in parts of different blocks."""
    x, refs, t, *_ = make_ties(n, 1, m, d, torch.bfloat16)
    check(x, refs[0], t)


@pytest.mark.parametrize("copies", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "m", "d"), [(70, 5000, 1032), (300, 2604, 4096), (100, 2604, 5000)])
def test_pools_beside_many_rows(n, m, d, dtype, copies):
    """Lists of few references that are far apart beside the noise."""
    x, refs, t, *_ = make_ties(n, 1, m, d, dtype, copies=copies)
    assert info.plan(n, m, d, refs_dtype=dtype)["kernel"] == "many_rows"
    check(x, refs[0], t)
    check(x, refs[0], t, prediction="x0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "d"), [(20_011, 4096), (9001, 1000), (4999, 128), (3001, 8192), (2003, 16_384)])
def test_one_row_of_a_pool(m, d, dtype):
    """All blocks have parts of it; the launch that merges them finds that it is in doubt, or is not."""
    x, refs, t, *_ = make_ties(len(TIMES), 1, m, d, dtype)
    rows = [*zip(x, t, strict=True), *zip(draws(refs, torch.zeros_like(t, dtype=torch.int64), t), t, strict=True)]
    for row, time in rows:
        check(row[None], refs[0], time[None])
        mean, lse = svel.posterior_mean(row[None], refs[0], 1 - time[None], time[None])
        wide = (1 - time[None]).double(), time[None].double()
        expected, expected_lse = reference.posterior_mean(row[None].double(), refs[0], *wide)
        assert worst_row(mean, expected) <= LIMIT
        scale = row.double().square().sum() / (2 * time.double().square())
        assert (lse.double() - expected_lse).abs() <= LIMIT * scale


@pytest.mark.parametrize("d", [128, 1000, 4096])
def test_a_row_that_one_block_has_beside_one_that_all_have(d):
    """The launch that merges the parts of the one finds whether the other is in doubt."""
    torch.manual_seed(0)
    refs = torch.randn(3, 3001, d, device="cuda")
    counts = torch.tensor([3001, 5, 0], device="cuda")
    a, b = refs[[0, 1, 2], [17, 2, 0]], refs[[0, 1, 2], [2998, 4, 1]]
    labels = torch.arange(3, device="cuda")
    for time in (*TIMES, 0.95):
        t = torch.full((3,), time, device="cuda")
        alpha, sigma = (1 - t[:, None]).double(), t[:, None].double()
        x = between(a, b, alpha, sigma)
        out = svel.stable_target(x, refs, t, labels, counts)
        expected = reference.stable_target(x.double(), refs, t, labels, counts)
        assert worst_row(out[:2], expected[:2]) <= LIMIT
        assert out[2].isnan().all()


@pytest.mark.parametrize("d", [128, 1024, 4096, 65_536])
def test_all_classes(d):
    """Rows of the null label take every class, each with its own centre."""
    x, refs, t, labels, a, b = make_ties(8, 6, 40, d)
    shuffled = torch.randperm(len(x), device="cuda")
    alpha, sigma = (1 - t[:, None]).double(), t[:, None].double()
    x = between(a, a[shuffled].where((shuffled != torch.arange(len(x), device="cuda"))[:, None], b), alpha, sigma)
    labels[::2] = -1
    check(x, refs, t, torch.full_like(labels, -1))
    check(between(a, b, alpha, sigma), refs, t, labels)


@pytest.mark.parametrize("d", [128, 1024, 4096, 65_536])
def test_the_source(d):
    """A row between its own source and a reference, or between two references beside a far source."""
    x, refs, t, labels, a, _ = make_ties(8 if d > 4096 else 24, 4, 100, d)
    source = torch.randn_like(x)
    alpha, sigma = (1 - t[:, None]).double(), t[:, None].double()
    x[::2] = between(source, a.float(), alpha, sigma)[::2]
    check(x, refs, t, labels, source)


@pytest.mark.parametrize(
    ("d", "spread"),
    [
        *((d, 0.5) for d in (128, 1024, 4096, 65_536)),
        *((d, 3.0) for d in (4096, 65_536)),
        pytest.param(128, 3.0, marks=pytest.mark.xfail(reason="a row is off by 2.05e-6")),
        pytest.param(1024, 3.0, marks=pytest.mark.xfail(reason="a row is off by 2.8e-6")),
    ],
)
def test_a_cluster_far_from_the_first_reference(d, spread):
    """Weights spread over all references of a class but its first, which the scores are relative to."""
    torch.manual_seed(1)
    n, m = (4, 64) if d > 4096 else (16, 600)
    t = torch.tensor(TIMES, device="cuda")[torch.arange(n, device="cuda") % len(TIMES)]
    labels = torch.arange(n, device="cuda") % 4
    refs = torch.randn(4, 1, d, device="cuda") + spread * t[:4, None, None] / d**0.5 * torch.randn(
        4, m, d, device="cuda"
    )
    refs[:, 0] = torch.randn(4, d, device="cuda")
    refs = refs.to(torch.float16)
    picked = refs[labels, torch.randint(1, m, (n,), device="cuda")].float()
    x = (1 - t[:, None]) * picked + t[:, None] * torch.randn_like(picked)
    check(x, refs, t, labels)
    check(x, refs, t, labels, prediction="x0", counts=torch.full((4,), m - 7, device="cuda"))


def draws(refs: Tensor, labels: Tensor, t: Tensor) -> Tensor:
    x0 = refs[labels, torch.randint(refs.shape[1], (len(t),), device="cuda")].float()
    return (1 - t[:, None]) * x0 + t[:, None] * torch.randn_like(x0)


@pytest.mark.parametrize("copies", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", SIZES)
def test_repeated_references(d, dtype, copies):
    """As at an epoch's end: equal references have no error, near ties beside them have."""
    n, m = (8, 64) if d > 16_384 else (24, 256)
    x, refs, t, labels, *_ = make_ties(n, 5, m, d, dtype, copies=copies)
    check(x, refs, t, labels)
    for time in (0.1, 0.3, 0.6, 0.9, 0.99):
        t = torch.full_like(t, time)
        check(draws(refs, labels, t), refs, t, labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1024, 4096, 32_768])
def test_the_same_batch_again_and_again(d, dtype):
    """As when a step is repeated: a class holds copies of few samples, or of one, and they are no ties."""
    n, m = (8, 64) if d > 4096 else (64, 256)
    torch.manual_seed(2)
    samples = torch.randn(5, 2, d, device="cuda").to(dtype)
    labels, t = torch.randint(5, (n,), device="cuda"), torch.linspace(0.05, 0.999, n, device="cuda")
    for few in (samples, samples[:, :1]):
        x = draws(few, labels, t)
        refs = few.repeat(1, m // few.shape[1], 1)
        check(x, refs, t, labels)
        again = few.repeat_interleave(m // few.shape[1], 1)
        check(x, again, t, labels)
        expected = reference.stable_target(x.double(), few, t, labels)
        assert worst_row(svel.stable_target(x, refs, t, labels), expected) <= LIMIT


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 5000, 128), (64, 20_000, 128), (3200, 5000, 128), (8, 3000, 4096), (2, 304, 65_536)]
)
def test_repeated_references_of_a_pool(n, m, d):
    x, refs, t, labels, *_ = make_ties(n, 1, m, d, copies=8)
    check(x, refs[0], t)
    t = torch.linspace(0.05, 0.99, n, device="cuda")
    check(draws(refs, labels, t), refs[0], t)


@pytest.mark.parametrize("d", [128, 1024, 4096, 65_536])
def test_references_repeated_in_other_classes(d):
    x, refs, t, labels, *_ = make_ties(8, 3, 40, d, copies=4)
    everywhere = torch.full_like(labels, -1)
    both = torch.cat([refs, refs.flip(1)])
    check(x, both, t, everywhere)
    counts = torch.tensor([0, 40, 40, 40, 0, 0], device="cuda")
    labels = labels.clamp(min=1)
    check(draws(refs, labels, t), both, t, everywhere, counts=counts)


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("d", [128, 1024, 4096, 65_536])
def test_few_references(d, m):
    """Rows between the first of a class, which scores are relative to, and another."""
    x, refs, t, labels, *_ = make_ties(16, 8, m, d)
    check(x, refs, t, labels)


def rows_between(a: Tensor, b: Tensor, t: Tensor, kind: str) -> Tensor:
    """In the middle to the last bit, or with noise beside it and that much or less from it."""
    alpha, sigma = (1 - t[:, None]).double(), t[:, None].double()
    x = between(a, b, alpha, sigma)
    gap = (a - b).double()
    middle = alpha * (a.double() + b.double()) / 2
    along = ((x.double() - middle) * gap).sum(1, keepdim=True) / gap.square().sum(1, keepdim=True)
    if kind == "exact":
        return middle.float()
    return x if kind == "near" else (x.double() - (1 - 1e-4) * along * gap).float()


@pytest.mark.parametrize("kind", ["exact", "nearly", "near"])
@pytest.mark.parametrize("m", [2, 3, 40])
@pytest.mark.parametrize(("d", "dtype"), SUMMED, ids=str)
def test_between_the_first_and_another(d, dtype, m, kind):
    """The first one's score is 0, to the last bit: so are all scores of two references, nearly, in the middle."""
    torch.manual_seed(d + m)
    times = torch.tensor([0.05, 0.1, 0.2, 0.35, 0.5, 0.6, 0.75, 0.9], device="cuda")
    refs = torch.randn(4, m, d, device="cuda").to(dtype)
    labels = torch.arange(len(times), device="cuda") % 4
    other = torch.randint(1, m, (len(times),), device="cuda")
    first = refs[labels, 0].float()
    x = rows_between(first, refs[labels, other].float(), times, kind)
    check(x, refs, times, labels)
    check(x, refs, times, labels, prediction="x0")
    one = slice(3, 4)  # in as many parts as there are references for
    check(x[one], refs[labels[3]], times[one])


@pytest.mark.parametrize("copies", [2, 4, 16])
@pytest.mark.parametrize(("d", "dtype"), SUMMED, ids=str)
def test_between_copies(d, dtype, copies):
    """All that weigh are copies of the first or of one other: not what an epoch's end looks like."""
    torch.manual_seed(d + copies)
    times = torch.tensor([0.05, 0.1, 0.2, 0.3], device="cuda")
    samples = torch.randn(len(times), 2, d, device="cuda").to(dtype)
    refs = samples.repeat(1, copies, 1)
    labels = torch.arange(len(times), device="cuda")
    for kind in ("exact", "nearly", "near"):
        x = rows_between(samples[:, 0].float(), samples[:, 1].float(), times, kind)
        check(x, refs, times, labels)


@pytest.mark.parametrize("copies", [2, 3, 8, 64, 256])
@pytest.mark.parametrize(("d", "dtype"), SUMMED, ids=str)
def test_copies_of_a_sample(d, dtype, copies):
    """With the first among them or not: nothing but the rounding of their sums."""
    torch.manual_seed(d + copies)
    times = torch.tensor([0.05, 0.1, 0.2, 0.3], device="cuda")
    samples = torch.randn(2, 3, d, device="cuda").to(dtype)
    refs = torch.cat([samples[:, :1], samples[:, 1:2].expand(2, copies, d), samples[:, 2:]], dim=1)
    refs[1, 0] = refs[1, 1]
    labels = torch.arange(len(times), device="cuda") % 2
    x = draws(refs[:, 1:2], labels, times)
    check(x, refs, times, labels)
    check(x[2:3], refs[0], times[2:3])


def median_time(run, repeats: int = 15) -> float:
    """Of ten calls, in ms."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[repeats // 2]


@pytest.mark.parametrize(
    ("n", "k", "m", "d", "dtype"),
    [(264, 16, 256, 512, torch.float32), (132, 8, 256, 8192, torch.float32), (16, 4, 256, 65_536, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("copies", [2, 8])
def test_copies_are_not_evaluated_again(n, k, m, d, dtype, copies):
    """Which takes several times as long as all else."""
    torch.manual_seed(0)
    refs = torch.randn(k, m, d, device="cuda").to(dtype)
    labels = torch.arange(n, device="cuda") % k
    t = torch.full((n,), 0.1, device="cuda")
    x = draws(refs[:, : m // copies], labels, t)
    repeated = refs[:, : m // copies].repeat(1, copies, 1)
    alone = median_time(lambda: svel.stable_target(x, refs, t, labels))
    together = median_time(lambda: svel.stable_target(x, repeated, t, labels))
    assert together <= 1.75 * alone, f"{together:.3f} ms for {alone:.3f} ms"


@pytest.mark.parametrize("copies", [1, 8])
@pytest.mark.parametrize("favour", [3.0, 8.0, 12.0])
@pytest.mark.parametrize("d", [128, 1024, 4096, 16_384])
def test_a_far_reference_of_little_weight(d, favour, copies):
    x, refs, t, labels, *_ = make_ties(24, 3, 128, d, copies=copies, favour=favour)
    check(x, refs, t, labels)


def test_mean_and_lse():
    x, refs, t, labels, *_ = make_ties(24, 5, 256, 1024)
    labels[5] = -1
    mean, lse = svel.posterior_mean(x, refs, 1 - t, t, labels)
    wide = (1 - t).double(), t.double()
    expected, expected_lse = reference.posterior_mean(x.double(), refs, *wide, labels)
    assert worst_row(mean, expected) <= LIMIT
    scale = x.double().square().sum(1) / (2 * t.double().square())
    assert ((lse.double() - expected_lse).abs() <= LIMIT * scale).all()


def test_repeats_bit_for_bit():
    x, refs, t, labels, *_ = make_ties(40, 3, 700, 1024)
    first = svel.stable_target(x, refs, t, labels)
    for _ in range(5):
        assert torch.equal(svel.stable_target(x, refs, t, labels), first)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("n", "m", "d"), [(64, 131_101, 128), (20, 40_000, 512), (5, 4000, 4096)])
def test_pools_of_near_references(rng, n, m, d, geometry):
    """Many parts of many near ties, at small times."""
    check_pool(*make_pool(n, m, d, geometry, rng, times=(0.05, 0.1, 0.2, 0.35), dtype=torch.bfloat16), path="cosine")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [128, 1000, 4096])
def test_classes_of_near_references(rng, d, geometry):
    x, refs, t = make_pool(48, 300, d, geometry, rng, times=(0.05, 0.1, 0.2, 0.35))
    bank = torch.stack([refs.flip(0), refs])
    labels = torch.ones(len(x), dtype=torch.int64, device="cuda")
    out = svel.stable_target(x, bank, t, labels)
    expected = reference.stable_target(x.double(), refs, t)
    for time in t.unique():
        assert relative_error(out[t == time], expected[t == time]) <= LIMIT

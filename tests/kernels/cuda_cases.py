"""What the GPU tests of the kernels share: pools of references, runs on two streams and in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import ALL_T, largest_logit, photographs
from torch import Tensor

import stablevelocity_kernels as svel
from stablevelocity_kernels import info, reference
from stablevelocity_kernels.testing import TOLERANCE, make_noisy, make_references, relative_error

GEOMETRIES = ("gaussian", "manifold", "shifted")


def make_pool(n, m, d, geometry, rng, times=ALL_T, dtype=torch.float16):
    """x (n, d), refs (m, d), t (n,): all times in turn. On the GPU."""
    return rows_of(make_references(m, d, geometry, rng).to(dtype), n, rng, times)


def make_photograph_pool(n, m, side, rng, dtype=torch.float16, times=ALL_T):
    """The same of pieces of photographs, d = 3 side side."""
    return rows_of(photographs(m, side, rng).to(dtype), n, rng, times)


def rows_of(refs, n, rng, times=ALL_T):
    t = torch.tensor([times[i % len(times)] for i in range(n)])
    x = make_noisy(refs[torch.randint(len(refs), (n,), generator=rng)], t, rng)
    return x.cuda(), refs.cuda(), t.cuda()


def make_large_pool(n, m, d):
    """References made on the GPU; rows near the last of them."""
    refs = torch.empty(m, d, dtype=torch.float16, device="cuda")
    for chunk in refs.split(1 << 15):
        chunk.copy_(torch.randn(chunk.shape, device="cuda"))
    t = torch.tensor(ALL_T, device="cuda")[torch.arange(n) % len(ALL_T)]
    x0 = refs[m - 1 - torch.arange(n, device="cuda") % m]
    return (1 - t[:, None]) * x0 + t[:, None] * torch.randn(n, d, device="cuda"), refs, t


def draw_rows(refs, n, rng, times=ALL_T, counts=None, everywhere=8):
    """x, t and labels of rows near valid references, on the GPU; every `everywhere`-th row has those of all classes."""
    k, m = refs.shape[:2]
    t = torch.tensor([times[i % len(times)] for i in range(n)])
    labels = torch.randint(k, (n,), generator=rng)
    most = torch.full((k,), m) if counts is None else counts.clamp(1, m)
    picked = (torch.rand(n, generator=rng) * most[labels]).long()
    x = make_noisy(refs[labels, picked], t, rng)
    if everywhere:
        labels[::everywhere] = -1
    return x.cuda(), t.cuda(), labels.cuda()


def make_classes(n, k, m, d, geometry, rng, dtype=torch.float16, **options):
    """x (n, d), refs (k, m, d), t (n,), labels (n,). On the GPU."""
    refs = make_references(k * m, d, geometry, rng).view(k, m, d).to(dtype)
    x, t, labels = draw_rows(refs, n, rng, **options)
    return x, refs.cuda(), t, labels


def fill_partly(refs, rng):
    """Counts, and NaN in what is not filled. Of several the first is whole; of many one is zero and one negative."""
    k, m = refs.shape[:2]
    counts = torch.randint(m // 2, m, (k,), generator=rng)
    if k > 1:
        counts[0] = m
    if k > 2:
        counts[1], counts[k - 1] = 0, -3
    for group, count in zip(refs, counts.tolist(), strict=True):
        group[max(count, 0) :] = math.nan
    return counts


def make_crowds(n, m, d, rng, times):
    """References crowded about two opposite points, so that no centre makes scores small, and rows near one of them.

    Hundreds share the weight where t is small, and float32 cannot tell them apart. A time to each row.
    """
    point = torch.randn(d, generator=rng)
    refs = (point * (1 - 2 * (torch.arange(m)[:, None] % 2)) + 1e-3 * torch.randn(m, d, generator=rng)).half()
    return rows_of(refs, n, rng, [times[i % len(times)] * (1 + 1e-3 * i) for i in range(n)])


def make_pool_of_size(n, m, d, size, rng):
    """Data of a size; rows of zeros too, one element above all others, and rows of other sizes than the references."""
    refs = (size * torch.randn(m, d, generator=rng)).half()
    t = torch.tensor([0.3, 0.9])[torch.arange(n) % 2]
    x = (1 - t[:, None]) * refs[:n].float() + size * t[:, None] * torch.randn(n, d, generator=rng)
    x[5], x[6, 0] = 0, 3e4 * size
    x[7] *= 1e-6
    for row in range(4, 9):  # a time to each, since their sizes differ
        t[row] = 0.5 + 0.05 * row
    return x.cuda(), refs.cuda(), t.cuda()


def invalidate(refs, count):
    """NaN beyond the references that count."""
    refs = refs.clone()
    refs[max(0, count) :] = math.nan
    return refs


def worst_row(out: Tensor, expected: Tensor) -> float:
    return float(((out.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())


def served_by(kernel):
    """A fixture of a whole file: this kernel serves wherever it can, also where another is expected to be quicker."""

    @pytest.fixture(autouse=True)
    def prefer(monkeypatch):
        monkeypatch.setenv("SVEL_KERNEL", kernel)

    return prefer


def assert_served(kernel, x, refs, precision):
    """A test of one kernel is none if another serves. refs: a pool (m, d), or classes (k, m, d) with labels."""
    if torch.cuda.get_device_capability() == (9, 0) and info._C is not None:
        *k, m, d = refs.shape
        plan = info.plan(len(x), m, d, *k, x_dtype=x.dtype, refs_dtype=refs.dtype, precision=precision)
        assert plan["kernel"] == kernel


def assert_close_at_each_time(out, expected, t, precision):
    """Rows of each time together, NaN where the reference has it."""
    assert torch.equal(out.isnan(), expected.isnan())
    limit, worst = TOLERANCE[out.dtype, precision], {}
    for time in t[~t.isnan()].unique():
        rows = (t == time) & ~expected.isnan().any(1)
        if rows.any():
            worst[round(float(time), 6)] = relative_error(out[rows], expected[rows])
    assert all(error <= limit for error in worst.values()), worst


def check_pool(x, refs, t, counts=None, source=None, path="linear", prediction="velocity", precision="exact"):
    """stable_target against the reference in float64, rows of each time together."""
    options = {"counts": counts, "path": path, "prediction": prediction}
    out = svel.stable_target(x, refs, t, source=source, precision=precision, **options)
    wide = None if source is None else source.double()
    assert_close_at_each_time(out, reference.stable_target(x.double(), refs, t, source=wide, **options), t, precision)
    return out


def samples_of(m: int) -> Tensor:
    """The 64 references of m that the kernel of many rows has its centre and its scale from."""
    return m * torch.arange(64) // 64


def samples_and_neighbours(m: int, count: int) -> Tensor:
    """So many of the samples, and the references behind them, which are none."""
    return (samples_of(m)[::2][:count, None] + torch.arange(2)).flatten()


def samples_and_ends(m: int) -> Tensor:
    """A few samples, and references of the first round and of the last that are none."""
    return torch.cat([samples_of(m)[5:9], torch.tensor([1, m - 1])])


def make_two_sizes(m, d, size, kind, rng):
    """Gaussians (m, d), half, few or most of them `size` times the others; and which (m,)."""
    share = {"half": 0.5, "few": 0.02, "most": 0.9}[kind]
    kinds = (torch.rand(m, generator=rng) < share).long()
    return torch.randn(m, d, generator=rng) * torch.where(kinds == 1, size, 1.0)[:, None], kinds


def make_zeros_and_few_others(m, d, rng):
    """(m, d), nearly all of them copies of zero; and the one that is far, a sample."""
    refs = torch.randn(m, d, generator=rng) * (torch.rand(m, generator=rng) < 0.004)[:, None]
    far = samples_of(m)[[17]]
    refs[far] = 1e6 * torch.randn(1, d, generator=rng)
    return refs, far


def check_outliers(x, refs, t, far, precision):
    """`check_beside_far` of references that are made a million times as large, by the kernel of many rows."""
    refs[far] *= 1e6
    assert_served("many_rows", x, refs, precision)
    check_beside_far(x, refs, t, far, precision)


def check_beside_far(x, refs, t, far, precision="exact", counts=None, only_beside=True):
    """References `far` are much larger than others. Every third row comes near one of them.

    Each kind of rows has all or none of their weight: beside them float64 would not tell the others apart. Where it
    would (not `only_beside`), all references weigh on rows of much noise.
    """
    far = far.to(refs.device)
    of_far = torch.arange(len(x), device=x.device) % 3 == 0
    own = far[torch.arange(len(x), device=x.device) % len(far)]
    t[of_far] = 0.5
    x[of_far] = 0.5 * refs[own][of_far].float() + 0.5 * torch.randn_like(x[of_far])
    out = svel.stable_target(x, refs, t, None, counts, precision=precision)
    valid = refs if counts is None else refs[: int(counts)]
    others = valid[~torch.isin(torch.arange(len(valid), device=refs.device), far)]
    noisy = ~of_far & (t >= 0.9) & (not only_beside)
    for rows, seen in ((~of_far & ~noisy, others), (noisy, valid), (of_far, refs[far])):
        expected = reference.stable_target(x[rows].double(), seen, t[rows])
        assert_close_at_each_time(out[rows], expected, t[rows], precision)


def check_mean_near_each(refs, kinds, sizes, rng, precision):
    """posterior_mean beside references of a few sizes, kinds (m,): rows near those of each size, noise of that size."""
    for kind, size in enumerate(sizes):
        members = (kinds == kind).nonzero()[:, 0]
        n = 130
        sigma = size * torch.tensor([0.3, 3.0, 10.0, 30.0, 300.0])[torch.arange(n) % 5]
        own = refs[members[torch.randint(len(members), (n,), generator=rng)]].float()
        x = own + sigma[:, None] * torch.randn(n, refs.shape[1], generator=rng)
        x, seen, alpha, sigma = x.cuda(), refs.cuda(), torch.ones(n).cuda(), sigma.cuda()
        assert_served("many_rows", x, seen, precision)
        mean, lse = svel.posterior_mean(x, seen, alpha, sigma, precision=precision)
        expected, expected_lse = reference.posterior_mean(x.double(), seen, alpha, sigma)
        if kind > 0:  # others weigh nothing; beside them float64 would not tell the smallest apart
            alone = sigma < 0.3 * sizes[0]
            expected[alone], expected_lse[alone] = reference.posterior_mean(
                x[alone].double(), refs[members].cuda(), alpha[alone], sigma[alone]
            )
        errors = {}
        for value in sigma.unique():
            rows = sigma == value
            errors[float(value) / size] = relative_error(mean[rows], expected[rows])
        assert all(error <= TOLERANCE[torch.float32, precision] for error in errors.values()), (size, errors)
        scale = largest_logit(x, seen, alpha, sigma)
        assert ((lse - expected_lse).abs() <= TOLERANCE[torch.float32, precision] * scale).all()


def check_mean_and_lse(x, refs, sigma, precision, left_out=0):
    """posterior_mean of a pool with any alpha: below zero, zero and NaN too; without the last `left_out` references."""
    alpha, valid, counts = 1 - sigma, refs, None
    alpha[2], alpha[3], sigma[4] = 0, math.nan, math.nan
    alpha[10:] *= -1
    x[10:20] *= -1
    if left_out:
        counts = torch.tensor([len(refs) - left_out], device=refs.device)
        valid = invalidate(refs, len(refs) - left_out)
    mean, lse = svel.posterior_mean(x, valid, alpha, sigma, None, counts, precision=precision)
    expected_mean, expected = reference.posterior_mean(x.double(), valid, alpha, sigma, None, counts)
    good = ~expected.isnan()
    assert torch.equal(lse.isnan(), expected.isnan())
    assert torch.equal(mean.isnan(), expected_mean.isnan())
    for value in sigma[good].unique():
        rows = good & (sigma == value)
        assert relative_error(mean[rows], expected_mean[rows]) <= TOLERANCE[torch.float32, precision]
    scale = largest_logit(x[good], refs[: len(refs) - left_out], alpha[good], sigma[good])
    assert ((lse - expected)[good].abs() <= TOLERANCE[torch.float32, precision] * scale).all()


def check_merged_halves(op: Callable, x, refs, sigma, cut, limit):
    """Means of a pool's references before `cut` and from it on, put together by their lse."""
    halves = (refs[:cut], refs[cut:].contiguous())
    means, lses = zip(*(op(x, half, 1 - sigma, sigma) for half in halves), strict=True)
    share = torch.softmax(torch.stack(lses).double(), 0)[..., None]
    merged = (share * torch.stack(means)).sum(0)
    assert relative_error(merged, reference.posterior_mean(x.double(), refs, 1 - sigma, sigma)[0]) <= limit


def check_repeats(x, refs, t, times=5):
    """posterior_mean of a pool, bit for bit the same each time."""
    first = svel.posterior_mean(x, refs, 1 - t, t)
    for _ in range(times):
        for ours, theirs in zip(svel.posterior_mean(x, refs, 1 - t, t), first, strict=True):
            assert torch.equal(ours, theirs)


def check_graph_of_pool(static, others):
    """Nothing waits, and a graph follows its inputs. static, and each of others: [x, refs, t, counts] of a pool."""

    def target(x, refs, t, counts):
        mean, lse = svel.posterior_mean(x, refs, 1 - t, t, None, counts)
        return svel.stable_target(x, refs, t, None, counts), mean, lse

    replay = captured(target, static)
    with nothing_waits():
        target(*static)
    for new in others:
        for out, expected in zip(replay(new), target(*new), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def kernels_run(op: Callable, *args, **options) -> list[str]:
    """The names of what a call runs on the GPU, as the profiler sees them; none where it sees no kernels."""
    op(*args, **options)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        op(*args, **options)
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    return names if any("kernel" in name for name in names) else []


@contextmanager
def nothing_waits() -> Iterator[None]:
    """What waits for the GPU in here is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(target: Callable, static: Sequence[Tensor]) -> Callable:
    """`target` of the static tensors as a graph: a function that copies other values there and gives what it makes."""
    target(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = target(*static)

    def replay(new: Sequence[Tensor]):
        for old, value in zip(static, new, strict=True):
            old.copy_(value)
        graph.replay()
        return outs

    return replay


def on_two_streams(op: Callable, problems: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of what the op gives for two problems, ten times on two streams at once and before that alone."""
    expected = [op(*p) for p in problems]
    streams, outs = [torch.cuda.Stream(), torch.cuda.Stream()], [[], []]
    torch.cuda.synchronize()
    for _ in range(10):
        for problem, stream, made in zip(problems, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                made.append(op(*problem))
    torch.cuda.synchronize()
    for made, right in zip(outs, expected, strict=True):
        yield from ((out, right) for out in made)


def check_partly_filled(check: Callable, shape, geometry, rng, dtype, precision):
    """Holes between classes, classes without references, labels of none, and rows of all classes beside them."""
    n, k, m, d = shape
    refs = make_references(k * m, d, geometry, rng).view(k, m, d).to(dtype)
    counts = fill_partly(refs, rng)
    x, t, labels = draw_rows(refs.nan_to_num(), n, rng, counts=counts)
    labels[3], labels[4], t[5], x[6, d - 1] = k, -2, math.nan, math.inf
    for kind in (torch.int32, torch.int64):
        out = check(x, refs.cuda(), t, labels, counts.to(kind).cuda(), precision)
        empty = (labels == k) | (labels == -2) | (counts.cuda()[labels.clamp(0, k - 1)] <= 0) & (labels >= 0)
        assert out[empty].isnan().all()


def check_graph_of_classes(shape, rng):
    """A graph of both ops gives what they give, whatever its inputs become; nothing waits."""
    n, k, m, d = shape

    def fresh(geometry, counts=None):
        refs = make_references(k * m, d, geometry, rng).view(k, m, d).half()
        counts = fill_partly(refs, rng) if counts is None else counts
        return [*draw_rows(refs.nan_to_num(), n, rng, counts=counts), refs.cuda(), counts.cuda()]

    def target(x, t, labels, refs, counts):
        mean, lse = svel.posterior_mean(x, refs, 1 - t, t, labels, counts)
        return svel.stable_target(x, refs, t, labels, counts), mean, lse

    static = fresh("manifold")
    replay = captured(target, static)
    with nothing_waits():
        target(*static)
    for geometry, counts in (("shifted", None), ("gaussian", torch.full((k,), m)), ("manifold", torch.zeros(k).long())):
        new = fresh(geometry, counts)
        for out, expected in zip(replay(new), target(*new), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)

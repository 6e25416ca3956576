"""svel::bank_draw against its definition, row by row in float64, for exact random numbers."""

import math

import pytest
import torch
from kernel_cases import offset_by_one, schedule, with_gaps

from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import assert_close

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SAMPLE = (3, 5)


def by_definition(refs, counts, u, labels=None, fallback=None, noise=None, t=None, *, path="linear", t_min=0.0):
    """x0, slot, x_t, t_set in float64; a label out of range is a NaN row."""
    groups, capacity = refs.shape[:2]
    x0s, slots, x_ts, t_sets = [], [], [], []
    for i, number in enumerate(u.tolist()):
        label = 0 if labels is None else int(labels[i])
        members = [
            g * capacity + j
            for g in (range(groups) if label == -1 else [label] if 0 <= label < groups else [])
            for j in range(min(max(int(counts[g]), 0), capacity))
        ]
        x0 = torch.full(refs.shape[2:], math.nan, dtype=torch.float64)
        if members:
            slots.append(members[min(int(number * len(members)), len(members) - 1)])
            x0 = refs.flatten(0, 1)[slots[-1]].double()
        else:
            slots.append(-1)
            if fallback is not None and -1 <= label < groups:
                x0 = fallback[i].double()
        x0s.append(x0)
        if t is not None:
            alpha, sigma, _, _ = schedule(path, float(t[i]))
            x_ts.append(alpha * x0 + sigma * noise[i].double())
            t_sets.append(float(t[i]) if members and t[i] >= t_min else math.nan)
    shape = (len(u), *refs.shape[2:])
    x_t = torch.stack(x_ts) if x_ts else torch.empty(0 if t is None else shape)
    return (
        torch.stack(x0s).reshape(shape) if x0s else torch.empty(shape),
        torch.tensor(slots),
        x_t,
        torch.tensor(t_sets),
    )


def make_bank(rng, groups=4, capacity=6, sample=SAMPLE, dtype=torch.float32, counts=(4, 0, 6, 1), index=torch.int64):
    """NaN in every slot beyond its count."""
    refs, counts = torch.randn(groups, capacity, *sample, generator=rng).to(dtype), torch.tensor(counts)
    for group, count in zip(refs, counts.tolist(), strict=True):
        group[count:] = math.nan
    return refs, counts.to(index)


def rows(n, sample, rng, groups=4):
    """u, labels of every kind, fallback, noise and t for n rows."""
    labels = torch.arange(n) % (groups + 1) - 1
    u = torch.rand(n, dtype=torch.float64, generator=rng)
    fallback, noise = (torch.randn(n, *sample, generator=rng) for _ in range(2))
    return u, labels, fallback, noise, torch.rand(n, generator=rng)


def check(implementation, *args, **kwargs):
    """Outputs of the op, which are those of the definition."""
    got = implementation.op("bank_draw")(*args, **kwargs)
    expected = by_definition(*args, **kwargs)
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(got[3].double(), expected[3].double(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[2].isnan(), expected[2].isnan())
    assert_close(got[2].nan_to_num(), expected[2].nan_to_num())
    return got


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_fallback", [False, True])
def test_labels_of_every_kind(implementation, rng, path, index, with_fallback):
    refs, counts = make_bank(rng, index=index)
    u, labels, fallback, noise, t = rows(20, SAMPLE, rng)
    fallback = fallback if with_fallback else None
    x0, slot, _, t_set = check(implementation, refs, counts, u, labels, fallback, noise, t, path=path, t_min=0.4)
    empty = labels == 1
    assert torch.equal(slot < 0, empty)
    assert x0[empty].isnan().all() != with_fallback
    assert torch.equal(t_set.isnan(), empty | (t < 0.4))
    assert (slot[labels == -1].unique() // 6).numel() > 1, "one group only for the label of all"


@pytest.mark.parametrize("sample", [(), (1,), (7,), (8,), (1030,), (2056,), (2, 3, 5), (0,)], ids=str)
@pytest.mark.parametrize("noisy", [False, True])
def test_sample_shapes(implementation, rng, sample, noisy):
    refs, counts = make_bank(rng, sample=sample)
    u, labels, fallback, noise, t = rows(9, sample, rng)
    check(implementation, refs, counts, u, labels, fallback, *((noise, t) if noisy else ()))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows_dtype", FLOATS)
def test_dtypes(implementation, rng, dtype, rows_dtype):
    """References and rows of any dtype: x0 is exact, in float32, or float64 from float64 references."""
    refs, counts = make_bank(rng, sample=(16,), dtype=dtype)
    u, labels, fallback, noise, t = rows(9, (16,), rng)
    x0, slot, x_t, t_set = check(
        implementation, refs, counts, u, labels, fallback.to(rows_dtype), noise.to(rows_dtype), t.double()
    )
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert (x0.dtype, slot.dtype, x_t.dtype, t_set.dtype) == (work, torch.int64, work, torch.float64)
    drawn = slot >= 0
    assert torch.equal(x0[drawn], refs.flatten(0, 1)[slot[drawn]].to(work))
    assert torch.equal(x0[~drawn], fallback.to(rows_dtype)[~drawn].to(work))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_reference_has_its_share_of_the_numbers(implementation, dtype):
    """u = (i + 1/2) / 4c draws each of c references four times, for one group and for all."""
    refs, counts = torch.arange(24.0).reshape(3, 8, 1), torch.tensor([3, 0, 8])
    for label, members in ((0, [0, 1, 2]), (2, list(range(16, 24))), (-1, [0, 1, 2, *range(16, 24)])):
        n = 4 * len(members)
        u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).to(dtype)
        _, slot, _, _ = check(implementation, refs, counts, u, torch.full((n,), label))
        assert slot.tolist() == [m for m in members for _ in range(4)]


def test_numbers_at_the_ends(implementation):
    """The largest number below 1, whose product with the count may round up to it, and what is not in [0, 1)."""
    refs, counts = torch.arange(40.0).reshape(2, 20, 1), torch.tensor([20, 19])
    u = torch.tensor([0.0, 1 - 2.0**-53, 1.0, 7.0, -0.5, -math.inf, math.inf], dtype=torch.float64)
    for label, last in ((0, 19), (1, 38), (-1, 38)):
        first = max(label, 0) * 20
        _, slot, _, _ = implementation.op("bank_draw")(refs, counts, u, torch.full((7,), label))
        assert slot.tolist() == [first, last, last, last, first, first, last]


def test_counts_beyond_their_range_are_clamped(implementation, rng):
    refs = torch.randn(3, 4, 5, generator=rng)
    u, labels, fallback, _, _ = rows(12, (5,), rng, groups=3)
    check(implementation, refs, torch.tensor([9, -3, 2]), u, labels, fallback)


@pytest.mark.parametrize("groups", [1, 2, 255, 257, 1500])
def test_all_of_many_groups(implementation, rng, groups):
    """The search over the counts: every reference of the bank, drawn by its own number."""
    counts = torch.randint(0, 3, (groups,), generator=rng)
    counts[groups // 2] = 2
    refs = torch.arange(2.0 * groups).reshape(groups, 2, 1)
    total = int(counts.sum())
    n = total if groups < 300 else 40
    which = torch.linspace(0, total - 1, n).long()
    _, slot, _, _ = implementation.op("bank_draw")(refs, counts, (which.double() + 0.5) / total, torch.full((n,), -1))
    valid = torch.cat([2 * g + torch.arange(c) for g, c in enumerate(counts.tolist())])
    assert torch.equal(slot, valid[which])


def test_one_group_needs_no_labels(implementation, rng):
    refs, counts = make_bank(rng, 1, counts=(4,))
    u, _, fallback, noise, t = rows(8, SAMPLE, rng)
    check(implementation, refs, counts, u, None, fallback, noise, t)
    check(implementation, refs, counts * 0, u, None, fallback, noise, t)


@pytest.mark.parametrize(
    ("groups", "capacity", "n"), [(4, 6, 0), (4, 0, 5), (0, 6, 0)], ids=["no rows", "no slots", "no groups"]
)
def test_empty(implementation, rng, groups, capacity, n):
    refs, counts = torch.randn(groups, capacity, *SAMPLE, generator=rng), torch.full((groups,), capacity)
    u, labels, fallback, noise, t = rows(n, SAMPLE, rng)
    check(implementation, refs, counts, u, labels, fallback, noise, t)


def test_no_groups_but_all_of_them(implementation, rng):
    u, _, fallback, noise, t = rows(3, SAMPLE, rng)
    refs, counts = torch.randn(0, 6, *SAMPLE), torch.zeros(0, dtype=torch.int64)
    check(implementation, refs, counts, u, torch.full((3,), -1), fallback, noise, t)


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_unaligned_and_strided_inputs(implementation, rng, change, dtype):
    refs, counts = make_bank(rng, sample=(2, 8), dtype=dtype)
    args = (refs, counts, *rows(9, (2, 8), rng))
    expected = by_definition(*args)
    changed = [change(a.to(implementation.device)) for a in args]
    for got, value in zip(implementation.on_device("bank_draw")(*changed), expected, strict=True):
        torch.testing.assert_close(got.cpu().double(), value.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_nan_time_is_a_nan_row(implementation, rng):
    refs, counts = make_bank(rng)
    u, labels, fallback, noise, t = rows(10, SAMPLE, rng)
    t[2] = math.nan
    _, _, x_t, t_set = check(implementation, refs, counts, u, labels, fallback, noise, t)
    assert x_t[2].isnan().all()
    assert t_set[2].isnan()


def test_no_time_is_clamped(implementation, rng):
    refs, counts = make_bank(rng)
    u, _, _, noise, _ = rows(2, SAMPLE, rng)
    x0, _, x_t, t_set = implementation.op("bank_draw")(
        refs, counts, u, torch.tensor([0, 2]), None, noise, torch.tensor([0.0, 1.0])
    )
    assert torch.equal(x_t, torch.stack([x0[0], noise[1]]))
    assert t_set.tolist() == [0.0, 1.0]


@pytest.mark.usefixtures("poisoned_memory")
def test_every_output_is_written(torch_op, rng):
    refs, counts = make_bank(rng, sample=(2049,))
    u, labels, fallback, noise, t = rows(10, (2049,), rng)
    x0, _, x_t, _ = torch_op.op("bank_draw")(refs, counts, u, labels, fallback, noise, t)
    assert x0.isfinite().all()
    assert x_t.isfinite().all()


@pytest.mark.parametrize("bad", [-2, 4])
def test_out_of_range_label_is_an_error_on_cpu(torch_op, rng, bad):
    if torch_op.device == "cuda":
        pytest.skip("no label is read on the host there; the next test")
    refs, counts = make_bank(rng)
    with pytest.raises(RuntimeError, match=r"svel::bank_draw: labels: expected .*\[-1, 4\).*got"):
        torch_op.on_device("bank_draw")(refs, counts, torch.zeros(2), torch.tensor([1, bad]))


@pytest.mark.gpu
@pytest.mark.parametrize("sample", [(5,), (16,)])
@pytest.mark.parametrize("function", [torch.ops.svel.bank_draw, reference.bank_draw], ids=["served", "reference"])
def test_out_of_range_label_is_nan_on_cuda(rng, function, sample):
    refs, counts = make_bank(rng, sample=sample)
    u, _, fallback, noise, t = rows(6, sample, rng)
    labels = torch.tensor([0, -2, 4, -1, 2**40, -(2**40)])
    args = (refs, counts, u, labels, fallback, noise, t)
    got = [out.cpu() for out in function(*(a.cuda() for a in args))]
    for one, expected in zip(got, by_definition(*args), strict=True):
        torch.testing.assert_close(one.double(), expected.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
    bad = torch.tensor([1, 2, 4, 5])
    assert (got[1][bad] == -1).all()
    assert got[0][bad].isnan().all()


@pytest.mark.gpu
def test_a_graph_follows_its_inputs(rng):
    """Counts, labels and numbers are read at the replay, not at the capture."""
    refs, counts = make_bank(rng)
    static = [a.cuda() for a in (refs, counts, *rows(10, SAMPLE, rng))]
    torch.ops.svel.bank_draw(*static, t_min=0.3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.svel.bank_draw(*static, t_min=0.3)
    for new_counts in ((0, 2, 0, 5), (6, 6, 6, 6), (0, 0, 0, 0)):
        new = (torch.randn(refs.shape, generator=rng), torch.tensor(new_counts), *rows(10, SAMPLE, rng))
        for held, value in zip(static, new, strict=True):
            held.copy_(value)
        graph.replay()
        for got, expected in zip(out, by_definition(*new, t_min=0.3), strict=True):
            torch.testing.assert_close(got.cpu().double(), expected.double(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.gpu
def test_a_million_groups(rng):
    """Prefix sums in 64 bits and several rounds of the search: a row of all groups reads a million counts."""
    groups = 1_000_003
    counts = torch.randint(0, 2, (groups,), generator=rng, dtype=torch.int32)
    refs = torch.arange(float(groups), dtype=torch.float64)[:, None]
    total = int(counts.sum())
    which = torch.randint(total, (64,), generator=rng)
    u = (which.double() + 0.5) / total
    _, slot, _, _ = torch.ops.svel.bank_draw(refs.cuda(), counts.cuda(), u.cuda(), torch.full((64,), -1).cuda())
    assert torch.equal(slot.cpu(), counts.nonzero()[:, 0][which])

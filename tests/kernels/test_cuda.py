"""What only the CUDA kernels can get wrong: every planned kernel at its edges, no synchronisation, repeatability.

The contract of each op is tested on every implementation in test_<op>.py; here shapes are chosen so that each launch
the planner can make is reached, with rows that straddle thread blocks.
"""

import math

import pytest
import torch
from kernel_cases import direct_mean, make_problem

import stablevelocity_kernels as svel
from stablevelocity_kernels import reference
from stablevelocity_kernels.testing import TOLERANCE, assert_close, make_noisy, make_references, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(svel.backends().get("CUDA") != "native", reason="the compiled CUDA kernels do not serve"),
]
EXACT = TOLERANCE[torch.float32, "exact"]


def on_gpu(*tensors):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in tensors]


def check_bank(x, refs, t, labels, counts=None, source=None, prediction="velocity"):
    """stable_target on the GPU against the float64 reference, rows of each time together."""
    out = svel.stable_target(*on_gpu(x, refs, t, labels, counts, source), prediction=prediction).cpu()
    wide_source = None if source is None else source.double()
    expected = reference.stable_target(x.double(), refs, t, labels, counts, wide_source, prediction=prediction)
    assert torch.equal(out.isnan(), expected.isnan())
    for time in t.unique():
        rows = (t == time) & ~expected.isnan().reshape(len(t), -1).any(1)
        if rows.any():
            assert relative_error(out[rows], expected[rows]) <= TOLERANCE[out.dtype, "exact"]


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [10, 127, 784, 1032, 2056, 4096, 4100, 8200, 16384])
def test_class_banks_in_one_pass(rng, d, dtype):
    x, refs, t, labels, counts = make_bank(9, 3, 37, d, dtype, rng)
    in_range = labels.clamp(-1, 2)  # the reference refuses what CUDA answers with NaN
    stray = labels != in_range
    out = svel.stable_target(*on_gpu(x, refs, t, labels, counts)).cpu()
    expected = reference.stable_target(x.double(), refs, t, in_range, counts)
    expected[stray] = math.nan
    assert torch.equal(out.isnan(), expected.isnan())
    for time in t[~t.isnan()].unique():
        rows = (t == time) & ~stray
        if rows.any():
            assert relative_error(out[rows], expected[rows]) <= EXACT


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("d", "m"), [(16392, 20), (65536, 40), (65537, 5), (2**21, 3)])
def test_large_samples_in_two_passes(rng, d, m, dtype):
    x, refs, t, labels, counts = make_bank(3, 2, m, d, dtype, rng, "manifold")
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


def test_lse_merges_over_disjoint_halves(rng):
    refs = make_references(60, 300, "manifold", rng).half()
    sigma = torch.full((4,), 0.9)
    x = make_noisy(refs[:4], sigma, rng)
    parts = [svel.posterior_mean(*on_gpu(x, half, 1 - sigma, sigma)) for half in (refs[:11], refs[11:])]
    share = torch.softmax(torch.stack([lse for _, lse in parts]).double(), 0)[..., None]
    merged = (share[0] * parts[0][0] + share[1] * parts[1][0]).float().cpu()
    assert_close(merged, direct_mean(x, refs, 1 - sigma, sigma)[0])


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
    yield lambda: svel.stable_target(x, bank, t, labels, counts, x)
    yield lambda: svel.posterior_mean(x, bank, 1 - t, t, labels, counts)
    yield lambda: svel.stable_target(many[:2], pool, t[:2])
    yield lambda: svel.stable_target(many, pool, times)
    yield lambda: svel.stable_target(rows, rows, times)
    yield lambda: svel.stable_target(x.double(), bank, t, labels)
    yield lambda: svel.stable_target(torch.ones(1, 40_000, device="cuda"), torch.ones(3, 40_000, device="cuda"), t[:1])
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
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


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

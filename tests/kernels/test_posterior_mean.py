"""svel::posterior_mean against the direct formula in float64: the numerical contract, the sets, the edges."""

import math

import pytest
import torch
from kernel_cases import (
    SET_PATTERNS,
    direct_mean,
    largest_logit,
    make_problem,
    make_sets,
    offset_by_one,
    photographs,
    problem_over,
    with_gaps,
)

from stablevelocity_kernels.testing import (
    GEOMETRIES,
    TOLERANCE,
    assert_close,
    make_noisy,
    make_references,
    relative_error,
)

EXACT = TOLERANCE[torch.float32, "exact"]
SMALL = (1, 2, 3, 10, 63, 257, 1024)
LARGE = (3072, 16384, 65536)


def assert_lse_close(lse, expected, x, refs, alpha, sigma, precision="exact"):
    """An error of lse is relative to the largest logit that went into it."""
    assert ((lse - expected).abs() <= TOLERANCE[lse.dtype, precision] * largest_logit(x, refs, alpha, sigma)).all()


def check_contract(op, problem, precision="exact"):
    alpha = 1 - problem.t
    mean, lse = op(problem.x, problem.refs, alpha, problem.t, precision=precision)
    expected_mean, expected_lse = direct_mean(problem.x, problem.refs, alpha, problem.t)
    limit = TOLERANCE[torch.float32, precision]
    assert mean.dtype == lse.dtype == torch.float32
    assert problem.worst(mean, expected_mean) <= limit
    assert_lse_close(lse, expected_lse, problem.x, problem.refs, alpha, problem.t, precision)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", SMALL)
def test_contract(implementation, rng, d, geometry):
    each = 1 if implementation.interpreted else 4
    check_contract(implementation.op("posterior_mean"), make_problem(d, 37, geometry, rng, each=each))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", LARGE)
def test_contract_at_large_d(implementation, rng, d, geometry):
    if implementation.interpreted:
        problem = make_problem(d // 4, 5, geometry, rng, times=(0.05, 0.9), each=1)
    else:
        problem = make_problem(d, 48, geometry, rng, each=2)
    check_contract(implementation.op("posterior_mean"), problem)


def test_contract_at_the_largest_d(torch_op, rng):
    check_contract(torch_op.op("posterior_mean"), make_problem(2**21, 4, "shifted", rng, times=(0.2, 0.999), each=1))


@pytest.mark.parametrize("side", [5, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_contract_on_photographs(implementation, rng, dtype, side):
    m, side, each = (30, side // 2, 1) if implementation.interpreted else (1000, side, 2)
    refs = photographs(m, side, rng).to(dtype)
    check_contract(implementation.op("posterior_mean"), problem_over(refs, rng, each=each))


@pytest.mark.parametrize("m", [1, 2, 5, 64, 257, 2000])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_contract_at_any_number_of_references(implementation, rng, m, geometry):
    each = 1 if implementation.interpreted else 4
    check_contract(implementation.op("posterior_mean"), make_problem(16, m, geometry, rng, each=each))


def test_contract_where_the_weights_stay_spread_over_many_references(implementation, rng):
    """Rounding errors of the sums must not grow with the number of references."""
    m = 600 if implementation.interpreted else 20_000
    problem = make_problem(300, m, "manifold", rng, times=(0.9, 0.999), each=1)
    check_contract(implementation.op("posterior_mean"), problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [5, 300, 5000])
def test_contract_with_references_of_other_dtypes(implementation, rng, d, dtype):
    problem = make_problem(d, 9, "manifold", rng, each=1, dtype=dtype)
    check_contract(implementation.op("posterior_mean"), problem)


@pytest.mark.parametrize("d", [7, 1024])
def test_fast_precision(implementation, rng, d):
    check_contract(implementation.op("posterior_mean"), make_problem(d, 33, "manifold", rng, each=2), "fast")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [5, 300, 5000])
def test_x_of_other_dtypes(implementation, rng, d, dtype):
    problem = make_problem(d, 9, "gaussian", rng, each=1)
    x, alpha, sigma = problem.x.to(dtype), 1 - problem.t, problem.t
    mean, lse = implementation.op("posterior_mean")(x, problem.refs.to(dtype), alpha, sigma)
    expected_mean, expected_lse = direct_mean(x, problem.refs.to(dtype), alpha, sigma)
    assert mean.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(mean, expected_mean)
    assert_lse_close(lse, expected_lse, x, problem.refs, alpha, sigma)


@pytest.mark.parametrize("pattern", SET_PATTERNS)
@pytest.mark.parametrize("sample", [(1,), (3, 5), (2, 5, 31), (5000,)], ids=str)
def test_sets(implementation, rng, pattern, sample):
    n = 6
    sets = make_sets(pattern, n, sample, rng)
    x = 0.5 + torch.randn(n, *sample, generator=rng)
    sigma = torch.linspace(0.4, 0.9, n)
    mean, lse = implementation.op("posterior_mean")(x, sets.refs, 1 - sigma, sigma, *sets.args())
    expected_mean, expected_lse = direct_mean(x, sets.refs, 1 - sigma, sigma, *sets.args())
    assert torch.equal(mean.isnan(), expected_mean.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert_close(mean.nan_to_num(), expected_mean.nan_to_num())
    assert_close(lse.nan_to_num(), expected_lse.nan_to_num())


@pytest.mark.parametrize("counts", [[9, 9], [-3, 2]])
def test_counts_are_clamped(implementation, rng, counts):
    refs, x = torch.randn(2, 4, 6, generator=rng), torch.randn(4, 6, generator=rng)
    labels, sigma = torch.tensor([0, 1, -1, 1]), torch.full((4,), 0.7)
    mean, _ = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma, labels, torch.tensor(counts))
    expected, _ = direct_mean(x, refs, 1 - sigma, sigma, labels, torch.tensor(counts))
    assert torch.equal(mean.isnan(), expected.isnan())
    assert_close(mean.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16])
def test_source_has_the_dtype_of_x_or_of_the_references(implementation, rng, source_dtype):
    refs, x = torch.randn(5, 33, generator=rng).half(), torch.randn(3, 33, generator=rng)
    source, sigma = torch.randn(3, 33, generator=rng).to(source_dtype), torch.full((3,), 0.9)
    mean, lse = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma, None, None, source)
    expected_mean, expected_lse = direct_mean(x, refs, 1 - sigma, sigma, source=source)
    assert_close(mean, expected_mean)
    assert_close(lse, expected_lse)


def test_x_itself_as_source(implementation, rng):
    refs, x, sigma = torch.randn(5, 8, generator=rng), torch.randn(3, 8, generator=rng), torch.full((3,), 0.9)
    mean, _ = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma, None, None, x)
    assert_close(mean, direct_mean(x, refs, 1 - sigma, sigma, source=x)[0])


@pytest.mark.parametrize(
    ("n", "m", "sample"),
    [(0, 3, (4,)), (2, 0, (4,)), (2, 3, (0,)), (2, 3, (4, 0)), (0, 0, (0,)), (3, 4, ())],
    ids=str,
)
def test_empty_and_scalar_shapes(implementation, rng, n, m, sample):
    x, refs = torch.randn(n, *sample, generator=rng), torch.randn(m, *sample, generator=rng)
    sigma = torch.full((n,), 0.5)
    mean, lse = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma)
    assert mean.shape == x.shape
    assert lse.shape == (n,)
    if m == 0:
        assert mean.isnan().all()
        assert lse.isnan().all()
    elif n:
        expected_mean, expected_lse = direct_mean(x, refs, 1 - sigma, sigma)
        assert_close(mean, expected_mean)
        assert_close(lse, expected_lse)


@pytest.mark.parametrize("lead", [(0, 3), (3, 0)], ids=["no groups", "no slots"])
def test_no_references_at_all(implementation, rng, lead):
    x, refs = torch.randn(2, 5, generator=rng), torch.empty(*lead, 5)
    sigma, labels = torch.full((2,), 0.5), torch.full((2,), -1)
    counts = torch.zeros(lead[0], dtype=torch.int64)
    mean, lse = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma, labels, counts)
    assert mean.isnan().all()
    assert lse.isnan().all()
    mean, _ = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma, labels, None, x)
    assert_close(mean, x)


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
@pytest.mark.parametrize("d", [7, 300, 4099])
def test_unaligned_and_strided(implementation, rng, change, d):
    sets = make_sets("labels, int64 counts, source", 4, (d,), rng)
    x, sigma = torch.randn(4, d, generator=rng), torch.full((4,), 0.8)
    plain = (x, sets.refs.half(), 1 - sigma, sigma, *sets.args())
    op = implementation.on_device("posterior_mean")
    changed = [change(a.to(implementation.device)) for a in plain]
    mean, lse = op(*changed)
    expected_mean, expected_lse = direct_mean(*plain)
    assert_close(mean.cpu(), expected_mean)
    assert_close(lse.cpu(), expected_lse)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["x", "alpha", "sigma", "source"])
@pytest.mark.parametrize("d", [6, 5000])
def test_a_bad_row_is_nan_and_leaves_the_others(implementation, rng, bad, argument, d):
    n = 3
    refs = torch.randn(4, d, generator=rng)
    given = {
        "x": torch.randn(n, d, generator=rng),
        "alpha": torch.full((n,), 0.4),
        "sigma": torch.full((n,), 0.6),
        "source": torch.randn(n, d, generator=rng),
    }
    expected, expected_lse = direct_mean(given["x"], refs, given["alpha"], given["sigma"], source=given["source"])
    given[argument][1] = bad if given[argument].dim() == 1 else torch.where(torch.arange(d) == d // 2, bad, 1.0)
    args = given["x"], refs, given["alpha"], given["sigma"], None, None, given["source"]
    mean, lse = implementation.op("posterior_mean")(*args)
    assert mean[1].isnan().all()
    assert lse[1].isnan()
    assert_close(mean[::2], expected[::2])
    assert_close(lse[::2], expected_lse[::2])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [12, 5000])
def test_lse_merges_two_halves(implementation, rng, geometry, d):
    problem = make_problem(d, 20, geometry, rng, times=(0.5, 0.9), each=2)
    op, args = implementation.op("posterior_mean"), (1 - problem.t, problem.t)
    first, second = op(problem.x, problem.refs[:7], *args), op(problem.x, problem.refs[7:], *args)
    share = torch.softmax(torch.stack([first[1], second[1]]).double(), 0)[:, :, None]
    merged = share[0] * first[0] + share[1] * second[0]
    expected, expected_lse = direct_mean(problem.x, problem.refs, *args)
    # A float32 lse is rounded relative to itself, which moves the shares, and with them the sum where the means differ.
    moved = share[0] * share[1] * (first[0] - second[0]).norm(dim=1, keepdim=True) * expected_lse.abs()[:, None]
    assert relative_error(merged, expected) <= EXACT * (1 + float(moved.norm() / expected.norm()))


def test_lse_merges_halves_with_different_means(implementation, rng):
    d, n = 24, 4
    near, far = make_references(6, d, "shifted", rng), make_references(6, d, "shifted", rng)
    far = far - far.mean(0) + near.mean(0) + 0.3
    sigma = torch.full((n,), 0.9)
    x = make_noisy(torch.cat([near[:2], far[:2]]), sigma, rng)
    op = implementation.op("posterior_mean")
    first, second = op(x, near, 1 - sigma, sigma), op(x, far, 1 - sigma, sigma)
    share = torch.softmax(torch.stack([first[1], second[1]]).double(), 0)[:, :, None]
    assert share.min() > 1e-3  # both halves count, or this would test nothing
    assert_close(
        (share[0] * first[0] + share[1] * second[0]).float(),
        direct_mean(x, torch.cat([near, far]), 1 - sigma, sigma)[0],
    )


def test_inputs_are_not_changed(implementation, rng):
    sets = make_sets("some null labels, counts, source", 4, (6,), rng)
    args = [torch.randn(4, 6, generator=rng), sets.refs, torch.full((4,), 0.5), torch.full((4,), 0.5), *sets.args()]
    args = [a.to(implementation.device) for a in args]
    before = [a.clone() for a in args]
    implementation.on_device("posterior_mean")(*args)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("d", [1, 33, 1025, 5001])
def test_every_output_is_written(implementation, rng, poisoned_memory, d):
    x, refs = torch.randn(3, d, generator=rng), torch.randn(5, d, generator=rng)
    sigma = torch.full((3,), 0.5)
    mean, lse = implementation.op("posterior_mean")(x, refs, 1 - sigma, sigma)
    assert not mean.isnan().any()
    assert not lse.isnan().any()


def test_large_logits_are_not_clamped(implementation, rng):
    """At large D every logit is far below -1e4; clamped there, all weights would become equal."""
    problem = make_problem(32768 if not implementation.interpreted else 9000, 6, "gaussian", rng, times=(0.3,), each=2)
    mean, _ = implementation.op("posterior_mean")(problem.x, problem.refs * 3, 1 - problem.t, problem.t / 3)
    assert_close(mean, direct_mean(problem.x, problem.refs * 3, 1 - problem.t, problem.t / 3)[0])


def test_out_of_range_label_is_an_error_on_cpu(torch_op):
    if torch_op.device == "cuda":
        pytest.skip("no label is read on the host there; the next test")
    args = torch.zeros(2, 3), torch.zeros(4, 5, 3), torch.full((2,), 0.5), torch.full((2,), 0.5)
    for bad in (4, -2):
        with pytest.raises(RuntimeError, match=r"svel::posterior_mean: labels: expected .*\[-1, 4\).*got"):
            torch_op.on_device("posterior_mean")(*args, torch.tensor([0, bad]))


@pytest.mark.gpu
def test_out_of_range_label_is_nan_on_cuda(rng):
    x, refs, sigma = torch.randn(3, 4), torch.randn(2, 5, 4), torch.full((3,), 0.5)
    labels = torch.tensor([5, 1, -7])
    mean, lse = (o.cpu() for o in torch.ops.svel.posterior_mean(*(a.cuda() for a in (x, refs, sigma, sigma, labels))))
    assert mean[::2].isnan().all()
    assert lse[::2].isnan().all()
    assert_close(mean[1:2], direct_mean(x[1:2], refs, sigma, sigma, labels[1:2])[0])


def test_no_gradient(torch_op):
    x = torch.zeros(2, 3, device=torch_op.device, requires_grad=True)
    sigma = torch.full((2,), 0.5, device=torch_op.device)
    if torch_op.name == "reference":
        pytest.skip("a property of the registered op")
    mean, _ = torch_op.on_device("posterior_mean")(x, torch.zeros(4, 3, device=torch_op.device), sigma, sigma)
    with pytest.raises(RuntimeError, match="posterior_mean has no gradient"):
        mean.sum().backward()

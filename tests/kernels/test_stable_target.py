"""svel::stable_target against the direct formula in float64, and against posterior_mean with the table."""

import math

import pytest
import torch
from kernel_cases import (
    ALL_T,
    SET_PATTERNS,
    direct_target,
    make_problem,
    make_sets,
    offset_by_one,
    predict,
    schedule,
    with_gaps,
)

from stablevelocity_kernels import PATHS, PREDICTIONS
from stablevelocity_kernels.testing import GEOMETRIES, TOLERANCE, assert_close, relative_error

EXACT = TOLERANCE[torch.float32, "exact"]


def check_contract(op, problem, path="linear", predictions=PREDICTIONS, limit=EXACT):
    x0 = direct_target(problem.x, problem.refs, problem.t, path=path, prediction="x0")
    errors = {}
    for prediction in predictions:
        out = op(problem.x, problem.refs, problem.t, path=path, prediction=prediction)
        assert out.dtype == problem.x.dtype
        errors[prediction] = problem.worst(out, predict(problem.x, x0, problem.t, path, prediction))
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [1, 2, 17, 300, 1024])
def test_contract(implementation, rng, d, geometry, path):
    each = 1 if implementation.interpreted else 4
    check_contract(implementation.op("stable_target"), make_problem(d, 24, geometry, rng, each=each), path)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [4096, 32768])
def test_contract_at_large_d(implementation, rng, d, geometry):
    if implementation.interpreted:
        problem = make_problem(d // 4 + 1024, 5, geometry, rng, times=(0.05, 0.9), each=1)
        check_contract(implementation.op("stable_target"), problem, predictions=("velocity",))
    else:
        check_contract(implementation.op("stable_target"), make_problem(d, 40, geometry, rng, each=2))


@pytest.mark.parametrize("path", PATHS)
def test_contract_at_the_largest_d(torch_op, rng, path):
    problem = make_problem(2**21, 4, "manifold", rng, times=(0.05, 0.9), each=1)
    check_contract(torch_op.op("stable_target"), problem, path, ("velocity",))


@pytest.mark.parametrize("m", [1, 3, 65, 1000])
def test_contract_at_any_number_of_references(implementation, rng, m):
    each = 1 if implementation.interpreted else 4
    check_contract(implementation.op("stable_target"), make_problem(64, m, "manifold", rng, each=each))


@pytest.mark.parametrize("refs_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d", [33, 768])
def test_contract_with_stored_dtypes(implementation, rng, d, refs_dtype):
    problem = make_problem(d, 16, "shifted", rng, each=2, dtype=refs_dtype)
    check_contract(implementation.op("stable_target"), problem, predictions=("velocity", "x0"))


@pytest.mark.parametrize("path", PATHS)
def test_fast_precision(implementation, rng, path):
    problem = make_problem(64, 30, "manifold", rng, each=2)
    op = implementation.op("stable_target")

    def fast(*args, **kwargs):
        return op(*args, precision="fast", **kwargs)

    check_contract(fast, problem, path, ("velocity",), TOLERANCE[torch.float32, "fast"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [9, 520])
def test_dtypes_of_x(implementation, rng, d, dtype):
    if implementation.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16; a GPU rounds")
    problem = make_problem(d, 12, "gaussian", rng, times=(0.2, 0.6, 0.95), each=2)
    x = problem.x.to(dtype)
    for prediction in PREDICTIONS:
        out = implementation.op("stable_target")(x, problem.refs, problem.t, prediction=prediction)
        assert out.dtype == dtype
        assert_close(out, direct_target(x, problem.refs, problem.t, prediction=prediction))


@pytest.mark.parametrize("pattern", SET_PATTERNS)
@pytest.mark.parametrize("sample", [(1,), (2, 3, 7)], ids=str)
def test_sets(implementation, rng, pattern, sample):
    n = 6
    sets = make_sets(pattern, n, sample, rng)
    x, t = 0.5 + torch.randn(n, *sample, generator=rng), torch.linspace(0.3, 0.95, n)
    out = implementation.op("stable_target")(x, sets.refs, t, *sets.args())
    expected = direct_target(x, sets.refs, t, *sets.args())
    assert torch.equal(out.isnan(), expected.isnan())
    assert_close(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("d", [11, 5000])
def test_is_posterior_mean_and_the_table(implementation, rng, path, prediction, d):
    problem = make_problem(d, 6, "gaussian", rng, times=(0.4, 0.9), each=1)
    alpha, sigma, _, _ = (torch.tensor(c) for c in zip(*(schedule(path, t) for t in problem.t.tolist()), strict=True))
    source = torch.randn(problem.x.shape, generator=rng)
    mean, _ = implementation.op("posterior_mean")(problem.x, problem.refs, alpha, sigma, None, None, source)
    target = implementation.op("stable_target")(
        problem.x, problem.refs, problem.t, None, None, source, path=path, prediction=prediction
    )
    assert_close(target, predict(problem.x, mean, problem.t, path, prediction))


@pytest.mark.parametrize("path", PATHS)
def test_time_is_clamped(implementation, rng, path):
    x, refs = torch.randn(4, 6, generator=rng), torch.randn(3, 6, generator=rng)
    t = torch.tensor([-1.0, 0.0, 1.0, 7.0])
    out = implementation.op("stable_target")(x, refs, t, path=path)
    expected = direct_target(x, refs, t, path=path)
    assert expected.isfinite().all()
    assert relative_error(out[:2], expected[:2]) <= EXACT  # the factor 1/t is 1e5 there
    assert relative_error(out[2:], expected[2:]) <= EXACT


@pytest.mark.parametrize("d", [5, 5000])
def test_rows_without_a_time_are_skipped(implementation, rng, d):
    """t = NaN marks a row that is not wanted: NaN comes back, whatever its label's references hold."""
    refs = torch.randn(2, 3, d, generator=rng)
    refs[1] = math.nan
    x, t = torch.randn(4, d, generator=rng), torch.tensor([math.nan, 0.5, math.nan, 0.7])
    labels = torch.tensor([1, 0, 0, 0])
    out = implementation.op("stable_target")(x, refs, t, labels)
    assert out[::2].isnan().all()
    assert_close(out[1::2], direct_target(x[1::2], refs, t[1::2], labels[1::2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("argument", ["x", "source"])
def test_a_bad_row_is_nan_and_leaves_the_others(implementation, rng, bad, argument):
    refs, t = torch.randn(4, 6, generator=rng), torch.full((3,), 0.6)
    given = {"x": torch.randn(3, 6, generator=rng), "source": torch.randn(3, 6, generator=rng)}
    expected = direct_target(given["x"], refs, t, source=given["source"])
    given[argument][1, 2] = bad
    out = implementation.op("stable_target")(given["x"], refs, t, None, None, given["source"])
    assert out[1].isnan().all()
    assert_close(out[::2], expected[::2])


def test_nan_in_one_group_leaves_the_others(implementation, rng):
    refs, labels = torch.randn(3, 4, 6, generator=rng), torch.tensor([0, 1, 2])
    x, t = torch.randn(3, 6, generator=rng), torch.full((3,), 0.6)
    expected = direct_target(x, refs, t, labels)
    refs[1, 2, 3] = math.nan
    out = implementation.op("stable_target")(x, refs, t, labels)
    assert out[1].isnan().all()
    assert_close(out[::2], expected[::2])


@pytest.mark.parametrize(("n", "m", "sample"), [(0, 3, (4,)), (2, 0, (4,)), (2, 3, (0,)), (3, 4, ())], ids=str)
def test_empty_and_scalar_shapes(implementation, rng, n, m, sample):
    x, refs = torch.randn(n, *sample, generator=rng), torch.randn(m, *sample, generator=rng)
    out = implementation.op("stable_target")(x, refs, torch.full((n,), 0.5))
    assert out.shape == x.shape
    if m == 0:
        assert out.isnan().all()
    elif n:
        assert_close(out, direct_target(x, refs, torch.full((n,), 0.5)))


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
def test_unaligned_and_strided(implementation, rng, change):
    x, refs = torch.randn(4, 3, 11, generator=rng), torch.randn(2, 5, 3, 11, generator=rng).half()
    t, labels = torch.linspace(0.5, 0.9, 4), torch.tensor([0, 1, 1, -1])
    op = implementation.on_device("stable_target")
    out = op(*(change(a.to(implementation.device)) for a in (x, refs, t, labels)))
    assert out.is_contiguous()
    assert_close(out.cpu(), direct_target(x, refs, t, labels))


def test_float64_time(implementation, rng):
    x, refs = torch.randn(6, 9, generator=rng).double(), torch.randn(5, 9, generator=rng).double()
    t = torch.tensor(ALL_T, dtype=torch.float64)
    out = implementation.op("stable_target")(x, refs, t)
    assert out.dtype == torch.float64
    assert_close(out, direct_target(x, refs, t))


def test_inputs_are_not_changed(implementation, rng):
    sets = make_sets("labels, int64 counts, source", 4, (6,), rng)
    args = [torch.randn(4, 6, generator=rng), sets.refs, torch.tensor([-1.0, 0.5, 0.6, 2.0]), *sets.args()]
    args = [a.to(implementation.device) for a in args]
    before = [a.clone() for a in args]
    implementation.on_device("stable_target")(*args)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("d", [1, 33, 1025])
def test_every_output_is_written(implementation, rng, poisoned_memory, d):
    x, refs, t = torch.randn(3, d, generator=rng), torch.randn(5, d, generator=rng), torch.full((3,), 0.5)
    assert not implementation.op("stable_target")(x, refs, t).isnan().any()


def test_announced_null_rows_come_to_the_same(implementation, rng):
    x, refs, t = torch.randn(5, 12, generator=rng), torch.randn(3, 6, 12, generator=rng), torch.full((5,), 0.6)
    given = x, refs, t, torch.tensor([-1, 0, 2, -1, 1]), torch.tensor([6, 2, 0])
    for op, others in (("stable_target", given[2:]), ("posterior_mean", (1 - t, *given[2:]))):
        call = implementation.op(op)
        outs = (call(x, refs, *others, null_rows=announced) for announced in (True, False))
        for one, other in zip(*(out if isinstance(out, tuple) else (out,) for out in outs), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_out_of_range_label_is_an_error_on_cpu(torch_op):
    if torch_op.device == "cuda":
        pytest.skip("no label is read on the host there; the next test")
    args = torch.zeros(2, 3), torch.zeros(4, 5, 3), torch.full((2,), 0.5)
    for bad in (4, -2):
        with pytest.raises(RuntimeError, match=r"svel::stable_target: labels: expected .*\[-1, 4\).*got"):
            torch_op.on_device("stable_target")(*args, torch.tensor([0, bad]))


@pytest.mark.gpu
def test_out_of_range_label_is_nan_on_cuda(rng):
    x, refs, t = torch.randn(3, 4), torch.randn(2, 5, 4), torch.full((3,), 0.5)
    labels = torch.tensor([2, 1, -2])
    out = torch.ops.svel.stable_target(*(a.cuda() for a in (x, refs, t, labels)), source=x.cuda()).cpu()
    assert out[::2].isnan().all()
    assert_close(out[1:2], direct_target(x[1:2], refs, t[1:2], labels[1:2], source=x[1:2]))

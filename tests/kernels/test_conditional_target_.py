"""svel::conditional_target_ against its definition in float64; rows that it is not to fill stay as they are."""

import math

import pytest
import torch
from kernel_cases import offset_by_one, schedule, with_gaps

from stablevelocity_kernels.testing import TOLERANCE, assert_close, relative_error

PREDICTIONS = ("velocity", "x0", "noise", "score")


def by_definition(x0, noise, t, path, prediction):
    rows = []
    for a, b, time in zip(x0.double(), noise.double(), t.tolist(), strict=True):
        _, sigma, d_alpha, d_sigma = schedule(path, min(max(time, 1e-5), 1 - 1e-5))
        values = {"velocity": d_alpha * a + d_sigma * b, "x0": a, "noise": b, "score": -b / sigma}
        rows.append(values[prediction])
    return torch.stack(rows)


def problem(n, sample, rng, dtype=torch.float32):
    """target, x0, noise, t, t_set: every other row is to be filled."""
    target, x0, noise = (torch.randn(n, *sample, generator=rng).to(dtype) for _ in range(3))
    t = torch.rand(n, generator=rng)
    return target, x0, noise, t, t.masked_fill(torch.arange(n) % 2 == 0, math.nan)


def fill(implementation, target, *args, **kwargs):
    """The target after the call, on the CPU."""
    held = target.clone().to(implementation.device)
    result = implementation.on_device("conditional_target_")(
        held, *(a.to(implementation.device) for a in args), **kwargs
    )
    assert result is None
    return held.cpu()


@pytest.mark.parametrize("path", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sample", [(5,), (16,), (2051,)], ids=str)
def test_values(implementation, rng, path, prediction, sample):
    target, x0, noise, t, t_set = problem(6, sample, rng)
    out = fill(implementation, target, x0, noise, t, t_set, path=path, prediction=prediction)
    assert torch.equal(out[1::2], target[1::2])
    assert_close(out[::2], by_definition(x0, noise, t, path, prediction)[::2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_dtypes(implementation, rng, dtype, other):
    target, x0, noise, t, t_set = problem(4, (24,), rng, dtype)
    x0, t = x0.to(other), t.double()
    out = fill(implementation, target, x0, noise, t, t_set)
    assert out.dtype == dtype
    assert torch.equal(out[1::2], target[1::2])
    if not (implementation.interpreted and dtype == torch.bfloat16):  # the interpreter truncates to bfloat16
        expected = by_definition(x0, noise, t, "linear", "velocity")[::2]
        assert relative_error(out[::2], expected) <= TOLERANCE[dtype, "exact"]


def test_no_cancellation_at_the_ends_of_time(implementation, rng):
    target, x0, noise, _, _ = problem(4, (64,), rng)
    t, nans = torch.tensor([0.0, 1e-5, 1.0, 2.0]), torch.full((4,), math.nan)
    for prediction in PREDICTIONS:
        out = fill(implementation, target, x0, noise, t, nans, path="cosine", prediction=prediction)
        for row in range(4):
            one = slice(row, row + 1)
            assert_close(out[one], by_definition(x0[one], noise[one], t[one], "cosine", prediction))


def test_a_row_without_a_time_is_left(implementation, rng):
    """t = NaN made the target NaN, and so it stays."""
    target, x0, noise, t, t_set = problem(3, (8,), rng)
    t[0] = math.nan
    out = fill(implementation, target, x0, noise, t, t_set)
    assert torch.equal(out[:2], target[:2])
    assert torch.equal(out[2], noise[2] - x0[2])


def test_a_nan_row_is_nan(implementation, rng):
    """x0 = NaN (a label out of range) shows in every prediction, also in those that do not depend on x0."""
    target, x0, noise, t, t_set = problem(2, (8,), rng)
    x0[0] = math.nan
    for prediction in PREDICTIONS:
        assert fill(implementation, target, x0, noise, t, t_set, prediction=prediction)[0].isnan().all()


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
def test_unaligned_and_strided_inputs(implementation, rng, change):
    target, *rest = problem(4, (2, 8), rng)
    expected = fill(implementation, target, *rest)
    held = offset_by_one(target.to(implementation.device))
    implementation.on_device("conditional_target_")(held, *(change(a.to(implementation.device)) for a in rest))
    assert_close(held.cpu(), expected.double())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (4,)], ids=str)
def test_empty_and_scalar_samples(implementation, rng, shape):
    target, x0, noise, t, t_set = problem(shape[0], shape[1:], rng)
    out = fill(implementation, target, x0, noise, t, t_set)
    assert out.shape == shape
    if out.numel():
        assert_close(out[::2], (noise - x0)[::2].double())

"""posterior_mean and stable_target in C++ on the CPU: what tiles, threads and instruction sets could break."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from kernel_cases import between, predict

from stablevelocity_kernels import PATHS, PREDICTIONS, backends, posterior_mean, reference, stable_target
from stablevelocity_kernels.testing import (
    GEOMETRIES,
    TOLERANCE,
    assert_close,
    make_noisy,
    make_references,
    relative_error,
)

pytestmark = pytest.mark.skipif(backends().get("CPU") != "native", reason="needs libsvel_cpu.so")


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _problem(n, m, d, geometry="gaussian", dtype=torch.float16, t=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    refs = make_references(m, d, geometry, g).to(dtype)
    t = 0.05 + 0.949 * torch.rand(n, generator=g) if t is None else torch.full((n,), t)
    return make_noisy(refs[torch.randint(0, m, (n,), generator=g)], t, g), refs, t


def _check(x, refs, t, **kw):
    expected = reference.stable_target(x.double(), refs, t.double(), **kw)
    out = stable_target(x, refs, t, **kw)
    torch.testing.assert_close(out.isnan(), expected.isnan())
    assert_close(out.nan_to_num(), expected.nan_to_num())
    return out


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("d", [3, 10, 65, 128, 129, 257, 1030])
@pytest.mark.parametrize("n", [1, 4, 5, 13])  # below and above the number of rows that stream
def test_every_shape_of_tile(n, d, geometry):
    for m in (1, 63, 700):  # 700 is more than one block of the wide kernels
        _check(*_problem(n, m, d, geometry))


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.98, 0.999])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_prediction_at_hard_times(geometry, t):
    for d in (10, 100, 300, 4096):
        x, refs, time = _problem(6, 300, d, geometry, t=t)
        for path in PATHS:
            mean = reference.stable_target(x.double(), refs, time.double(), path=path, prediction="x0")
            for prediction in PREDICTIONS:
                out = stable_target(x, refs, time, path=path, prediction=prediction)
                assert_close(out, predict(x, mean, time, path, prediction))


@pytest.mark.parametrize("d", [40, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_pair_of_dtypes(x_dtype, dtype, d):
    x, refs, t = _problem(5, 200, d, dtype=dtype)
    x = x.to(x_dtype)
    expected, expected_lse = reference.posterior_mean(x.double(), refs, (1 - t).double(), t.double())
    mean, lse = posterior_mean(x, refs, 1 - t, t)
    assert mean.dtype == lse.dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)
    target = stable_target(x, refs, t, path="cosine")
    assert relative_error(mean, expected) <= TOLERANCE[mean.dtype, "exact"]
    # lse is a difference from D/2, and as exact as that
    assert relative_error(lse - d / 2, expected_lse - d / 2) <= TOLERANCE[lse.dtype, "exact"]
    assert_close(target, reference.stable_target(x.double(), refs, t.double(), path="cosine"))


@pytest.mark.parametrize("d", [10, 130, 40000])  # lanes are references; coordinates; threads share coordinates
def test_labels_counts_source_and_nan(d):
    g = torch.Generator().manual_seed(1)
    groups, m, n = 5, 70, 24
    refs = torch.stack([make_references(m, d, "shifted", g) for _ in range(groups)]).half()
    counts = torch.tensor([70, 0, 1, 33, 999])  # beyond M is clamped, 0 is an empty set
    for k in range(groups):
        refs[k, min(m, int(counts[k])) :] = float("nan")
    labels = torch.randint(-1, groups, (n,), generator=g)
    t = torch.linspace(0.1, 0.99, n)
    x = make_noisy(refs[labels.clamp_min(0), 0].nan_to_num(), t, g)
    source = torch.randn(n, d, generator=g).half()
    x[3, d // 2], x[4, 0], t[5] = float("nan"), float("inf"), float("nan")
    source[6, -1] = float("nan")
    for given in (None, source):
        out = _check(x, refs, t, labels=labels, counts=counts, source=given)
        assert out[3:6].isnan().all()
        mean, lse = posterior_mean(x, refs, 1 - t, t, labels, counts, given)
        expected, expected_lse = reference.posterior_mean(
            x.double(), refs, (1 - t).double(), t.double(), labels, counts, given
        )
        torch.testing.assert_close(lse.isnan(), expected_lse.isnan())
        torch.testing.assert_close(mean.isnan(), expected.isnan())
        assert_close(mean.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("d", [10, 200])
def test_partial_results_merge_exactly(d):
    x, refs, t = _problem(7, 900, d, "manifold")
    whole, lse = posterior_mean(x, refs, 1 - t, t)
    (m1, l1), (m2, l2) = posterior_mean(x, refs[:350], 1 - t, t), posterior_mean(x, refs[350:], 1 - t, t)
    w = torch.softmax(torch.stack([l1, l2]).double(), 0)[..., None]
    assert_close((w[0] * m1 + w[1] * m2).float(), whole.double())
    torch.testing.assert_close(torch.logaddexp(l1, l2), lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 5000, 64), (1, 2000, 300), (40, 3000, 20), (300, 500, 140), (3, 40, 40000)]
)
def test_threads_change_nothing_but_rounding_and_repeat_bit_for_bit(n, m, d, threads):
    x, refs, t = _problem(n, m, d)
    results = []
    for count in (1, 2, 5, 2):
        threads(count)
        results.append(stable_target(x, refs, t))
    for other in results[1:]:
        assert relative_error(other, results[0]) < 1e-6
    assert torch.equal(results[1], results[3])


def test_rows_far_from_every_reference():
    for d in (4, 64, 300):
        x, refs, t = _problem(5, 400, d, "shifted", t=0.1)
        _check(x + 3.0, refs, t, prediction="noise")


def test_coefficients_at_the_ends():
    alpha, sigma = torch.tensor([0.0, 1.0, -0.5, 1.0]), torch.tensor([1.0, 0.0, 0.5, float("nan")])
    for d in (20, 200):
        x, refs, _ = _problem(4, 50, d)
        expected, _ = reference.posterior_mean(x, refs, alpha, sigma)
        mean, lse = posterior_mean(x, refs, alpha, sigma)
        assert_close(mean[[0, 2]], expected[[0, 2]].double())
        assert mean[[1, 3]].isnan().all()
        assert lse[[1, 3]].isnan().all()


def test_huge_samples():
    x, refs, t = _problem(2, 5, 1 << 19, "manifold")
    _check(x, refs, t)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_lesser_instruction_sets(isa):
    """This file again, in a process that may use less of the processor."""
    if os.environ.get("SVEL_ISA"):
        pytest.skip("runs inside itself")
    names = "every_shape_of_tile or every_pair_of_dtypes or coefficients"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names, __file__]
    done = subprocess.run(command, env={**os.environ, "SVEL_ISA": isa}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("t", [0.05, 0.2, 0.35, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("d", [2, 3, 8, 9, 16, 33, 64, 128, 129, 256, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_rows_between_two_references(d, t, dtype):
    """Sums in float32 cannot weigh references that nearly tie; these lie in one block, and in two."""
    torch.manual_seed(d)
    n, m = 24, 2500 if d <= 128 else 700
    refs = torch.randn(m, d).to(dtype)
    first = torch.arange(n) % m
    second = torch.where(torch.arange(n) % 2 == 0, first + 30, m - 1 - first)
    alpha, sigma = torch.full((n, 1), 1 - t, dtype=torch.float64), torch.full((n, 1), t, dtype=torch.float64)
    x, times = between(refs[first].float(), refs[second].float(), alpha, sigma), torch.full((n,), t)
    expected = reference.stable_target(x.double(), refs, times)
    assert_close(stable_target(x, refs, times), expected)

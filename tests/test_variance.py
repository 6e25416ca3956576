"""Variance curves against closed forms, each within its own standard error."""

import math
from itertools import combinations

import pytest
import stablevelocity as sv
import torch

TIMES = [0.2, 0.4, 0.6, 0.8, 0.95]
GRID = torch.linspace(-12, 12, 20_001, dtype=torch.float64)  # for integrals over x_t in one dimension
STEP = GRID[1] - GRID[0]


def normal(x, mean, std):
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def mean_over(points, alpha, sigma):
    """E[x_0 | x_t] on GRID for equally likely points on a line."""
    points = torch.tensor(points, dtype=torch.float64)
    logits = -((GRID[:, None] - alpha * points) ** 2) / (2 * sigma**2)
    return torch.softmax(logits, 1) @ points


def coefficients(interpolant, t):
    return sv.get_interpolant(interpolant).coefficients(torch.tensor(t, dtype=torch.float64))


def exact_on_a_line(points, t, references, interpolant):
    """V_CFM and V_StableVM by integration over x_t, for equally likely points on a line."""
    at = coefficients(interpolant, t)
    truth = mean_over(points, at.alpha, at.sigma)
    density = {p: normal(GRID, at.alpha * p, at.sigma) for p in points}
    cfm = sum(float((density[p] * (p - truth) ** 2).sum() * STEP) for p in points) / len(points)
    subsets = list(combinations(points, references))
    stable = 0.0
    for subset in subsets:
        own = mean_over(subset, at.alpha, at.sigma)
        mixture = sum(density[p] for p in subset) / references
        stable += float((mixture * (own - truth) ** 2).sum() * STEP) / len(subsets)
    return cfm * float(at.x0_factor) ** 2, stable * float(at.x0_factor) ** 2


def within(value, error, truth, z=5.0, slack=1e-9):
    return ((value - torch.as_tensor(truth).double()).abs() <= z * error + slack).all()


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
@pytest.mark.parametrize(("points", "references"), [((-1.0, 1.0), 1), ((-1.0, 0.5, 2.0), 2), ((-1.0, 0.5, 2.0), 3)])
def test_points_on_a_line(points, references, interpolant, rng):
    data = torch.tensor(points)[:, None]
    curve = sv.variance_curve(data, TIMES, interpolant=interpolant, references=references, samples=4000, generator=rng)
    cfm, stable = zip(*(exact_on_a_line(points, t, references, interpolant) for t in TIMES), strict=True)
    assert within(curve.cfm, curve.cfm_error, cfm)
    assert within(curve.stablevm, curve.stablevm_error, stable)
    assert (curve.cfm_error < 0.1 * curve.cfm.max()).all()
    if references == len(points):
        assert (curve.stablevm < 1e-9).all()
    if references == 1:
        torch.testing.assert_close(curve.stablevm, curve.cfm)


def test_gaussian_mixture(rng):
    """A large draw from a mixture on a line, in three coordinates: the curve is that of the mixture, up to the draw."""
    weights, means, stds = [0.3, 0.7], [-2.0, 1.0], [0.3, 0.5]
    pick = (torch.rand(4000, 3, generator=rng) < weights[1]).long()
    data = torch.tensor(means)[pick] + torch.tensor(stds)[pick] * torch.randn(4000, 3, generator=rng)
    curve = sv.variance_curve(data[:, :1], TIMES[1:], samples=1000, generator=rng)
    for k, t in enumerate(TIMES[1:]):
        at, moments = coefficients("linear", t), torch.zeros(3, len(GRID), dtype=torch.float64)
        for w, mean, std in zip(weights, means, stds, strict=True):
            variance = at.alpha**2 * std**2 + at.sigma**2
            density = w * normal(GRID, at.alpha * mean, variance.sqrt())
            gain = at.alpha * std**2 / variance
            conditional = mean + gain * (GRID - at.alpha * mean)
            spread = std**2 - gain * at.alpha * std**2
            moments += torch.stack([density, density * conditional, density * (conditional**2 + spread)])
        posterior = moments[2] - moments[1] ** 2 / moments[0].clamp_min(1e-300)
        truth = float(at.x0_factor**2 * posterior.sum() * STEP)
        assert abs(float(curve.cfm[k]) - truth) < 5 * float(curve.cfm_error[k]) + 0.03 * truth, t


def test_stablevm_falls_as_the_number_of_references(rng):
    data = torch.randn(2000, 6, generator=rng)
    cfm, stable = [], []
    for m in (4, 16, 64):
        curve = sv.variance_curve(data, [0.9], references=m, samples=1000, generator=rng)
        cfm.append(curve.cfm)
        stable.append(float(curve.stablevm / curve.cfm))
        assert 0.8 / m < stable[-1] < 1.25 / (m - 1)


def test_standard_errors_are_honest():
    """The spread of repeated estimates against the reported error, with groups of many rows that share a subset."""
    data = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
    runs = 60
    curves = [
        sv.variance_curve(data, [0.7], references=16, samples=120, generator=torch.Generator().manual_seed(s))
        for s in range(runs)
    ]
    for value, error in (("cfm", "cfm_error"), ("stablevm", "stablevm_error")):
        spread = torch.cat([getattr(c, value) for c in curves]).std()
        claimed = torch.cat([getattr(c, error) for c in curves]).square().mean().sqrt()
        assert 0.65 < spread / claimed < 1.5, value  # chi-square with 59 degrees of freedom: 4 standard deviations


def test_groups_share_subsets_when_memory_is_short(monkeypatch, rng):
    """With few groups of many rows the estimate stays right and its error is that of the groups."""
    monkeypatch.setattr(sv.variance, "_GATHERED_ELEMENTS", 1)
    points = (-1.0, 0.5, 2.0)
    curve = sv.variance_curve(torch.tensor(points)[:, None], TIMES, references=2, samples=6400, generator=rng)
    cfm, stable = zip(*(exact_on_a_line(points, t, 2, "linear") for t in TIMES), strict=True)
    assert within(curve.cfm, curve.cfm_error, cfm)
    assert within(curve.stablevm, curve.stablevm_error, stable)


def test_quantiles(rng):
    """Near t = 1 the posterior mean is the data's mean, so |x_0 - m|^2 is known for each point."""
    data = torch.cat([torch.full((50, 1), 1.0), torch.full((50, 1), -1.0)]) * torch.tensor([1.0, 0.0, 2.0])
    curve = sv.variance_curve(data, [1.0], samples=400, generator=rng)
    assert curve.dim == 3
    assert curve.stablevm is None
    torch.testing.assert_close(curve.cfm_quantiles, torch.full((1, 2), 5.0).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(curve.per_dimension().cfm * 3, curve.cfm)


def test_far_apart_points_have_no_variance_at_early_times(rng):
    curve = sv.variance_curve(10 * torch.eye(50, 64), [0.05, 0.3], references=10, samples=64, generator=rng)
    assert (curve.cfm < 1e-6).all()
    assert (curve.stablevm < 1e-6).all()


def test_labels_give_the_variance_within_classes(rng):
    one, two = torch.randn(200, 2, generator=rng), 2 * torch.randn(600, 2, generator=rng) + 3
    data, labels = torch.cat([one, two]), torch.tensor([3] * 200 + [7] * 600)
    order = torch.randperm(800, generator=rng)
    options = {"references": 20, "samples": 1500, "generator": rng}
    both = sv.variance_curve(data[order], TIMES, labels=labels[order], **options)
    parts = [sv.variance_curve(part, TIMES, **options) for part in (one, two)]
    for value, error in (("cfm", "cfm_error"), ("stablevm", "stablevm_error")):
        expected = 0.25 * getattr(parts[0], value) + 0.75 * getattr(parts[1], value)
        errors = torch.stack([getattr(c, error) for c in (both, *parts)]).norm(dim=0)
        assert within(getattr(both, value), errors, expected), value
    joint = sv.variance_curve(data, TIMES, **options)
    assert joint.cfm[-1] > both.cfm[-1] * 1.1, "the labels explain a part of the variance"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_of_images(dtype, rng):
    data = torch.randn(40, 1, 4, 4, generator=rng).to(dtype)
    calls = []
    curve = sv.variance_curve(
        data, [0.5, 0.9], references=5, samples=32, generator=rng, callback=lambda *a: calls.append(a)
    )
    assert calls == [(1, 2), (2, 2)]
    assert curve.dim == 16
    for value in (curve.t, curve.cfm, curve.cfm_error, curve.stablevm, curve.stablevm_error):
        assert value.shape == (2,)
        assert value.dtype == torch.float64
        assert value.isfinite().all()


def test_a_generator_reproduces_the_curve(rng):
    data = torch.randn(40, 3, generator=rng)
    first, again = (
        sv.variance_curve(data, [0.5], references=5, samples=32, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(first.cfm, again.cfm)
    assert torch.equal(first.stablevm, again.stablevm)


def test_errors_name_the_argument(rng):
    data = torch.randn(10, 3, generator=rng)
    with pytest.raises(ValueError, match=r"references: expected a number in \[1, 10\], got 11"):
        sv.variance_curve(data, [0.5], references=11)
    with pytest.raises(ValueError, match=r"references: expected a number in \[1, 2\], got 3"):
        sv.variance_curve(data, [0.5], references=3, labels=torch.tensor([0] * 8 + [1] * 2))
    with pytest.raises(ValueError, match=r"labels: expected shape \(10,\), got \(9,\)"):
        sv.variance_curve(data, [0.5], labels=torch.zeros(9))
    with pytest.raises(ValueError, match="samples: expected at least 2, got 1"):
        sv.variance_curve(data, [0.5], samples=1)
    with pytest.raises(ValueError, match=r"data: expected floating point samples .*, got torch.int64 \(3,\)"):
        sv.variance_curve(torch.arange(3), [0.5])
    with pytest.raises(ValueError, match="interpolant: expected"):
        sv.variance_curve(data, [0.5], interpolant="vp")

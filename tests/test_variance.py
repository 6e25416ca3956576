"""Variance curves against closed forms, each within its own standard error."""

import dataclasses
import itertools
import math
from itertools import combinations

import pytest
import stablevelocity as sv
import stablevelocity.data
import torch

from stablevelocity_kernels import reference

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
    return sv.get_interpolant(interpolant).coefficients(torch.as_tensor(t, dtype=torch.float64))


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


# -- the posterior's spread


def posterior_weights(data, x_t, alpha, sigma):
    return torch.softmax(
        -(torch.cdist(x_t, alpha * data, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * sigma**2), 1
    )


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_entropy_own_mass_and_effective_number(interpolant, rng):
    """Against weights written out, for other draws of x_0 and noise."""
    data = torch.randn(60, 3, generator=rng, dtype=torch.float64)
    curve = sv.variance_curve(data, TIMES, interpolant=interpolant, samples=6000, effective=True, generator=rng)
    pick = torch.randint(60, (6000,), generator=rng)
    noise = torch.randn(6000, 3, generator=rng, dtype=torch.float64)
    for k, t in enumerate(TIMES):
        at = coefficients(interpolant, t)
        p = posterior_weights(data, at.alpha * data[pick] + at.sigma * noise, at.alpha, at.sigma)
        direct = {
            "own_mass": p.square().sum(1),
            "entropy": torch.special.entr(p).sum(1),
            "effective": 1 / p.square().sum(1),
        }
        for name, values in direct.items():
            error = torch.hypot(getattr(curve, f"{name}_error")[k], values.std() / 6000**0.5)
            assert within(getattr(curve, name)[k], error, values.mean()), (name, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pool", [None, 200])
def test_effective_number_row_by_row(dtype, pool, rng, monkeypatch):
    """At D = 3,072, where the lse is in the thousands, and merged from two halves."""
    data = torch.randn(200, 4, generator=rng, dtype=torch.float64) @ torch.randn(4, 3072, generator=rng).double() / 8
    data = (data + 0.3).to(dtype)
    made, measure = [], sv.variance._Chunk.measure

    def keep(self, t, *args):
        made.append((self, t, measure(self, t, *args)))
        return made[-1][2]

    monkeypatch.setattr(sv.variance._Chunk, "measure", keep)
    sv.variance_curve(data, [0.7, 0.95, 0.99], pool=pool, samples=40, effective=True, generator=rng)
    for chunk, t, out in made:
        at = sv.Linear().coefficients(t)
        x_t = sv.Linear().interpolate(chunk.x0, chunk.noise, t)
        p = posterior_weights(
            data.double(), x_t.double(), at.alpha[0].to(dtype).double(), at.sigma[0].to(dtype).double()
        )
        tolerance = {"rtol": 3e-3 if dtype == torch.float32 else 1e-9, "atol": 0.0}
        torch.testing.assert_close(out["effective"], 1 / p.square().sum(1), **tolerance)
        own = p.gather(1, (chunk.x0.double()[:, None] - data.double()).square().sum(2).argmin(1)[:, None])[:, 0]
        torch.testing.assert_close(out["own"], own, **tolerance)
        torch.testing.assert_close(out["entropy"], -own.log(), rtol=0, atol=tolerance["rtol"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("t", [0.002, 0.01, 0.03, 0.05])
def test_own_mass_where_float32_scores_are_rounded(device, t, rng):
    """Samples far apart explain their noisy ones alone, although their scores are up to millions."""
    data = torch.rand(1000, 784, generator=rng).to(device)
    curve = sv.variance_curve(data, [t], samples=2000, generator=rng)
    assert float(curve.own_mass) == pytest.approx(1.0, abs=3e-3)
    assert float(curve.entropy) == pytest.approx(0.0, abs=3e-3)


@pytest.mark.parametrize("t", [1e-4, 0.01, 0.5, 0.999])
def test_lse_from_float64_scores(t, rng, monkeypatch):
    """Near samples of near ones, in chunks of rows and of references."""
    monkeypatch.setattr(sv.variance, "_ROW_ELEMENTS", 2000)
    data = torch.randn(60, 100, generator=rng)
    data = torch.cat([data, data + 0.1 * t * torch.randn(60, 100, generator=rng)]) + 3.0
    x = (1 - t) * data + t * torch.randn(120, 100, generator=rng)
    alpha, sigma = torch.full((120,), 1 - t), torch.full((120,), t)
    lse = sv.variance._wide_lse(x, data, alpha, sigma)
    expected = reference.posterior_mean(x.double(), data, alpha.double(), sigma.double())[1]
    torch.testing.assert_close(lse, expected, rtol=0, atol=1e-8 + 1e-13 / t**2)


def test_rounding_of_the_own_mass_is_not_taken_for_a_rise(rng):
    """Of a thousand samples far apart, with the float32 scores' rounding about an own mass of 1."""
    curve = sv.variance_curve(torch.rand(1000, 784, generator=rng), [0.1, 0.2, 0.9, 0.99], samples=8000, generator=rng)
    noise = 0.05 * torch.randn(curve.own_mass_groups[:2].shape, generator=rng, dtype=torch.float64)
    noisy = torch.cat([curve.own_mass_groups[:2] + noise - noise.mean(1, True), curve.own_mass_groups[2:]])
    split = sv.split_point(dataclasses.replace(curve, own_mass_groups=noisy), "own_mass")
    assert 0.2 < split.low < split.split < split.high < 0.99


def test_memory_is_bounded_by_chunks_of_rows(monkeypatch, rng):
    points = (-1.0, 0.5, 2.0)
    data, labels = torch.tensor(points * 2)[:, None], torch.tensor([0] * 3 + [1] * 3)
    monkeypatch.setattr(sv.variance, "_ROW_ELEMENTS", 97)
    sizes, measure = [], sv.variance._Chunk.measure
    monkeypatch.setattr(
        sv.variance._Chunk, "measure", lambda self, *a: (sizes.append(len(self.x0)), measure(self, *a))[1]
    )
    curve = sv.variance_curve(data, TIMES, references=2, labels=labels, samples=4000, generator=rng)
    assert max(sizes) == 97
    cfm, stable = zip(*(exact_on_a_line(points, t, 2, "linear") for t in TIMES), strict=True)
    assert within(curve.cfm, curve.cfm_error, cfm)
    assert within(curve.stablevm, curve.stablevm_error, stable)


# -- sub-sampled pools


def test_a_pool_brackets_the_truth(rng):
    """V_CFM over a pool is short of the truth by no more than cfm_missing; likewise the own mass."""
    data = torch.randn(1500, 4, generator=rng)
    options = {"references": 8, "samples": 3200, "generator": rng}
    times = [0.1, 0.25, *TIMES[1:]]
    whole, part = sv.variance_curve(data, times, **options), sv.variance_curve(data, times, pool=300, **options)
    for name, missing, error in (
        ("cfm", "cfm_missing", "cfm_error"),
        ("own_mass", "own_mass_missing", "own_mass_error"),
    ):
        sign = 1 if name == "cfm" else -1
        short = sign * (getattr(whole, name) - getattr(part, name))
        slack = 4 * torch.hypot(getattr(whole, error), getattr(part, error))
        assert (short > -slack).all(), name
        assert (short < getattr(part, missing) + slack).all(), name
    assert (part.cfm_missing[-2:] < 0.05 * part.cfm[-2:]).all(), "far in the high-variance region a pool is enough"
    assert part.cfm_missing[0] > 0.2 * part.cfm[0], "far in the other one it is not, and says so"
    assert (whole.cfm_missing == 0).all()


def test_errors_of_a_pool_are_honest():
    data = torch.randn(400, 2, generator=torch.Generator().manual_seed(3))
    curves = [
        sv.variance_curve(data, [0.5], pool=20, samples=320, generator=torch.Generator().manual_seed(s))
        for s in range(60)
    ]
    spread = torch.cat([c.cfm for c in curves]).std()
    claimed = torch.cat([c.cfm_error for c in curves]).square().mean().sqrt()
    assert 0.65 < spread / claimed < 1.5  # as in test_standard_errors_are_honest


def test_a_pool_of_everything_is_exact(rng):
    data = torch.randn(40, 3, generator=rng)
    curve = sv.variance_curve(data, TIMES, pool=1000, samples=64, generator=rng)
    assert (curve.cfm_missing == 0).all()
    assert (curve.own_mass_missing == 0).all()


# -- mixtures


def small_mixture(dim=3, scale=1.0):
    rng = torch.Generator().manual_seed(5)
    mixture = sv.GaussianMixture.random(dim, 6, generator=rng)
    return sv.GaussianMixture(mixture.weights, mixture.means, mixture.variances * scale)


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_mixture_posterior_by_integration(interpolant):
    """In one dimension, mean and variance of x_0 given x_t against sums over a grid of x_0."""
    mixture = small_mixture(1)
    density = sum(w * normal(GRID, float(m), float(v) ** 0.5) for w, m, v in zip(
        mixture.weights, mixture.means[:, 0], mixture.variances[:, 0], strict=True
    ))  # fmt: skip
    x_t, t = torch.tensor([[-1.5], [0.1], [0.8], [3.0]]), torch.tensor([0.3, 0.5, 0.8, 0.95])
    mean, variance = mixture.posterior(x_t, t, interpolant)
    for i in range(4):
        at = coefficients(interpolant, t[i].double())
        p = density * normal(x_t[i].double(), at.alpha * GRID, at.sigma)
        p = p / p.sum()
        first = (p * GRID).sum()
        torch.testing.assert_close(mean[i, 0], first, rtol=0, atol=1e-9)
        torch.testing.assert_close(variance[i], (p * (GRID - first) ** 2).sum(), rtol=1e-7, atol=0)
    velocity = mixture.velocity(x_t, t, interpolant)
    expected = sv.get_interpolant(interpolant).prediction(x_t.double(), mean, t)
    torch.testing.assert_close(velocity, expected)


def test_mixture_moments_and_draws(rng):
    mixture = small_mixture()
    x = mixture.sample(40_000, generator=rng)
    mean = mixture.weights @ mixture.means
    assert within(x.mean(0), x.std(0) / 200, mean)
    spread = (x - mean).square().sum(1)
    assert within(spread.mean(), spread.std() / 200, mixture.variance())
    noise = torch.randn(40_000, 3, generator=rng, dtype=torch.float64)
    explained, left = mixture.posterior(0.4 * x + 0.6 * noise, torch.full((40_000,), 0.6))
    off = (x - explained).square().sum(1) - left
    assert within(off.mean(), off.std() / 200, 0.0), "the posterior's variance is that of x_0 about its mean"


def test_mixture_of_points_is_the_reference_posterior(rng):
    """With variances 0 the closed form is `posterior_mean` over the means, weights equal."""
    points = torch.randn(20, 5, generator=rng, dtype=torch.float64)
    mixture = sv.GaussianMixture(torch.ones(20), points, torch.zeros(20, 5))
    x_t, t = torch.randn(30, 5, generator=rng, dtype=torch.float64), torch.linspace(0.05, 0.99, 30, dtype=torch.float64)
    from stablevelocity_kernels import posterior_mean
    from stablevelocity_kernels.testing import assert_close

    assert_close(mixture.posterior_mean(x_t, t), posterior_mean(x_t, points, 1 - t, t)[0])


@pytest.mark.parametrize("interpolant", ["linear", "cosine"])
def test_curve_against_a_mixtures_closed_form(interpolant, rng):
    """Against the known truth: V_CFM is the mean of the closed-form posterior variance over other draws."""
    mixture = small_mixture(10)
    data = mixture.sample(20_000, generator=rng)
    curve = sv.variance_curve(
        data, TIMES, interpolant=interpolant, references=64, samples=8000, generator=rng,
        truth=lambda x_t, t: mixture.posterior_mean(x_t, t, interpolant),
    )  # fmt: skip
    assert curve.own_mass is None
    x0, noise = mixture.sample(8000, generator=rng), torch.randn(8000, 10, generator=rng, dtype=torch.float64)
    for k, time in enumerate(TIMES):
        at, t = coefficients(interpolant, time), torch.full((8000,), time)
        values = at.x0_factor**2 * mixture.posterior(at.alpha * x0 + at.sigma * noise, t, interpolant)[1]
        error = torch.hypot(curve.cfm_error[k], values.std() / 8000**0.5)
        assert within(curve.cfm[k], error, values.mean()), time
    assert 0.4 / 64 < float(curve.stablevm[-1] / curve.cfm[-1]) < 1.6 / 63
    assert abs(curve.prior / float(coefficients(interpolant, 1 - 1e-5).x0_factor ** 2) / mixture.variance() - 1) < 0.05


# -- the split


def ramp(values, groups=8, spread=0.0, missing=0.0):
    """A curve whose V_CFM over the prior's is `values` at times 0.1, 0.2, ..."""
    values = torch.tensor(values, dtype=torch.float64)
    t = 0.1 * torch.arange(1, len(values) + 1, dtype=torch.float64)
    noise = torch.linspace(-spread, spread, groups, dtype=torch.float64)
    parts = 4.0 * values[:, None] * (1 + noise)
    zero = torch.zeros_like(t)
    blank = dict.fromkeys(f.name for f in dataclasses.fields(sv.VarianceCurve))
    return sv.VarianceCurve(
        **{**blank, "t": t, "cfm": parts.mean(1), "cfm_error": zero, "prior": 4.0, "dim": 2, "samples": 1 << 40,
           "cfm_groups": parts, "cfm_missing": zero + 4.0 * missing, "own_mass_groups": 1 - parts / 4.0,
           "own_mass_missing": zero + missing}
    )  # fmt: skip


@pytest.mark.parametrize("criterion", ["variance", "own_mass"])
def test_split_of_known_curves(criterion):
    def split(values, **options):
        return sv.split_point(ramp(values, **options), criterion, level=0.01)

    found = split([1e-5, 1e-4, 1e-3, 1e-1, 0.5])
    assert found.criterion == criterion
    assert (found.low, found.high) == (pytest.approx(found.split), pytest.approx(found.split))
    assert found.split == pytest.approx(0.35), "half way between 1e-3 and 1e-1 on a logarithmic scale"
    assert split([0.0, 0.0, 0.5, 0.6]).split == pytest.approx(0.2 + 0.1 * math.log(1e4) / math.log(5e5))
    assert split([0.2, 0.3, 0.4]).split == 0.0
    assert split([0.0, 1e-4, 1e-3]).split == pytest.approx(0.3)
    assert split([1e-3, 1e-1, 1e-3, 1e-1]).split == pytest.approx(0.15), "the first rise counts"
    wide = split([1e-5, 1e-4, 1e-3, 1e-1, 0.5], spread=0.9)
    assert wide.low < wide.split < wide.high
    short = split([1e-5, 1e-4, 1e-3, 1e-1, 0.5], missing=5e-3)
    assert short.low < short.split - 0.01
    assert short.high == pytest.approx(short.split)


def split_times(n=40):
    return torch.linspace(0.025, 0.99, n)


@pytest.mark.parametrize("criterion", ["variance", "own_mass"])
def test_split_moves_towards_the_noise_as_the_dimension_grows(criterion, rng):
    splits = []
    for dim in (2, 10, 50, 250, 1000):
        curve = sv.variance_curve(torch.randn(500, dim, generator=rng), split_times(), samples=400, generator=rng)
        splits.append(sv.split_point(curve, criterion))
    for one, next_ in itertools.pairwise(splits):
        assert one.split < next_.split
        assert one.high < next_.low, "by more than their intervals"
    assert splits[-1].split > 0.85


@pytest.mark.parametrize(("dim", "interpolant"), [(4, "linear"), (40, "linear"), (40, "cosine")])
def test_split_agrees_with_the_closed_form(dim, interpolant, rng):
    """Of a draw from a mixture of narrow components, against the split of the mixture's own variance."""
    means = 2 * torch.rand(30, dim, generator=rng) - 1
    mixture = sv.GaussianMixture(torch.rand(30, generator=rng) + 0.5, means, torch.full((30, dim), 1e-7))
    times = split_times(24)
    curve = sv.variance_curve(
        mixture.sample(3000, generator=rng), times, interpolant=interpolant, samples=1500, generator=rng
    )
    exact = []
    x0 = mixture.sample(1000, generator=rng)
    noise = torch.randn(1000, dim, generator=rng, dtype=torch.float64)
    for time in times:
        at = coefficients(interpolant, float(time))
        variance = mixture.posterior(at.alpha * x0 + at.sigma * noise, time.repeat(1000), interpolant)[1].mean()
        exact.append(float(at.x0_factor**2 * variance))
    limit = float(coefficients(interpolant, 1 - 1e-5).x0_factor ** 2) * mixture.variance()
    expected = float(sv.variance.crossing(times.double(), torch.tensor(exact).double() / limit, 0.05))
    found = sv.split_point(curve, confidence=0.999)
    assert found.low - 5e-3 < expected < found.high + 5e-3
    assert found.high - found.low < 0.1
    assert 0.05 < found.split < 0.98


def test_the_interval_holds_the_split_as_often_as_it_says():
    """95 % intervals of 40 small measurements against the split of a large one: at most 6 may miss (p = 0.003)."""
    data = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    times = split_times(30)

    def measure(samples, seed):
        generator = torch.Generator().manual_seed(seed)
        return sv.split_point(sv.variance_curve(data, times, samples=samples, generator=generator))

    truth = measure(20_000, 1).split
    found = [measure(400, seed) for seed in range(2, 42)]
    assert sum(not s.low <= truth <= s.high for s in found) <= 6
    assert max(s.high - s.low for s in found) < 0.2


# -- data of other kinds


def test_datasets_and_banks(rng):
    x, y = torch.randn(30, 4, generator=rng), torch.arange(30) % 3
    bank = sv.ReferenceBank((4,), num_classes=3, capacity=16, dtype=torch.float32)
    bank.push(x, y)

    def curve(data, **options):
        return sv.variance_curve(
            data, [0.5, 0.9], samples=16, generator=torch.Generator().manual_seed(1), **options
        ).cfm

    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, i):
            return x[i], int(y[i])

    plain, within_classes = curve(x), curve(x, labels=y)
    assert not torch.equal(plain, within_classes)
    for data in (Pairs(), torch.utils.data.TensorDataset(x, y)):
        assert torch.equal(curve(data), plain)
        assert torch.equal(curve(data, labels=True), within_classes)
    order = torch.arange(30).argsort(stable=True).reshape(10, 3).T.flatten()  # the bank's: by class
    assert torch.equal(curve(bank), curve(x[order]))
    assert torch.equal(curve(bank, labels=True), curve(x[order], labels=y[order]))
    images = sv.data.ArrayData(torch.randint(0, 256, (6, 2, 2), dtype=torch.uint8, generator=rng))
    assert torch.equal(curve(images), curve(sv.data.to_unit(images.x)))


def test_more_errors_name_the_argument(rng):
    data = torch.randn(10, 3, generator=rng)
    for options, message in [
        ({"labels": True}, "labels: expected a tensor, because the data hold no labels"),
        ({"pool": 1}, "pool: expected at least 2 or None, got 1"),
        ({"pool": 4, "references": 5}, r"references: expected a number in \[1, 4\], got 5"),
        ({"truth": lambda x, t: x, "effective": True}, "truth: expected None"),
    ]:
        with pytest.raises(ValueError, match=message):
            sv.variance_curve(data, [0.5], **options)
    with pytest.raises(ValueError, match="data: expected a bank with references, got an empty one"):
        sv.variance_curve(sv.ReferenceBank((3,)), [0.5])
    with pytest.raises(ValueError, match=r"data: expected floating point samples .*, got list"):
        sv.variance_curve([1.0], [0.5])
    curve = ramp([0.1, 0.2])
    for options, message in [
        ({"criterion": "slope"}, "criterion: expected one of"),
        ({"level": 0.0}, r"level: expected a number in \(0, 1\), got 0.0"),
        ({"confidence": 1.0}, r"confidence: expected a number in \(0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            sv.split_point(curve, **options)
    with pytest.raises(ValueError, match="curve: expected at least two increasing times"):
        sv.split_point(dataclasses.replace(curve, t=curve.t.flip(0)))
    with pytest.raises(ValueError, match="curve: expected one with the own mass"):
        sv.split_point(dataclasses.replace(curve, own_mass_groups=None), "own_mass")
    with pytest.raises(ValueError, match="curve: expected finite values"):
        sv.split_point(sv.variance_curve(torch.ones(4, 2), TIMES, samples=4, generator=rng))
    point = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=r"means: expected shape \(K, D\), got \(2,\)"):
        sv.GaussianMixture(torch.ones(1), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="variances: expected values of at least 0"):
        sv.GaussianMixture(torch.ones(1), point, point - 1)
    with pytest.raises(ValueError, match=r"weights: expected 1 positive numbers, got \[0.0\]"):
        sv.GaussianMixture(torch.zeros(1), point, point)

"""Interpolants: derivatives against autograd, the table of predictions, and a user's own path against brute force."""

import pytest
import stablevelocity as sv
import torch

from stablevelocity_kernels import PathCoefficients
from stablevelocity_kernels.testing import TOLERANCE, assert_close

F64 = TOLERANCE[torch.float64, "exact"]


class Smoothstep(sv.Interpolant):
    """A user's own path, a polynomial: sigma = 3 t^2 - 2 t^3, alpha = 1 - sigma."""

    def coefficients(self, t):
        sigma, d_sigma = t * t * (3 - 2 * t), 6 * t * (1 - t)
        return PathCoefficients(1 - sigma, sigma, -d_sigma, d_sigma)


class VariancePreserving(sv.Interpolant):
    """A user's own path, with alpha^2 + sigma^2 = 1 and sigma = t."""

    def coefficients(self, t):
        alpha = torch.sqrt(1 - t * t)
        return PathCoefficients(alpha, t, -t / alpha, torch.ones_like(t))


class NamelessLinear(sv.Linear):
    name = None

    def coefficients(self, t):
        return sv.Linear().coefficients(t)


PATHS = [sv.Linear(), sv.Cosine(), Smoothstep(), VariancePreserving()]
PREDICTIONS = ["velocity", "x0", "noise", "score"]
each_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def brute_force(path, x, refs, t, prediction):
    """The definition, row by row in float64: x (N, D), refs (M, D), t (N,)."""
    out = []
    for row, time in zip(x.double(), t.double(), strict=True):
        at = path.coefficients(time)
        weight = torch.softmax(-(row - at.alpha * refs.double()).square().sum(1) / (2 * at.sigma**2), 0)
        mean = weight @ refs.double()
        out.append(
            {
                "velocity": at.d_sigma / at.sigma * row + (at.d_alpha - at.d_sigma * at.alpha / at.sigma) * mean,
                "x0": mean,
                "noise": (row - at.alpha * mean) / at.sigma,
                "score": -(row - at.alpha * mean) / at.sigma**2,
            }[prediction]
        )
    return torch.stack(out)


@each_path
def test_derivatives_match_autograd(path):
    t = torch.linspace(0.01, 0.99, 37, dtype=torch.float64, requires_grad=True)
    at = path.coefficients(t)
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, slope, rtol=F64, atol=F64)


@each_path
def test_ends_are_data_and_noise(path, rng):
    x0, noise = torch.randn(2, 3, 4, generator=rng), torch.randn(2, 3, 4, generator=rng)
    assert torch.equal(path.interpolate(x0, noise, torch.zeros(2)), x0)
    torch.testing.assert_close(path.interpolate(x0, noise, torch.ones(2)), noise, rtol=0, atol=1e-6)


@each_path
def test_velocity_is_the_time_derivative_of_the_path(path, rng):
    x0, noise = torch.randn(5, 3, generator=rng).double(), torch.randn(5, 3, generator=rng).double()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    _, slope = torch.autograd.functional.jvp(lambda s: path.interpolate(x0, noise, s), t, torch.ones_like(t))
    torch.testing.assert_close(path.velocity(x0, noise, t), slope, rtol=F64, atol=F64)


@each_path
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conditional_target_is_the_table_at_one_sample(path, prediction, rng):
    x0, noise = torch.randn(5, 2, 3, generator=rng).double(), torch.randn(5, 2, 3, generator=rng).double()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x_t = path.interpolate(x0, noise, t)
    table = path.prediction(x_t, x0, t, prediction)
    torch.testing.assert_close(path.conditional(x0, noise, t, prediction), table, rtol=1e-10, atol=1e-10)


@each_path
def test_velocity_and_x0_are_inverse(path, rng):
    x_t, x0 = torch.randn(5, 3, generator=rng).double(), torch.randn(5, 3, generator=rng).double()
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    v = path.velocity_from_x0(x_t, x0, t)
    torch.testing.assert_close(path.x0_from_velocity(x_t, v, t), x0, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", [*PATHS, NamelessLinear()], ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_matches_brute_force(path, prediction, dtype, rng):
    refs = torch.randn(23, 7, generator=rng, dtype=torch.float64).to(dtype)
    t = torch.linspace(0.2, 0.95, 11).to(dtype)
    x_t = path.interpolate(refs[:11], torch.randn(11, 7, generator=rng).to(dtype), t)
    out = path.target(x_t, refs, t, prediction=prediction)
    assert out.dtype == dtype
    assert_close(out, brute_force(path, x_t, refs, t, prediction))


def test_own_path_reaches_groups_counts_and_source(rng):
    path, refs = Smoothstep(), torch.randn(3, 8, 5, generator=rng, dtype=torch.float64)
    labels, counts = torch.tensor([0, 2, -1, 1]), torch.tensor([8, 0, 3])
    t, own = torch.full((4,), 0.6, dtype=torch.float64), torch.randn(4, 5, generator=rng, dtype=torch.float64)
    x_t = path.interpolate(own, torch.randn(4, 5, generator=rng).double(), t)
    sets = [refs[0], refs[2, :3], torch.cat([refs[0], refs[2, :3]]), refs[1, :0]]
    out = path.target(x_t, refs, t, labels, counts, own)
    for i, members in enumerate(sets):
        with_own = torch.cat([members, own[i : i + 1]])
        assert_close(out[i : i + 1], brute_force(path, x_t[i : i + 1], with_own, t[i : i + 1], "velocity"))


def test_nan_time_skips_the_row(rng):
    for path in PATHS:
        t = torch.tensor([0.5, float("nan"), 0.7])
        out = path.target(torch.randn(3, 4, generator=rng), torch.randn(6, 4, generator=rng), t)
        assert out.isnan().all(1).tolist() == [False, True, False], path


@pytest.mark.parametrize("noise_factor", [0.0, 0.4, 1.0])
def test_own_step_matches_the_named_op(noise_factor, rng):
    x, v, u, noise = (torch.randn(4, 6, generator=rng).double() for _ in range(4))
    t, tau = torch.tensor([0.9, 0.6, 0.3, 0.2]).double(), torch.tensor([0.5, 0.2, 0.1, 0.0]).double()
    args = (x, v, t, tau, u, noise)
    own = NamelessLinear().step(*args, guidance_scale=2.0, noise_factor=noise_factor)
    assert_close(own, sv.Linear().step(*args, guidance_scale=2.0, noise_factor=noise_factor))


@each_path
def test_step_to_zero_gives_the_clean_sample(path, rng):
    x, v = torch.randn(3, 6, generator=rng).double(), torch.randn(3, 6, generator=rng).double()
    t = torch.tensor([0.3, 0.5, 0.8]).double()
    x0 = path.step(x, v, t, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(x0, path.x0_from_velocity(x, v, t), rtol=1e-10, atol=1e-10)


def test_names_and_errors():
    assert isinstance(sv.get_interpolant("cosine"), sv.Cosine)
    own = Smoothstep()
    assert sv.get_interpolant(own) is own
    with pytest.raises(ValueError, match=r"interpolant: expected one of .*'linear'.*, got 'vp'"):
        sv.get_interpolant("vp")
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"prediction: expected one of .*, got 'v'"):
        own.target(x, x, torch.full((2,), 0.5), prediction="v")
    with pytest.raises(ValueError, match=r"noise_factor: expected a number in \[0, 1\], got 1.5"):
        own.step(x, x, torch.ones(2), torch.zeros(2), noise_factor=1.5)
    with pytest.raises(ValueError, match="noise: expected a tensor"):
        own.step(x, x, torch.ones(2), torch.zeros(2), noise_factor=0.5)


def test_result_has_the_dtype_of_the_samples(rng):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x0, noise, t = torch.randn(2, 3).to(dtype), torch.randn(2, 3), torch.rand(2)
        for out in (sv.Linear().interpolate(x0, noise, t), sv.Cosine().conditional(x0, noise, t)):
            assert out.dtype == dtype

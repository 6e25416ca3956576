"""svel::stablevs_step: its formula, its limits, and the probability-flow equation that it solves."""

import math
from pathlib import Path

import pytest
import torch
from kernel_cases import offset_by_one, schedule, with_gaps

import stablevelocity_kernels as svel
from stablevelocity_kernels import PATHS
from stablevelocity_kernels.testing import assert_close


def x0_hat(x, v, t, path):
    alpha, sigma, d_alpha, d_sigma = schedule(path, t)
    return (v.double() - d_sigma / sigma * x.double()) / (d_alpha - d_sigma * alpha / sigma)


def formula(x, v, t, tau, noise=None, factor=0.0, path="linear"):
    """Mean and noise of the step, straight from the paper, one row after another in float64."""
    out = []
    for i in range(x.shape[0]):
        time, after = min(max(float(t[i]), 1e-5), 1 - 1e-5), min(max(float(tau[i]), 0.0), 1.0)
        alpha, sigma, _, _ = schedule(path, time)
        alpha_tau, sigma_tau, _, _ = schedule(path, after)
        beta = factor * sigma_tau
        s = math.sqrt(sigma_tau**2 - beta**2) / sigma
        mean = s * x[i].double() + (alpha_tau - s * alpha) * x0_hat(x[i], v[i], time, path)
        out.append(mean if noise is None else mean + beta * noise[i].double())
    return torch.stack(out)


def pairs(shape, rng):
    return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(5,), (5, 3, 7), (5, 4097)], ids=str)
def test_formula(implementation, rng, shape, factor, path):
    x, v = pairs(shape, rng)
    noise = torch.randn(shape, generator=rng)
    t, tau = torch.tensor([0.85, 0.5, 0.3, 0.99, 0.12]), torch.tensor([0.7, 0.49, 0.0, 0.2, 0.1])
    op = implementation.op("stablevs_step")
    out = op(x, v, t, tau, None, noise, noise_factor=factor, path=path)
    assert_close(out, formula(x, v, t, tau, noise, factor, path))
    single = op(x, v, t[0].clone(), tau, noise_factor=0.0, path=path)
    assert_close(single, formula(x, v, t[:1].expand(5), tau, path=path))
    both = op(x, v, t[0].clone(), tau[1].clone(), noise_factor=0.0, path=path)
    assert_close(both, formula(x, v, t[:1].expand(5), tau[1:2].expand(5), path=path))


@pytest.mark.parametrize("path", PATHS)
def test_a_step_to_zero_is_the_estimate_of_the_clean_sample(implementation, rng, path):
    x, v = pairs((3, 40), rng)
    t = torch.full((3,), 0.7)
    out = implementation.op("stablevs_step")(x, v, t, torch.zeros(()), path=path)
    assert_close(out, x0_hat(x, v, float(t[0]), path))


def test_without_noise_the_linear_step_is_euler(implementation, rng):
    x, v = pairs((4, 33), rng)
    t, tau = torch.tensor([0.85, 0.6, 0.4, 0.2]), torch.tensor([0.6, 0.55, 0.1, 0.0])
    out = implementation.op("stablevs_step")(x, v, t, tau)
    assert_close(out, x.double() + (tau.double() - t.double())[:, None] * v.double())


@pytest.mark.parametrize("path", PATHS)
def test_without_noise_the_step_solves_the_probability_flow(implementation, rng, path):
    """dx/dt = (sigma'/sigma) x + (alpha' - sigma' alpha/sigma) x0_hat with x0_hat fixed, by 2000 Runge-Kutta steps."""
    x, v = pairs((2, 12), rng)
    t, tau = 0.84375, 0.28125
    clean = x0_hat(x, v, t, path)

    def slope(point, time):
        alpha, sigma, d_alpha, d_sigma = schedule(path, time)
        return d_sigma / sigma * point + (d_alpha - d_sigma * alpha / sigma) * clean

    point, h = x.double(), (tau - t) / 2000
    for i in range(2000):
        time = t + i * h
        k1 = slope(point, time)
        k2 = slope(point + h / 2 * k1, time + h / 2)
        k3 = slope(point + h / 2 * k2, time + h / 2)
        k4 = slope(point + h * k3, time + h)
        point = point + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    out = implementation.op("stablevs_step")(x, v, torch.full((2,), t), torch.full((2,), tau), path=path)
    assert_close(out, point)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_mean_and_variance_with_noise(implementation, rng, path, factor):
    """Mean s x + (alpha_tau - s alpha) x0_hat and deviation factor sigma_tau, to five standard errors."""
    draws, t, tau = 20_000, 0.8, 0.5
    x, v = torch.full((1, draws), 0.7), torch.full((1, draws), -0.4)
    noise = torch.randn(1, draws, generator=rng)
    time, after = torch.full((1,), t), torch.full((1,), tau)
    out = implementation.op("stablevs_step")(x, v, time, after, None, noise, noise_factor=factor, path=path).double()
    beta = factor * schedule(path, tau)[1]
    expected = formula(x[:, :1], v[:, :1], time, after, torch.zeros(1, 1), factor, path)
    assert abs(out.mean() - expected.squeeze()) <= 5 * beta / math.sqrt(draws)
    assert abs(out.std() / beta - 1) <= 5 / math.sqrt(2 * draws)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_guidance(implementation, rng, factor):
    x, v = pairs((3, 20), rng)
    u, noise = pairs((3, 20), rng)
    t, tau = torch.full((3,), 0.8), torch.full((3,), 0.4)
    out = implementation.op("stablevs_step")(x, v, t, tau, u, noise, guidance_scale=4.0, noise_factor=factor)
    assert_close(out, formula(x, u.double() + 4.0 * (v.double() - u.double()), t, tau, noise, factor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(implementation, rng, dtype):
    if implementation.interpreted and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates to bfloat16; a GPU rounds")
    x, v = (p.to(dtype) for p in pairs((2, 65), rng))
    t, tau = torch.tensor([0.8, 0.5], dtype=torch.float64), torch.tensor([0.4, 0.0], dtype=torch.float64)
    out = implementation.op("stablevs_step")(x, v.float(), t, tau, path="cosine")
    assert out.dtype == dtype
    assert_close(out, formula(x, v, t, tau, path="cosine"))


def test_times_are_clamped(implementation, rng):
    x, v = pairs((4, 8), rng)
    t, tau = torch.tensor([1.0, 1.5, 0.9, 0.5]), torch.tensor([0.5, 0.9, -1.0, 0.0])
    assert_close(implementation.op("stablevs_step")(x, v, t, tau), formula(x, v, t, tau))


@pytest.mark.parametrize("change", [offset_by_one, with_gaps])
def test_unaligned_and_strided(implementation, rng, change):
    x, v = pairs((3, 2, 9), rng)
    t, tau = torch.full((3,), 0.8), torch.full((3,), 0.4)
    out = implementation.on_device("stablevs_step")(*(change(a.to(implementation.device)) for a in (x, v, t, tau)))
    assert_close(out.cpu(), formula(x, v, t, tau))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_empty(implementation, shape):
    empty, half = torch.empty(shape), torch.full((), 0.5)
    assert implementation.op("stablevs_step")(empty, empty, half, half).shape == shape


def test_inputs_are_not_changed_and_every_output_is_written(implementation, rng, poisoned_memory):
    x, v = pairs((2, 1031), rng)
    args = [a.to(implementation.device) for a in (x, v, torch.tensor([2.0, 0.5]), torch.tensor([-1.0, 0.2]))]
    before = [a.clone() for a in args]
    assert not implementation.on_device("stablevs_step")(*args).isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the process's memory from /proc")
def test_calls_leave_no_memory_behind():
    """Each argument of an op is freed, strings too; 48 bytes a call would be 9 MB here."""
    x, half = torch.ones(1, 4), torch.tensor(0.5)

    def resident_after(calls):
        for _ in range(calls):
            svel.stablevs_step(x, x, half, half, path="cosine")
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_after(20_000)
    assert resident_after(200_000) - before < 3 << 20

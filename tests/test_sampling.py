"""Samplers against closed-form flows: Gaussian data, whose velocity and exact solution are known, and a point mass."""

import math
from itertools import pairwise

import pytest
import torch
from stablevelocity.interpolants import Interpolant, get_interpolant
from stablevelocity.sampling import (
    GRIDS,
    SOLVERS,
    Guidance,
    StableVS,
    edm_grid,
    euler,
    euler_maruyama,
    grow,
    heun,
    nfe,
    sample,
    shifted_grid,
    standard_normal,
    step_noise,
    thin,
    time_grid,
    uniform_grid,
)

from stablevelocity_kernels import PathCoefficients
from stablevelocity_kernels.testing import assert_close

MU, S = 0.7, 0.5  # the data are N(MU, S^2 I)


class HalfCosine(Interpolant):
    """A path of one's own, alpha = cos(pi t^2 / 2), sigma = sin(pi t^2 / 2), that the kernels do not know by name."""

    def coefficients(self, t):
        angle, speed = 0.5 * math.pi * t * t, math.pi * t
        return PathCoefficients(angle.cos(), angle.sin(), -speed * angle.sin(), speed * angle.cos())


PATHS = ["linear", "cosine", HalfCosine()]


def at(path, t):
    """alpha, sigma and their derivatives as Python floats."""
    return [float(c) for c in get_interpolant(path).coefficients(torch.tensor(float(t), dtype=torch.float64))]


def gaussian_velocity(path, mu=MU):
    def velocity(x, t):
        a, s, da, ds = at(path, t[0])
        variance = a * a * S * S + s * s
        return da * mu + (a * da * S * S + s * ds) / variance * (x - a * mu)

    return velocity


def gaussian_solution(path, x1, t=0.0):
    a, s, _, _ = at(path, t)
    return a * MU + math.sqrt(a * a * S * S + s * s) * x1


def point_velocity(path, x0):
    """The conditional velocity, which for a data distribution of one point is the marginal one."""

    def velocity(x, t):
        a, s, da, ds = at(path, t[0])
        return ds / s * x + (da - ds * a / s) * x0.to(x)

    return velocity


def noise(n=8, d=3, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


# Order of convergence

ORDERS = {"euler": 1, "heun": 2, "dpmpp_2m": 2, "unipc": 3}
STEPS = (40, 80, 160)


def errors(solver, path, grid="uniform", thinned=False):
    """Distance to the exact solution for each of STEPS, of runs from 1 to 0."""
    x1, found = noise(), []
    for steps in STEPS:
        stable = StableVS(low_steps=steps // 2) if thinned else None
        run = {"solver": solver, "steps": steps, "grid": grid, "interpolant": path, "stable": stable}
        found.append(
            float((sample(gaussian_velocity(path), x1, **run) - gaussian_solution(path, x1)).norm() / x1.norm())
        )
    return found


def orders(found):
    return [math.log2(coarse / fine) for coarse, fine in pairwise(found)]


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_order_of_convergence_inside_the_interval(solver, order, path):
    x1, start, end, found = noise(), 0.9, 0.1, []
    for steps in STEPS:
        times = [start + (end - start) * i / steps for i in range(steps + 1)]
        out = SOLVERS[solver](gaussian_velocity(path), gaussian_solution(path, x1, start), times, interpolant=path)
        found.append(float((out - gaussian_solution(path, x1, end)).norm() / x1.norm()))
    assert orders(found) == [pytest.approx(order, abs=0.3)] * 2


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("solver", "order"), ORDERS.items())
def test_order_of_convergence_from_noise_to_data(solver, order, path):
    found = errors(solver, path, "edm")  # log-SNR steps that shrink everywhere, as the multistep solvers' theory asks
    assert found[-1] < 0.03 / order**4
    assert orders(found) == [pytest.approx(order, abs=0.3)] * 2


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(("solver", "limit"), [("euler", 6e-3), ("heun", 7e-5), ("dpmpp_2m", 6e-4), ("unipc", 2e-4)])
def test_error_on_the_uniform_grid(solver, limit, path):
    assert errors(solver, path)[-1] < limit  # 160 steps


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_first_order_exponential_step_is_the_stablevs_step(solver, path, dtype):
    stable = StableVS(split=0.9)
    for t, tau in [(0.9, 0.5), (0.7, 0.0), (0.3, 0.29)]:
        x = noise(dtype=dtype)
        plain = SOLVERS[solver](gaussian_velocity(path), x, [t, tau], interpolant=path)
        assert_close(plain, euler(gaussian_velocity(path), x.double(), [t, tau], interpolant=path, stable=stable))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_stablevs_converges_with_its_number_of_low_steps(path):
    found = errors("euler", path, thinned=True)
    assert found[-1] < 0.03
    assert orders(found) == [pytest.approx(1.0, abs=0.35)] * 2


# The closed form is exact where its assumption holds


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_point_mass_is_reached_in_one_step(solver, path):
    x0, eps = noise(5), torch.randn(5, 3, dtype=torch.float64)
    a, s, _, _ = at(path, 0.8)
    run = {"interpolant": path, "stable": StableVS(split=0.8)}
    for tau in (0.5, 0.1, 0.0):
        a_tau, s_tau, _, _ = at(path, tau)
        out = SOLVERS[solver](point_velocity(path, x0), a * x0 + s * eps, [0.8, tau], **run)
        assert_close(out, a_tau * x0 + s_tau * eps)
    jump = SOLVERS[solver](point_velocity(path, x0), (a * x0 + s * eps).float(), [0.8, 0.0], **run)
    assert_close(jump, x0)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("factor", [0.2, 1.0])
def test_noise_factor_keeps_the_variance_of_the_path(path, factor, rng):
    x0, eps, tau = torch.full((5000, 8), 0.3), torch.randn(5000, 8, generator=rng), 0.4
    a, s, _, _ = at(path, 0.8)
    a_tau, s_tau, _, _ = at(path, tau)
    stable = StableVS(split=0.8, noise_factor=factor)
    times = [0.8, 0.6, tau]
    out = euler(point_velocity(path, x0), a * x0 + s * eps, times, interpolant=path, stable=stable, noise=rng)
    assert_moments(out, a_tau * 0.3, s_tau)
    correlation = float((out * eps).mean()) / s_tau
    assert correlation == pytest.approx(1.0 - factor**2, abs=0.03)  # each of the two steps keeps sqrt(1 - f^2) of it


def assert_moments(out, mean, std, limit=4.0):
    n = out.numel()
    z_mean = (float(out.double().mean()) - mean) / std * math.sqrt(n)
    z_variance = (float(out.double().var()) / std**2 - 1.0) * math.sqrt(n / 2)
    assert abs(z_mean) < limit, f"mean {float(out.mean()):.4f}, expected {mean:.4f}, z = {z_mean:.1f}"
    assert abs(z_variance) < limit, f"std {float(out.std()):.4f}, expected {std:.4f}, z = {z_variance:.1f}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("grid", ["total", "official"])
def test_linear_without_noise_is_euler_on_the_thinned_grid(grid, dtype):
    stable, velocity, x1 = StableVS(split=0.85, low_steps=4, grid=grid), gaussian_velocity("linear"), noise(dtype=dtype)
    times = time_grid(12, stable=stable)
    assert_close(euler(velocity, x1, times, stable=stable), euler(velocity, x1, times))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_only_steps_that_start_at_or_below_the_split_change(path):
    seen, plain = [], []
    times, velocity = time_grid(10), gaussian_velocity(path)
    stable = StableVS(split=0.5, noise_factor=1.0)
    euler(velocity, noise(), times, interpolant=path, stable=stable, callback=lambda i, n, t, x: seen.append(x))
    euler(velocity, noise(), times, interpolant=path, callback=lambda i, n, t, x: plain.append(x))
    same = [torch.equal(a, b) for a, b in zip(seen, plain, strict=True)]
    assert same == [True] * 5 + [False] * 5  # starts 1.0 ... 0.6, then 0.5 ... 0.1


# The stochastic sampler


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_euler_maruyama_has_the_marginals_of_the_flow(path, rng):
    x1, seen = torch.randn(4000, 4, generator=rng), {}
    times = time_grid(200)
    run = {"interpolant": path, "noise": rng, "callback": lambda i, n, t, x: seen.update({round(t, 3): x})}
    euler_maruyama(gaussian_velocity(path), x1, times, **run)
    for t in (0.7, 0.3, 0.0):
        a, s, _, _ = at(path, t)
        assert_moments(seen[t], a * MU, math.sqrt(a * a * S * S + s * s))
    kept = float(torch.corrcoef(torch.stack([seen[0.0].flatten(), x1.flatten()]))[0, 1])
    assert kept < 0.9  # it is not the deterministic flow, which keeps all of it


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_weak_order_of_euler_maruyama(path):
    """Mean and variance at t = 0.1 against the flow's, of order 1 and without drawing anything.

    On Gaussian data a run is affine in its start and in the noise of its steps. Rows that start from 0 and 1, and rows
    that see noise 1 in one step alone, have all its coefficients.
    """
    found = []
    for steps in STEPS:
        x = torch.zeros(steps + 2, 1, dtype=torch.float64)
        x[1], calls = 1.0, iter(range(2, steps + 2))

        def impulse(like, calls=calls):
            return torch.zeros_like(like).index_fill_(0, torch.tensor([next(calls)]), 1.0)

        times = [0.9 - 0.8 * i / steps for i in range(steps + 1)]
        out = euler_maruyama(gaussian_velocity(path), x, times, interpolant=path, noise=impulse)[:, 0]
        (a, s, _, _), (a_end, s_end, _, _) = at(path, 0.9), at(path, 0.1)
        response = (out[1:] - out[0]) * torch.tensor([math.sqrt(a * a * S * S + s * s), *[1.0] * steps])
        mean, variance = out[0] + (out[1] - out[0]) * a * MU, response.square().sum()
        found.append([abs(float(mean) - a_end * MU), abs(float(variance) - (a_end * a_end * S * S + s_end * s_end))])
    means, variances = zip(*found, strict=True)
    assert orders(variances) == [pytest.approx(1.0, abs=0.3)] * 2
    if path == "linear":  # the mean goes straight, so every step of it is exact
        assert max(means) < 1e-12
    else:
        assert orders(means) == [pytest.approx(1.0, abs=0.3)] * 2


def test_euler_maruyama_with_another_diffusion(rng):
    x1, times = torch.randn(4000, 4, generator=rng), time_grid(200)
    out = euler_maruyama(gaussian_velocity("linear"), x1, times, noise=rng, diffusion=lambda t: 0.5 * t * (1 - t))
    assert_moments(out, MU, S)
    still = euler_maruyama(gaussian_velocity("linear"), x1, times, diffusion=lambda t: 0.0)
    assert_close(still, euler(gaussian_velocity("linear"), x1, times))
    with pytest.raises(ValueError, match="diffusion: expected a w"):
        euler_maruyama(gaussian_velocity("linear"), x1, times, diffusion=lambda t: -1.0)


# Time grids

GRID_CASES = [
    (steps, split, low) for steps in range(1, 41) for split in (0.0, 0.3, 0.6, 0.85, 0.95) for low in range(13)
]


def test_grids_fall_from_one_to_zero_with_the_steps_they_promise():
    for steps, split, low in GRID_CASES:
        base = uniform_grid(steps)
        for kind in ("total", "official"):
            times = time_grid(steps, stable=StableVS(split=split, low_steps=low, grid=kind))
            case = f"{steps=} {split=} {low=} {kind=}"
            assert times.dtype == torch.float64, case
            assert times.device.type == "cpu", case
            assert times[0] == 1.0, case
            assert times[-1] == 0.0, case
            assert bool((times.diff() < 0).all()), case
            starts = times[:-1]
            if low == 0:
                assert torch.equal(times, base), case
                continue
            assert int((starts <= split).sum()) <= low, case
            if kind == "total":
                assert len(starts) == steps, case
            else:
                high = base[:-1][base[:-1] > split]
                assert torch.equal(starts[: len(high)], high), case
                assert len(starts) == len(high) + min(low, steps - len(high)), case
                assert bool(torch.isin(starts, base).all()), case


def test_thinning_picks_as_the_paper_code_does_where_that_is_distinct():
    for n_low in range(2, 40):
        times = torch.cat([torch.tensor([1.0]), 0.8 * uniform_grid(n_low)]).double()
        for low in range(2, n_low):
            starts = thin(times, 0.85, low)[1:-1]
            picks = torch.searchsorted(-times[1:], -starts).double()
            off = (picks - torch.linspace(0, n_low - 2, low, dtype=torch.float64)).abs().max()
            assert len(starts) == low, f"{n_low=} {low=}"
            assert float(off) <= 0.5 + 1e-9, f"{n_low=} {low=}"  # rounding; a tie may go either way
        assert torch.equal(thin(times, 0.85, 1), times[[0, 1, -1]])
        assert torch.equal(thin(times, 0.85, n_low), times)


def test_a_split_on_a_grid_point_belongs_to_the_low_region():
    for steps, split in [(20, 0.85), (10, 0.7), (100, 0.29), (30, 0.9)]:
        starts = time_grid(steps, stable=StableVS(split=split, low_steps=1, grid="official"))[:-1]
        assert float(starts[-1]) == split


def test_total_works_on_a_grid_of_ones_own():
    def shifted(steps):
        t = uniform_grid(steps)
        return 3 * t / (1 + 2 * t)

    for steps in range(1, 40):
        assert len(time_grid(steps, shifted, StableVS())) == steps + 1
        assert torch.equal(time_grid(steps, shifted), shifted(steps))


@pytest.mark.parametrize("kind", sorted(GRIDS))
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_named_grid_falls_from_one_to_zero_and_can_be_thinned(kind, path):
    for steps in (1, 2, 3, 10, 31):
        for stable in (None, StableVS(), StableVS(split=0.6, low_steps=4)):
            times = time_grid(steps, kind, stable, path)
            assert len(times) == steps + 1
            assert (times[0], times[-1]) == (1.0, 0.0)
        thinned = time_grid(steps, kind, StableVS(low_steps=3, grid="official"), path)
        assert bool(torch.isin(thinned, time_grid(steps, kind, None, path)).all())


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_edm_grid_has_the_noise_levels_of_edm(path):
    times = edm_grid(18, path)[1:-1]
    found = [at(path, t)[1] / at(path, t)[0] for t in times]
    inverse = [80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(1, 18)]
    assert found == [pytest.approx(level**7, rel=1e-9) for level in inverse]


def test_shifted_grid():
    assert torch.equal(shifted_grid(7, 1.0), uniform_grid(7))
    assert shifted_grid(4).tolist() == [1.0, 0.9, 0.75, 0.5, 0.0]
    with pytest.raises(ValueError, match=r"shift: expected a number above 0, got 0\.0"):
        shifted_grid(4, 0.0)


def test_a_grid_that_cannot_grow_is_refused():
    with pytest.raises(ValueError, match="kind: expected a grid that can be thinned to 20 steps"):
        grow(lambda steps: torch.cat([torch.ones(1), 0.5 * uniform_grid(steps - 1)]), 20, 0.85, 9)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_no_low_steps_is_the_stock_solver_bit_for_bit(solver, path):
    run = {"solver": solver, "steps": 9, "interpolant": path}
    x1, off, outs = noise(dtype=torch.float32), StableVS(low_steps=0, noise_factor=0.5), []
    for stable in (None, off):
        generator = torch.Generator().manual_seed(3)
        outs.append(sample(gaussian_velocity(path), x1, stable=stable, generator=generator, **run))
    assert torch.equal(*outs)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("stable", [None, StableVS(), StableVS(noise_factor=0.3, grid="official"), StableVS(split=0.0)])
def test_one_step_works(solver, stable):
    x1 = noise()
    out = sample(gaussian_velocity("linear"), x1, solver=solver, steps=1, stable=stable)
    assert float((out - MU).abs().max()) < 1e-4  # at t = 1 only the data's mean is known; the ops clamp t to 1 - 1e-5


# Guidance


class TwoClass:
    """A velocity whose classes have different means; it counts its calls and the rows of each."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y, scale=1.0):
        self.calls.append((round(float(t[0]), 6), x.shape[0]))
        assert t.shape == y.shape == x.shape[:1]
        return gaussian_velocity("linear", mu=y[:, None].to(x.dtype))(x, t) * scale


def guided(model, scale, low, high, y, null):
    """Guidance done outside the sampler, as a velocity of its own."""

    def velocity(x, t):
        cond = model(x, t, y)
        if not low <= float(t[0]) <= high:
            return cond
        uncond = model(x, t, null)
        return uncond + scale * (cond - uncond)

    return velocity


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("stable", [None, StableVS(split=0.6, low_steps=3, noise_factor=0.2)])
def test_guidance_equals_a_guided_velocity(solver, stable):
    y, null = torch.arange(8), torch.full((8,), 9)
    run = {"solver": solver, "steps": 8, "stable": stable, "generator": torch.zeros_like}
    guidance = Guidance(2.5, low=0.2, high=0.7, uncond={"y": null})
    out = sample(TwoClass(), noise(), guidance=guidance, y=y, **run)
    assert_close(out, sample(guided(TwoClass(), 2.5, 0.2, 0.7, y, null), noise(), **run))


def test_guidance_makes_one_call_a_time_and_only_inside_its_interval_a_double_one():
    model, y = TwoClass(), torch.arange(8)
    guidance = Guidance(2.0, low=0.2, high=0.7, uncond={"y": torch.zeros_like(y)})
    euler(model, noise(), time_grid(10), guidance=guidance, y=y, scale=0.5)
    expected = [(t / 10, 16 if 2 <= t <= 7 else 8) for t in range(10, 0, -1)]
    assert model.calls == expected


def test_guidance_of_one_never_runs_the_unconditional_half():
    model, y = TwoClass(), torch.arange(8)
    euler(model, noise(), time_grid(4), guidance=Guidance(1.0, uncond={"y": y}), y=y)
    assert {rows for _, rows in model.calls} == {8}


@pytest.mark.parametrize(
    ("uncond", "message"),
    [
        ({"z": 1}, "uncond: expected names among"),
        ({"y": torch.zeros(3)}, r"uncond\['y'\]: expected a tensor of shape \(8,\), got \(3,\)"),
        ({"y": None}, r"uncond\['y'\]: expected a tensor of shape \(8,\), got None"),
        ({"scale": 2.0}, r"uncond\['scale'\]: expected the conditional value"),
    ],
)
def test_guidance_names_conditioning_that_does_not_fit(uncond, message):
    with pytest.raises(ValueError, match=message):
        euler(TwoClass(), noise(), time_grid(2), guidance=Guidance(2.0, uncond=uncond), y=torch.arange(8), scale=1.0)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("stable", [None, StableVS(low_steps=3)])
@pytest.mark.parametrize("guidance", [None, Guidance(3.0, 0.15, 0.8, uncond={"y": torch.zeros(8)})])
def test_nfe_is_what_a_run_evaluates(solver, stable, guidance):
    model, times = TwoClass(), time_grid(10, stable=stable)
    SOLVERS[solver](model, noise(), times, stable=stable, guidance=guidance, y=torch.arange(8.0))
    assert nfe(times, solver, stable=stable, guidance=guidance) == sum(rows for _, rows in model.calls) / 8


def test_nfe_by_hand():
    stable = StableVS(split=0.5, low_steps=2, grid="official")
    times = time_grid(10, stable=stable)  # 1.0 ... 0.6, 0.5, 0.2, 0
    assert times.tolist() == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.2, 0.0]
    assert [nfe(time_grid(10), s) for s in ("euler", "heun", "euler_maruyama")] == [10, 19, 10]
    assert [nfe(times, s, stable=stable) for s in ("euler", "heun", "euler_maruyama")] == [7, 12, 7]
    assert nfe(times, "euler", stable=stable, guidance=Guidance(2.0, 0.0, 0.5)) == 9


# Noise, callback, dtypes


def run_noisy(x, noise, solver="euler_maruyama"):
    times, stable = time_grid(8), StableVS(split=0.4, noise_factor=0.5)
    return SOLVERS[solver](gaussian_velocity("linear"), x, times, stable=stable, noise=noise)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_noise_is_reproducible_by_generator(solver):
    a, b, c = (run_noisy(noise(), torch.Generator().manual_seed(seed), solver) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_with_a_generator_per_sample_a_sample_does_not_depend_on_its_batch():
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    x1 = standard_normal(torch.empty(4, 3), generators)
    whole = run_noisy(x1, generators)
    for i in range(4):
        own = [torch.Generator().manual_seed(i)]
        alone = run_noisy(standard_normal(torch.empty(1, 3), own), own)
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_noise_is_drawn_only_where_it_is_used(solver):
    draws = []

    def draw(like):
        draws.append(like.shape)
        return torch.zeros_like(like)

    # starts 1, 7/8 ... 1/8: the last three are in the low-variance region, and the very last step goes to 0
    run_noisy(noise(), draw, solver)
    assert len(draws) == (7 if solver == "euler_maruyama" else 2)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_with_a_seed_per_sample_a_sample_does_not_depend_on_its_batch(solver):
    seeds = [7, 0, 3, 11]
    whole = run_noisy(standard_normal(torch.empty(4, 3), seeds), seeds, solver)
    for part in ([0], [1, 2], [3, 0]):
        own = [seeds[i] for i in part]
        assert torch.equal(run_noisy(standard_normal(torch.empty(len(part), 3), own), own, solver), whole[part])
    other = run_noisy(standard_normal(torch.empty(4, 3), seeds), [1, 2, 4, 5], solver)
    assert not torch.equal(other, whole)


def test_steps_do_not_repeat_the_noise_that_the_same_seed_started_from():
    like = torch.empty(1, 1000)
    start, step = standard_normal(like, [5]), standard_normal(like, step_noise([5]))
    assert abs(float(torch.corrcoef(torch.cat([start, step]))[0, 1])) < 0.1
    assert torch.equal(standard_normal(like, [5]), start)
    assert torch.equal(standard_normal(like, 5)[0], start[0])
    generator = torch.Generator()
    assert step_noise(generator) is generator


def test_the_number_of_generators_is_checked():
    with pytest.raises(ValueError, match="noise: expected 8 generators or seeds, one a sample, got 2"):
        run_noisy(noise(), [torch.Generator(), 1])


def test_callback_sees_every_step():
    seen = []
    times = time_grid(5, stable=StableVS(low_steps=2))
    out = heun(gaussian_velocity("linear"), noise(), times, callback=lambda i, n, t, x: seen.append((i, n, t, x)))
    assert [(i, n) for i, n, _, _ in seen] == [(i, 5) for i in range(5)]
    assert [t for _, _, t, _ in seen] == times[1:].tolist()
    assert torch.equal(seen[-1][3], out)


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_model_gets_the_dtype_of_the_sample_and_so_does_the_caller(dtype, solver):
    def velocity(x, t):
        assert x.dtype == dtype
        assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return gaussian_velocity("cosine")(x, t)

    x1 = noise().to(dtype)
    run = {"solver": solver, "steps": 20, "interpolant": "cosine", "stable": StableVS()}
    out = sample(velocity, x1, **run)
    assert out.dtype == dtype
    assert_close(out, sample(gaussian_velocity("cosine"), x1.double(), **run))


def test_a_run_may_start_and_end_anywhere():
    x1 = noise()
    x = gaussian_solution("cosine", x1, 0.6)
    out = heun(gaussian_velocity("cosine"), x, [0.6, 0.55, 0.5, 0.45, 0.4], interpolant="cosine")
    assert float((out - gaussian_solution("cosine", x1, 0.4)).norm() / x1.norm()) < 1e-3


def test_no_gradient_is_recorded():
    weight = torch.ones((), requires_grad=True)
    assert not sample(lambda x, t: weight * x, noise(), steps=2).requires_grad


# Bad arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StableVS(split=1.0), r"split: expected a number in \[0, 1\), got 1.0"),
        (lambda: StableVS(split=-0.1), r"split: expected a number in \[0, 1\), got -0.1"),
        (lambda: StableVS(low_steps=-1), "low_steps: expected an integer of at least 0, got -1"),
        (lambda: StableVS(low_steps=2.5), "low_steps: expected an integer of at least 0, got 2.5"),
        (lambda: StableVS(noise_factor=1.5), r"noise_factor: expected a number in \[0, 1\], got 1.5"),
        (lambda: StableVS(noise_factor=math.nan), r"noise_factor: expected a number in \[0, 1\], got nan"),
        (lambda: StableVS(grid="thin"), "grid: expected 'total' or 'official', got 'thin'"),
        (lambda: Guidance(math.inf), "scale: expected a finite number, got inf"),
        (lambda: Guidance(2.0, 0.6, 0.5), r"low, high: expected times with 0 <= low <= high <= 1, got \(0.6, 0.5\)"),
        (lambda: time_grid(0), "steps: expected an integer of at least 1, got 0"),
        (lambda: time_grid(2.0), "steps: expected an integer of at least 1, got 2.0"),
        (
            lambda: time_grid(4, "cubic"),
            r"kind: expected one of \['edm', 'shifted', 'uniform'\] or a function, got 'cubic'",
        ),
        (lambda: time_grid(4, lambda n: torch.ones(n + 1)), "times: expected at least two strictly decreasing"),
        (lambda: euler(torch.sin, noise(), [1.0]), "times: expected at least two strictly decreasing"),
        (lambda: euler(torch.sin, noise(), [1.0, math.nan, 0.0]), "times: expected at least two strictly decreasing"),
        (lambda: euler(torch.sin, noise(), [1.5, 0.0]), r"times: .* in \[0, 1\], got \[1.5, 0.0\]"),
        (lambda: euler(torch.sin, noise(), torch.ones(2, 2)), "times: expected a 1-d CPU tensor"),
        (lambda: sample(torch.sin, noise(), solver="rk4"), "solver: expected one of .* or a function, got 'rk4'"),
        (lambda: sample(torch.sin, noise(), interpolant="edm"), "interpolant: expected one of .*, got 'edm'"),
    ],
)
def test_bad_arguments_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# On the GPU


def device_velocity(x, t):
    return -x / (0.5 + t[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_sampling_does_not_wait_for_the_device(solver):
    x1 = torch.randn(4, 64, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    run = {"solver": solver, "steps": 10, "stable": StableVS(noise_factor=0.2), "guidance": Guidance(2.0, 0.1, 0.9)}
    sample(device_velocity, x1, generator=generator, **run)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(device_velocity, x1, generator=generator, **run)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_whole_run_captures_in_a_graph():
    x1, times, stable = torch.randn(4, 64, device="cuda"), time_grid(10, stable=StableVS()), StableVS()
    expected = heun(device_velocity, x1, times, stable=stable)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = heun(device_velocity, x1, times, stable=stable)
    graph.replay()
    assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_cpu_generators_give_the_same_samples_on_the_gpu(solver):
    outs = []
    for device in ("cpu", "cuda"):
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        x1 = noise(dtype=torch.float32).to(device)
        run = {"solver": solver, "steps": 8, "stable": StableVS(noise_factor=0.4), "generator": generators}
        outs.append(sample(device_velocity, x1, **run).cpu())
    assert float((outs[1] - outs[0]).norm() / outs[0].norm()) < 1e-5  # errors of eight steps add up

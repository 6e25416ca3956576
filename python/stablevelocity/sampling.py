"""Samplers: from noise (t = 1) to data (t = 0) along a velocity field, each one short function with one signature.

    times = time_grid(30, stable=stable)
    x = euler(velocity, x, times, interpolant="linear", stable=stable, guidance=Guidance(4.0, uncond={"y": null}), y=y)

`velocity(x, t, **conditioning)` is any callable, x (N, *S), t (N,). A step that starts at or below `stable.split` is
the closed form of StableVS (arXiv 2602.05435); above it the solver runs unchanged. All decisions are made on Python
floats of the time grid, so nothing here waits for the device; updates are svel::affine_step and svel::stablevs_step.

A new solver is one more function below and its name in SOLVERS; time grids are in grids.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablevelocity_kernels import affine_step, clamp_time

from .grids import GRIDS, StableVS, edm_grid, expect, grow, host_times, shifted_grid, thin, time_grid, uniform_grid
from .interpolants import Interpolant, get_interpolant

__all__ = [
    "GRIDS",
    "SOLVERS",
    "Guidance",
    "StableVS",
    "dpmpp_2m",
    "edm_grid",
    "euler",
    "euler_maruyama",
    "grow",
    "heun",
    "nfe",
    "sample",
    "shifted_grid",
    "standard_normal",
    "step_noise",
    "thin",
    "time_grid",
    "uniform_grid",
    "unipc",
]

Velocity = Callable[..., Tensor]
Noise = int | torch.Generator | Sequence[int | torch.Generator] | Callable[[Tensor], Tensor] | None
Callback = Callable[[int, int, float, Tensor], None]
Velocities = tuple[Tensor, Tensor | None]  # conditional, and unconditional where guidance is active


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v = v_uncond + scale (v_cond - v_uncond) at times in [low, high].

    Inside the interval the model is called once on both halves (2 N rows), outside it on the conditional half alone.

    Args:
        scale: 1 is no guidance, and then no unconditional half is run.
        low, high: times, 0 at the data and 1 at the noise.
        uncond: what replaces the conditioning of the same name in the unconditional half, e.g. {"y": null labels (N,)}.
            Names it lacks are shared by both halves.
    """

    scale: float
    low: float = 0.0
    high: float = 1.0
    uncond: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expect(math.isfinite(self.scale), "scale", "a finite number", self.scale)
        ordered = 0.0 <= self.low <= self.high <= 1.0
        expect(ordered, "low, high", "times with 0 <= low <= high <= 1", (self.low, self.high))

    def active(self, t: float) -> bool:
        """Whether the unconditional half is run at time t."""
        return self.scale != 1.0 and self.low <= t <= self.high

    def batch(self, conditioning: dict[str, Any], rows: int) -> dict[str, Any]:
        """Conditioning of the batched call: tensors of N rows are joined along them, anything else must be shared."""
        unknown = sorted(self.uncond.keys() - conditioning.keys())
        expect(not unknown, "uncond", f"names among {sorted(conditioning)}", unknown)
        return {name: self._join(name, value, rows) for name, value in conditioning.items()}

    def _join(self, name: str, cond: Any, rows: int) -> Any:
        uncond = self.uncond.get(name, cond)
        if isinstance(cond, Tensor) and cond.dim() and cond.shape[0] == rows:
            same = isinstance(uncond, Tensor) and uncond.shape == cond.shape
            got = tuple(uncond.shape) if isinstance(uncond, Tensor) else uncond
            expect(same, f"uncond[{name!r}]", f"a tensor of shape {tuple(cond.shape)}", got)
            return torch.cat([cond, uncond])
        shared = uncond is cond or (not isinstance(cond, Tensor) and not isinstance(uncond, Tensor) and uncond == cond)
        expect(shared, f"uncond[{name!r}]", "the conditional value, because it is no tensor of N rows", uncond)
        return cond


def standard_normal(like: Tensor, noise: Noise = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `like`.

    Args:
        like: (N, *S).
        noise: None for torch's global stream; a generator, on any device; a seed, which is a new generator on the CPU;
            a list of N generators or seeds, one a sample, so that a sample does not depend on the batch it is in; or a
            function of `like`.
    """
    if noise is None:
        return torch.randn_like(like)
    if isinstance(noise, int):
        noise = torch.Generator().manual_seed(noise)
    if isinstance(noise, torch.Generator):
        return torch.randn(like.shape, generator=noise, device=noise.device, dtype=like.dtype).to(like.device)
    if callable(noise):
        return noise(like)
    expect(len(noise) == like.shape[0], "noise", f"{like.shape[0]} generators or seeds, one a sample", len(noise))
    return torch.stack([standard_normal(row, one) for row, one in zip(like, noise, strict=True)])


def step_noise(noise: Noise) -> Noise:
    """The noise of a run's steps: every seed becomes a generator, which the steps then draw on.

    A seed stands for another stream here than in `standard_normal`, so that one may start a run and drive its steps
    with the same seeds. Generators and functions are returned as they are.
    """
    if isinstance(noise, Sequence):
        return [step_noise(one) for one in noise]
    return torch.Generator().manual_seed(noise ^ 0x9E3779B9) if isinstance(noise, int) else noise


class _Point(NamedTuple):
    """A time of a multistep solver: the path there (t clamped to [1e-5, 1 - 1e-5]) and the data that was predicted."""

    alpha: float
    sigma: float
    x0: Tensor  # (N, *S)

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, in which the solvers' steps are linear."""
        return math.log(self.alpha / self.sigma)


class _Flow:
    """One sampling run: what all solvers share, in terms of Python-float times and the state x (N, *S).

    The state is float32 (float64 for a float64 sample); the model gets the dtype the caller's sample has.
    """

    def __init__(self, velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning):
        self.velocity, self.conditioning = velocity, conditioning
        self.interpolant: Interpolant = get_interpolant(interpolant)
        self.stable, self.guidance, self.noise, self.callback = stable, guidance, step_noise(noise), callback
        self.times, self.dtype = host_times(times), x.dtype
        self.work = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.scale = guidance.scale if guidance else 1.0
        self.batched = guidance.batch(conditioning, x.shape[0]) if guidance else {}
        self.scalar = partial(torch.full, (), dtype=torch.float64, device=x.device)  # a fill, not a copy from the host

    def steps(self):
        """(index, t, tau) of every step."""
        return ((i, t, tau) for i, (t, tau) in enumerate(pairwise(self.times)))

    def __call__(self, x: Tensor, t: float) -> Velocities:
        """The velocity at time t, and the unconditional one where guidance is active: one model call."""
        n, model_x = x.shape[0], x.to(self.dtype)
        if not (self.guidance and self.guidance.active(t)):
            return self.velocity(model_x, self._rows(n, t, x), **self.conditioning), None
        both = self.velocity(torch.cat([model_x, model_x]), self._rows(2 * n, t, x), **self.batched)
        return both[:n], both[n:]

    def _rows(self, n: int, t: float, x: Tensor) -> Tensor:
        return torch.full((n,), t, dtype=self.work, device=x.device)

    def in_low_region(self, t: float) -> bool:
        return self.stable is not None and self.stable.covers(t)

    def closed_form(self, x: Tensor, v: Velocities, t: float, tau: float) -> Tensor:
        """The StableVS step; at tau = 0 there is no noise and it gives E[x_0 | x_t]."""
        factor = self.stable.noise_factor if self.stable and tau > 0.0 else 0.0
        noise = standard_normal(x, self.noise) if factor else None
        times = self.scalar(t), self.scalar(tau)
        return self.interpolant.step(x, v[0], *times, v[1], noise, guidance_scale=self.scale, noise_factor=factor)

    def move(self, x: Tensor, v: Velocities, a: float, b: float, c: float = 0.0) -> Tensor:
        """a x + b (guided v) + c noise."""
        noise = standard_normal(x, self.noise) if c else None
        weight = self.scalar(c) if c else None
        return affine_step(x, v[0], self.scalar(a), self.scalar(b), weight, v[1], noise, guidance_scale=self.scale)

    def combine(self, x: Tensor, a: float, y: Tensor, b: float, z: Tensor | None = None, c: float = 0.0) -> Tensor:
        """a x + b y + c z, in one launch."""
        return affine_step(x, y, self.scalar(a), self.scalar(b), None if z is None else self.scalar(c), None, z)

    def point(self, x: Tensor, v: Velocities, t: float) -> _Point:
        """The path at time t, and the E[x_0 | x_t] that the (guided) velocity there stands for."""
        alpha, sigma, x_factor, x0_factor = _path_at(self.interpolant, t)
        return _Point(alpha, sigma, self.move(x, v, -x_factor / x0_factor, 1.0 / x0_factor))

    def exponential(self, x: Tensor, now: _Point, before: _Point | None, tau: float) -> Tensor:
        """A step of DPM-Solver++ to tau: with E[x_0 | x_t] constant in the log-SNR, or linear if `before` is given.

        (sigma_tau / sigma) x + b (D + (h / 2 h_before) (D - D_before)) with b = alpha_tau - alpha sigma_tau / sigma.
        Without `before`, and at tau = 0, where the log-SNR ends, it is the StableVS step without noise.
        """
        end = self.interpolant.coefficients(torch.tensor(tau, dtype=torch.float64))
        a = float(end.sigma) / now.sigma
        b = float(end.alpha) - a * now.alpha
        if before is None or tau == 0.0:
            return self.combine(x, a, now.x0, b)
        h = math.log(float(end.alpha) / float(end.sigma)) - now.log_snr
        slope = b * h / (2.0 * (now.log_snr - before.log_snr))
        return self.combine(x, a, now.x0, b + slope, before.x0, -slope)

    def report(self, i: int, tau: float, x: Tensor) -> None:
        if self.callback:
            self.callback(i, len(self.times) - 1, tau, x)


@torch.no_grad()
def euler(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    interpolant: str | Interpolant = "linear",
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
    noise: Noise = None,
    callback: Callback | None = None,
    **conditioning: Any,
) -> Tensor:
    """Euler's method on the probability-flow equation: first order, one evaluation a step.

    Args:
        velocity: velocity(x (N, *S), t (N,), **conditioning) -> (N, *S); t is float32, float64 for a float64 x.
        x: (N, *S) at time times[0], standard normal for times[0] = 1; any floating dtype.
        times: strictly decreasing in [0, 1], on the host; usually time_grid(steps, stable=stable).
        interpolant: "linear", "cosine" or an Interpolant: the path that the velocity was trained on.
        stable: use the closed-form step where a step starts at t <= stable.split. `times` are run as they are.
        guidance: classifier-free guidance.
        noise: see standard_normal and step_noise; used by Euler-Maruyama, and by StableVS with a noise factor.
        callback: callback(i, n, t, x) after step i of n (from 0), which reached time t with sample x.
        **conditioning: handed to `velocity`.

    Returns:
        (N, *S) at time times[-1], of x's dtype.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    flow = _Flow(velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning)
    x = x.to(flow.work)
    for i, t, tau in flow.steps():
        v = flow(x, t)
        x = flow.closed_form(x, v, t, tau) if flow.in_low_region(t) else flow.move(x, v, 1.0, tau - t)
        flow.report(i, tau, x)
    return x.to(flow.dtype)


@torch.no_grad()
def heun(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    interpolant: str | Interpolant = "linear",
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
    noise: Noise = None,
    callback: Callback | None = None,
    **conditioning: Any,
) -> Tensor:
    """Heun's method (the trapezoidal rule): second order, two evaluations a step; arguments as for `euler`.

    A step to t = 0 is Euler's, with one evaluation: the velocity is not defined at sigma = 0. Guidance at the second
    evaluation follows the time of that evaluation.
    """
    flow = _Flow(velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning)
    x = x.to(flow.work)
    for i, t, tau in flow.steps():
        v, h = flow(x, t), tau - t
        if flow.in_low_region(t):
            x = flow.closed_form(x, v, t, tau)
        elif tau == 0.0:
            x = flow.move(x, v, 1.0, h)
        else:
            ahead = flow(flow.move(x, v, 1.0, h), tau)
            x = flow.move(flow.move(x, v, 1.0, h / 2), ahead, 1.0, h / 2)
        flow.report(i, tau, x)
    return x.to(flow.dtype)


@torch.no_grad()
def euler_maruyama(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    interpolant: str | Interpolant = "linear",
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
    noise: Noise = None,
    callback: Callback | None = None,
    diffusion: Callable[[float], float] | None = None,
    **conditioning: Any,
) -> Tensor:
    """Euler-Maruyama on dx = (v - w score) dt + sqrt(2 w) dW, which has the marginals of the flow for any w(t) >= 0.

    Arguments as for `euler`, and `diffusion`: w as a function of a Python-float time, by default sigma(t) as in the
    code of SiT (REPA's `diffusion` is 2 w, the same on "linear"). A step to 0 adds no noise and goes to E[x_0 | x_t].
    """
    flow = _Flow(velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning)
    x = x.to(flow.work)
    for i, t, tau in flow.steps():
        v, h = flow(x, t), tau - t
        if flow.in_low_region(t) or tau == 0.0:
            x = flow.closed_form(x, v, t, tau)
        else:
            score_x, score_v, sigma = _score_coefficients(flow.interpolant, t)
            w = sigma if diffusion is None else diffusion(t)
            expect(w >= 0.0, "diffusion", f"a w(t) of at least 0 at t = {t}", w)
            x = flow.move(x, v, 1.0 - h * w * score_x, h * (1.0 - w * score_v), math.sqrt(-2.0 * w * h))
        flow.report(i, tau, x)
    return x.to(flow.dtype)


def _score_coefficients(interpolant: Interpolant, t: float) -> tuple[float, float, float]:
    """(a, b, sigma) with score = a x + b v: -(x - alpha x0) / sigma^2 at x0 = (v - (sigma'/sigma) x) / x0_factor."""
    alpha, sigma, x_factor, x0_factor = _path_at(interpolant, t)
    return -(1.0 + alpha * x_factor / x0_factor) / sigma**2, alpha / (sigma**2 * x0_factor), sigma


def _path_at(interpolant: Interpolant, t: float) -> tuple[float, float, float, float]:
    """alpha, sigma, x_factor and x0_factor (see PathCoefficients) at t clamped to [1e-5, 1 - 1e-5]."""
    c = interpolant.coefficients(clamp_time(torch.tensor(t, dtype=torch.float64)))
    return float(c.alpha), float(c.sigma), float(c.x_factor), float(c.x0_factor)


@torch.no_grad()
def dpmpp_2m(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    interpolant: str | Interpolant = "linear",
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
    noise: Noise = None,
    callback: Callback | None = None,
    **conditioning: Any,
) -> Tensor:
    """DPM-Solver++ 2M: second order, one evaluation a step; arguments as for `euler`.

    Multistep in half the log-SNR, log(alpha / sigma), on any interpolant (Lu et al. 2022, algorithm 2). The first step,
    and one to t = 0, are of first order, which is the StableVS step without noise.
    """
    flow = _Flow(velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning)
    x, before = x.to(flow.work), None
    for i, t, tau in flow.steps():
        v = flow(x, t)
        if flow.in_low_region(t):
            x = flow.closed_form(x, v, t, tau)
        else:
            now = flow.point(x, v, t)
            x, before = flow.exponential(x, now, before, tau), now
        flow.report(i, tau, x)
    return x.to(flow.dtype)


@torch.no_grad()
def unipc(
    velocity: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    *,
    interpolant: str | Interpolant = "linear",
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
    noise: Noise = None,
    callback: Callback | None = None,
    **conditioning: Any,
) -> Tensor:
    """UniPC of order 2 (UniP-2 and UniC-2 with B(h) = e^h - 1, Zhao et al. 2023): third order, one evaluation a step.

    Arguments as for `euler`. The predictor is the step of DPM-Solver++ 2M; the evaluation at its end then corrects it.
    The last step, and the one that lands in the low-variance region, have no evaluation left and stay predicted.
    """
    flow = _Flow(velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning)
    x, before, earlier = x.to(flow.work), None, None
    for i, t, tau in flow.steps():
        v = flow(x, t)
        if flow.in_low_region(t):
            x = flow.closed_form(x, v, t, tau)
        else:
            now = flow.point(x, v, t)
            if before is not None:
                x = _unipc_correct(flow, x, now, before, earlier)
            x, before, earlier = flow.exponential(x, now, before, tau), now, before
        flow.report(i, tau, x)
    return x.to(flow.dtype)


def _unipc_correct(flow: _Flow, x: Tensor, now: _Point, before: _Point, earlier: _Point | None) -> Tensor:
    """UniC: x at `now`, as predicted from `before` and `earlier`, corrected with what the model says at x."""
    h = now.log_snr - before.log_snr
    b = now.alpha * math.expm1(-h)
    if earlier is None:
        return flow.combine(x, 1.0, now.x0, -0.5 * b, before.x0, 0.5 * b)
    r = (earlier.log_snr - before.log_snr) / h  # negative
    first = (math.expm1(-h) / -h - 1.0) / math.expm1(-h)
    second = 2.0 * ((math.expm1(-h) / -h - 1.0) / -h - 0.5) / math.expm1(-h)
    rho = (first - second) / (1.0 - r)  # of the difference with `earlier`; the predictor took 1/2 of it
    back, ahead = b * (0.5 - rho) / r, b * (first - rho)
    x = flow.combine(x, 1.0, now.x0, -ahead, before.x0, ahead - back)
    return flow.combine(x, 1.0, earlier.x0, back)


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "euler_maruyama": euler_maruyama,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
}


def _get_solver(solver: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    expect(callable(solver) or solver in SOLVERS, "solver", f"one of {sorted(SOLVERS)} or a function", solver)
    return solver if callable(solver) else SOLVERS[solver]


def sample(
    velocity: Velocity,
    x: Tensor,
    *,
    solver: str | Callable[..., Tensor] = "euler",
    steps: int = 30,
    grid: str | Callable[[int], Tensor] = "uniform",
    interpolant: str | Interpolant = "linear",
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
    generator: Noise = None,
    callback: Callback | None = None,
    **conditioning: Any,
) -> Tensor:
    """Sample with a named solver on a named grid: time_grid, then the solver; see both for the arguments.

    Args:
        x: (N, *S) standard normal, e.g. standard_normal(torch.empty(N, *S), seeds) for a list of N seeds.
        generator: the solver's noise (see standard_normal and step_noise).
    """
    times = time_grid(steps, grid, stable, interpolant)
    options = {"interpolant": interpolant, "stable": stable, "guidance": guidance, "noise": generator}
    return _get_solver(solver)(velocity, x, times, callback=callback, **options, **conditioning)


def nfe(
    times: Tensor | Sequence[float],
    solver: str | Callable[..., Tensor] = "euler",
    *,
    stable: StableVS | None = None,
    guidance: Guidance | None = None,
) -> int:
    """Velocity evaluations per sample, a guided call counting two: counted in a dry run of the solver on one number."""
    rows = 0

    def count(x: Tensor, t: Tensor) -> Tensor:
        nonlocal rows
        rows += x.shape[0]
        return torch.zeros_like(x)

    guidance = guidance and replace(guidance, uncond={})
    _get_solver(solver)(count, torch.zeros(1, 1), times, stable=stable, guidance=guidance, noise=torch.zeros_like)
    return rows

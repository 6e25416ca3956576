"""Samplers: from noise (t = 1) to data (t = 0) along a velocity field, each one short function with one signature.

    times = time_grid(30, stable=stable)
    x = euler(velocity, x, times, interpolant="linear", stable=stable, guidance=Guidance(4.0, uncond={"y": null}), y=y)

`velocity(x, t, **conditioning)` is any callable, x (N, *S), t (N,). A step that starts at or below `stable.split` is
the closed form of StableVS (arXiv 2602.05435); above it the solver runs unchanged. All decisions are made on Python
floats of the time grid, so nothing here waits for the device; updates are svel::affine_step and svel::stablevs_step.

A new solver is one more function below and its name in SOLVERS; a new grid is one function and its name in GRIDS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stablevelocity_kernels import affine_step, clamp_time

from .interpolants import Interpolant, get_interpolant

Velocity = Callable[..., Tensor]
Noise = torch.Generator | Sequence[torch.Generator] | Callable[[Tensor], Tensor] | None
Callback = Callable[[int, int, float, Tensor], None]
Velocities = tuple[Tensor, Tensor | None]  # conditional, and unconditional where guidance is active


def _expect(ok: bool, arg: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{arg}: expected {expected}, got {got!r}")


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


@dataclass(frozen=True)
class StableVS:
    """The low-variance region and how it is sampled.

    On "linear" with noise_factor 0 the closed form is Euler's step: what one gets is Euler on a thinner grid, and what
    one saves is the model calls. On other paths it is exact for a fixed E[x_0 | x_t], which Euler is not.

    Args:
        split: a step that starts at t <= split is the closed-form step; in [0, 1).
        low_steps: how many steps the region gets (fewer where the base grid has fewer); 0 turns StableVS off.
        noise_factor: f in beta = f sigma_tau, the noise of a step to tau; in [0, 1], 0 is deterministic.
        grid: "total": `steps` is the number of steps that run, the base grid is grown to make it so. "official": the
            base grid has `steps` steps and is thinned, so that fewer run.
    """

    split: float = 0.85
    low_steps: int = 9
    noise_factor: float = 0.0
    grid: str = "total"

    def __post_init__(self) -> None:
        _expect(0.0 <= self.split < 1.0, "split", "a number in [0, 1)", self.split)
        _expect(_is_count(self.low_steps, 0), "low_steps", "an integer of at least 0", self.low_steps)
        _expect(0.0 <= self.noise_factor <= 1.0, "noise_factor", "a number in [0, 1]", self.noise_factor)
        _expect(self.grid in ("total", "official"), "grid", "'total' or 'official'", self.grid)

    def covers(self, t: float) -> bool:
        """Whether a step that starts at t is a StableVS step."""
        return self.low_steps > 0 and t <= self.split


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
        _expect(math.isfinite(self.scale), "scale", "a finite number", self.scale)
        ordered = 0.0 <= self.low <= self.high <= 1.0
        _expect(ordered, "low, high", "times with 0 <= low <= high <= 1", (self.low, self.high))

    def active(self, t: float) -> bool:
        """Whether the unconditional half is run at time t."""
        return self.scale != 1.0 and self.low <= t <= self.high

    def batch(self, conditioning: dict[str, Any], rows: int) -> dict[str, Any]:
        """Conditioning of the batched call: tensors of N rows are joined along them, anything else must be shared."""
        unknown = sorted(self.uncond.keys() - conditioning.keys())
        _expect(not unknown, "uncond", f"names among {sorted(conditioning)}", unknown)
        return {name: self._join(name, value, rows) for name, value in conditioning.items()}

    def _join(self, name: str, cond: Any, rows: int) -> Any:
        uncond = self.uncond.get(name, cond)
        if isinstance(cond, Tensor) and cond.dim() and cond.shape[0] == rows:
            same = isinstance(uncond, Tensor) and uncond.shape == cond.shape
            got = tuple(uncond.shape) if isinstance(uncond, Tensor) else uncond
            _expect(same, f"uncond[{name!r}]", f"a tensor of shape {tuple(cond.shape)}", got)
            return torch.cat([cond, uncond])
        shared = uncond is cond or (not isinstance(cond, Tensor) and not isinstance(uncond, Tensor) and uncond == cond)
        _expect(shared, f"uncond[{name!r}]", "the conditional value, because it is no tensor of N rows", uncond)
        return cond


def uniform_grid(steps: int) -> Tensor:
    """steps + 1 times from 1 to 0, evenly spaced, float64: exactly i / steps, so that 17/20 is the 0.85 of a split."""
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


GRIDS: dict[str, Callable[[int], Tensor]] = {"uniform": uniform_grid}


def thin(times: Tensor, split: float, low_steps: int) -> Tensor:
    """Replace the steps of a time grid that start at or below `split` by `low_steps` of them, evenly picked.

    The first of them is kept: it is where the last step above the split lands. The picks are those of the paper's code,
    round(linspace(0, L - 2, low_steps)) of L starts, wherever these differ from one another. With L <= low_steps the
    grid comes back unchanged.

    Args:
        times: (n + 1,) strictly decreasing, the last is the end of the last step.
    """
    starts, end = times[:-1], times[-1:]
    high, low = starts[starts > split], starts[starts <= split]
    if len(low) <= low_steps:
        return times
    last = max(low_steps - 1, len(low) - 2)
    picks = [round(i * last / max(low_steps - 1, 1)) for i in range(low_steps)]
    return torch.cat([high, low[picks], end])


def grow(base: Callable[[int], Tensor], steps: int, split: float, low_steps: int) -> Tensor:
    """The thinned grid of `steps` steps: base(n) for the smallest n >= steps that thins to them.

    Raises:
        ValueError: if base has no such grid up to n = 10,000 (its steps above the split must grow one by one with n).
    """
    n, times = steps, thin(base(steps), split, low_steps)
    while len(times) - 1 < steps and n < 10_000:
        n += steps - (len(times) - 1)  # one more base step adds at most one step, so this cannot overshoot
        times = thin(base(n), split, low_steps)
    _expect(len(times) - 1 == steps, "kind", f"a grid that can be thinned to {steps} steps", f"{len(times) - 1} steps")
    return times


def time_grid(steps: int, kind: str | Callable[[int], Tensor] = "uniform", stable: StableVS | None = None) -> Tensor:
    """The times of a sampler: 1-d float64 on the CPU, strictly decreasing from noise (1) to data (0).

    Args:
        steps: at least 1; see StableVS.grid for what it counts.
        kind: a name in GRIDS, or a function of a number of steps that returns that many plus one times.
        stable: thin the low-variance region; None or low_steps = 0 gives the base grid itself.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _expect(_is_count(steps, 1), "steps", "an integer of at least 1", steps)
    _expect(callable(kind) or kind in GRIDS, "kind", f"one of {sorted(GRIDS)} or a function", kind)
    base = kind if callable(kind) else GRIDS[kind]
    if stable is None or stable.low_steps == 0:
        times = base(steps)
    elif stable.grid == "official":
        times = thin(base(steps), stable.split, stable.low_steps)
    else:
        times = grow(base, steps, stable.split, stable.low_steps)
    return torch.tensor(_host_times(times), dtype=torch.float64)


def _host_times(times: Tensor | Sequence[float]) -> list[float]:
    """A time grid as Python floats; a tensor must be on the CPU, reading it elsewhere would wait for the device."""
    if isinstance(times, Tensor):
        _expect(times.device.type == "cpu" and times.dim() == 1, "times", "a 1-d CPU tensor", times)
    times = [float(t) for t in times]
    falling = all(a > b for a, b in pairwise(times))
    ok = len(times) >= 2 and falling and times[0] <= 1.0 and times[-1] >= 0.0
    _expect(ok, "times", "at least two strictly decreasing times in [0, 1]", times)
    return times


def standard_normal(like: Tensor, noise: Noise = None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of `like`.

    Args:
        like: (N, *S).
        noise: None for torch's global stream; a generator, on any device; a list of N generators, one a sample, so that
            a sample does not depend on the batch it is in; or a function of `like`.
    """
    if noise is None:
        return torch.randn_like(like)
    if isinstance(noise, torch.Generator):
        return torch.randn(like.shape, generator=noise, device=noise.device, dtype=like.dtype).to(like.device)
    if callable(noise):
        return noise(like)
    _expect(len(noise) == like.shape[0], "noise", f"{like.shape[0]} generators, one a sample", f"{len(noise)}")
    return torch.stack([standard_normal(row, generator) for row, generator in zip(like, noise, strict=True)])


class _Flow:
    """One sampling run: what all solvers share, in terms of Python-float times and the state x (N, *S).

    The state is float32 (float64 for a float64 sample); the model gets the dtype the caller's sample has.
    """

    def __init__(self, velocity, x, times, interpolant, stable, guidance, noise, callback, conditioning):
        self.velocity, self.conditioning = velocity, conditioning
        self.interpolant: Interpolant = get_interpolant(interpolant)
        self.stable, self.guidance, self.noise, self.callback = stable, guidance, noise, callback
        self.times, self.dtype = _host_times(times), x.dtype
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
        noise: see standard_normal; used by Euler-Maruyama, and by StableVS with a noise factor.
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
            _expect(w >= 0.0, "diffusion", f"a w(t) of at least 0 at t = {t}", w)
            x = flow.move(x, v, 1.0 - h * w * score_x, h * (1.0 - w * score_v), math.sqrt(-2.0 * w * h))
        flow.report(i, tau, x)
    return x.to(flow.dtype)


def _score_coefficients(interpolant: Interpolant, t: float) -> tuple[float, float, float]:
    """(a, b, sigma) with score = a x + b v: -(x - alpha x0) / sigma^2 at x0 = (v - (sigma'/sigma) x) / x0_factor."""
    c = interpolant.coefficients(clamp_time(torch.tensor(t, dtype=torch.float64)))
    alpha, sigma, x_factor, x0_factor = (float(value) for value in (c.alpha, c.sigma, c.x_factor, c.x0_factor))
    return -(1.0 + alpha * x_factor / x0_factor) / sigma**2, alpha / (sigma**2 * x0_factor), sigma


SOLVERS: dict[str, Callable[..., Tensor]] = {"euler": euler, "heun": heun, "euler_maruyama": euler_maruyama}


def _get_solver(solver: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    _expect(callable(solver) or solver in SOLVERS, "solver", f"one of {sorted(SOLVERS)} or a function", solver)
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
        x: (N, *S) standard normal, e.g. standard_normal(torch.empty(N, *S), generator).
        generator: the solver's noise (see standard_normal).
    """
    times = time_grid(steps, grid, stable)
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

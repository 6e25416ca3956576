"""Time grids of the samplers, and the thinning of the low-variance region: from noise (t = 1) to data (t = 0).

A new grid is one function below and its name in GRIDS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .interpolants import Interpolant, get_interpolant
from .variance import Split, fixed_split


def expect(ok: bool, arg: str, expected: str, got: object) -> None:
    """Raises ValueError that names the argument unless `ok`."""
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
        split: a step that starts at t <= split is the closed-form step; in [0, 1). Also a `Split`, or the path of a
            variance.json, which become their number.
        low_steps: how many steps the region gets (fewer where the base grid has fewer); 0 turns StableVS off.
        noise_factor: f in beta = f sigma_tau, the noise of a step to tau; in [0, 1], 0 is deterministic.
        grid: "total": `steps` is the number of steps that run, the base grid is grown to make it so. "official": the
            base grid has `steps` steps and is thinned, so that fewer run.
    """

    split: float | str | os.PathLike | Split = 0.85
    low_steps: int = 9
    noise_factor: float = 0.0
    grid: str = "total"

    def __post_init__(self) -> None:
        if not isinstance(self.split, (int, float)):
            object.__setattr__(self, "split", fixed_split(self.split, "split"))
        expect(0.0 <= self.split < 1.0, "split", "a number in [0, 1)", self.split)
        expect(_is_count(self.low_steps, 0), "low_steps", "an integer of at least 0", self.low_steps)
        expect(0.0 <= self.noise_factor <= 1.0, "noise_factor", "a number in [0, 1]", self.noise_factor)
        expect(self.grid in ("total", "official"), "grid", "'total' or 'official'", self.grid)

    def covers(self, t: float) -> bool:
        """Whether a step that starts at t is a StableVS step."""
        return self.low_steps > 0 and t <= self.split

    def times(self, base: Callable[[int], Tensor], steps: int) -> Tensor:
        """The grid that runs when `steps` steps of the base grid base(n) -> (n + 1,) are asked for; see `grid`."""
        if self.low_steps == 0:
            return base(steps)
        if self.grid == "official":
            return thin(base(steps), self.split, self.low_steps)
        return grow(base, steps, self.split, self.low_steps)


def uniform_grid(steps: int) -> Tensor:
    """steps + 1 times from 1 to 0, evenly spaced, float64: exactly i / steps, so that 17/20 is the 0.85 of a split."""
    return torch.arange(steps, -1, -1, dtype=torch.float64) / steps


def shifted_grid(steps: int, shift: float = 3.0) -> Tensor:
    """The uniform grid under t -> shift t / (1 + (shift - 1) t), which for shift > 1 spends more steps near the noise.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2; 3 is that model's shift. 1 is the uniform grid.
    """
    expect(shift > 0.0, "shift", "a number above 0", shift)
    t = uniform_grid(steps)
    return shift * t / (1.0 + (shift - 1.0) * t)


def edm_grid(
    steps: int,
    interpolant: str | Interpolant = "linear",
    *,
    noise_min: float = 0.002,
    noise_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """The noise levels of EDM as times of a path: the t at which sigma / alpha is each level.

    Levels are (noise_max^(1/rho) + i/(steps-1) (noise_min^(1/rho) - noise_max^(1/rho)))^rho, then 0 (Karras et al.
    2022, equation 5), except that the first time is 1, where x is the noise alone.
    """
    ramp = torch.linspace(0.0, 1.0, steps, dtype=torch.float64)
    levels = (noise_max ** (1 / rho) + ramp * (noise_min ** (1 / rho) - noise_max ** (1 / rho))) ** rho
    low, high = torch.zeros_like(levels), torch.ones_like(levels)
    for _ in range(60):  # sigma / alpha grows with t, so halving an interval finds any interpolant's t
        middle = (low + high) / 2
        at = get_interpolant(interpolant).coefficients(middle)
        below = at.sigma < levels * at.alpha
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.cat([torch.ones(1).double(), low[1:], torch.zeros(1).double()])


# Each makes a grid from the number of steps and the interpolant.
GRIDS: dict[str, Callable[[int, str | Interpolant], Tensor]] = {
    "uniform": lambda steps, interpolant: uniform_grid(steps),
    "shifted": lambda steps, interpolant: shifted_grid(steps),
    "edm": edm_grid,
}


def kept_steps(times: Tensor, split: float, low_steps: int) -> list[int]:
    """Which steps of a time grid stay when those that start at or below `split` are thinned to `low_steps` of them.

    The picks are even. The first is kept: it is where the last step above the split lands. They are those of the
    paper's code, round(linspace(0, L - 2, low_steps)) of L starts, wherever these differ from one another. With
    L <= low_steps all stay.

    Args:
        times: (n + 1,) strictly decreasing, the last is the end of the last step.

    Returns:
        Increasing indices of starts, from 0 to n - 1.
    """
    steps, high = len(times) - 1, int((times[:-1] > split).sum())
    low = steps - high
    if low <= low_steps:
        return list(range(steps))
    last = max(low_steps - 1, low - 2)
    return [*range(high), *(high + round(i * last / max(low_steps - 1, 1)) for i in range(low_steps))]


def thin(times: Tensor, split: float, low_steps: int) -> Tensor:
    """The times of the steps that `kept_steps` keeps, and the end."""
    return times[[*kept_steps(times, split, low_steps), -1]]


def grow(base: Callable[[int], Tensor], steps: int, split: float, low_steps: int) -> Tensor:
    """The thinned grid of `steps` steps: base(n) for the smallest n >= steps that thins to them, the last n tried.

    Raises:
        ValueError: if base has no such grid up to n = 10,000 (its steps above the split must grow one by one with n).
    """
    n, times = steps, thin(base(steps), split, low_steps)
    while len(times) - 1 < steps and n < 10_000:
        n += steps - (len(times) - 1)  # one more base step adds at most one step, so this cannot overshoot
        times = thin(base(n), split, low_steps)
    expect(len(times) - 1 == steps, "kind", f"a grid that can be thinned to {steps} steps", f"{len(times) - 1} steps")
    return times


def time_grid(
    steps: int,
    kind: str | Callable[[int], Tensor] = "uniform",
    stable: StableVS | None = None,
    interpolant: str | Interpolant = "linear",
) -> Tensor:
    """The times of a sampler: 1-d float64 on the CPU, strictly decreasing from noise (1) to data (0).

    Args:
        steps: at least 1; see StableVS.grid for what it counts.
        kind: a name in GRIDS, or a function of a number of steps that returns that many plus one times.
        stable: thin the low-variance region; None or low_steps = 0 gives the base grid itself.
        interpolant: the path, which "edm" needs.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    expect(_is_count(steps, 1), "steps", "an integer of at least 1", steps)
    expect(callable(kind) or kind in GRIDS, "kind", f"one of {sorted(GRIDS)} or a function", kind)

    def base(n: int) -> Tensor:
        return kind(n) if callable(kind) else GRIDS[kind](n, interpolant)

    times = stable.times(base, steps) if stable else base(steps)
    return torch.tensor(host_times(times), dtype=torch.float64)


def host_times(times: Tensor | Sequence[float]) -> list[float]:
    """A time grid as Python floats; a tensor must be on the CPU, reading it elsewhere would wait for the device."""
    if isinstance(times, Tensor):
        expect(times.device.type == "cpu" and times.dim() == 1, "times", "a 1-d CPU tensor", times)
    times = [float(t) for t in times]
    falling = all(a > b for a, b in pairwise(times))
    ok = len(times) >= 2 and falling and times[0] <= 1.0 and times[-1] >= 0.0
    expect(ok, "times", "at least two strictly decreasing times in [0, 1]", times)
    return times

"""How training times are drawn: t = 0 is data, t = 1 is noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TimeSampler = Callable[[int, torch.device, torch.Generator | None], Tensor]  # (n, device, generator) -> (n,) float32


def uniform_times(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """(n,) float32, uniform in [0, 1)."""
    return torch.rand(n, device=device, generator=generator)


def lognormal_times(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """A sampler whose noise-to-signal ratio t / (1 - t) is log-normal, that is t = sigmoid(mean + std * normal)."""

    def sampler(n: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        return torch.sigmoid(mean + std * torch.randn(n, device=device, generator=generator))

    return sampler


TIME_SAMPLERS: dict[str, TimeSampler] = {"uniform": uniform_times, "lognormal": lognormal_times()}


def get_time_sampler(times: str | TimeSampler) -> TimeSampler:
    """A time sampler from its name ("uniform" or "lognormal"), or the callable itself.

    Raises:
        ValueError: for anything else.
    """
    if callable(times):
        return times
    if times not in TIME_SAMPLERS:
        raise ValueError(f"times: expected one of {tuple(TIME_SAMPLERS)} or a callable, got {times!r}")
    return TIME_SAMPLERS[times]

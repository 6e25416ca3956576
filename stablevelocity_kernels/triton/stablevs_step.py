"""Triton version of svel::stablevs_step: the coefficients of the closed form, then the kernel of svel::affine_step."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import _checks
from ..paths import path_coefficients, stablevs_coefficients
from .affine_step import affine_step


def stablevs_step(
    sample: Tensor,
    velocity: Tensor,
    t: Tensor,
    tau: Tensor,
    velocity_uncond: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    noise_factor: float = 0.0,
    path: str = "linear",
) -> Tensor:
    """See stablevelocity_kernels.stablevs_step."""
    _checks.check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path)
    a, b, c = stablevs_coefficients(partial(path_coefficients, path), t, tau, noise_factor)
    if noise_factor == 0.0:
        c = noise = None
    return affine_step(sample, velocity, a, b, c, velocity_uncond, noise, guidance_scale=guidance_scale)

"""Reference of svel::stablevs_step: the coefficients of the closed form, then svel::affine_step."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ..paths import PATHS, clamp_time, path_coefficients, stablevs_coefficients
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
    op = "stablevs_step"
    _checks.check_step(op, sample, {"velocity": velocity, "velocity_uncond": velocity_uncond, "noise": noise})
    _checks.check_step_scalar(op, "t", t, sample)
    _checks.check_step_scalar(op, "tau", tau, sample)
    _checks.check_choice(op, "path", path, PATHS)
    if not 0.0 <= noise_factor <= 1.0:
        _checks.fail(op, "noise_factor", "a number in [0, 1]", noise_factor)
    if noise_factor > 0.0 and noise is None:
        _checks.fail(op, "noise", f"a tensor because noise_factor = {noise_factor}", None)
    now, after = (
        path_coefficients(path, clamp_time(t.double())),
        path_coefficients(path, tau.double().clamp(0.0, 1.0)),
    )
    a, b, c = stablevs_coefficients(now, after.alpha, after.sigma, noise_factor)
    if noise_factor == 0.0:
        c = noise = None
    return affine_step(sample, velocity, a, b, c, velocity_uncond, noise, guidance_scale=guidance_scale)

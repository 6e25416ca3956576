"""svel::stablevs_step — the closed-form step of a named path, with guidance, noise and the cast, in one launch."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .. import _checks, reference
from ._register import define, eager

SCHEMA = (
    "stablevs_step(Tensor sample, Tensor velocity, Tensor t, Tensor tau, Tensor? velocity_uncond=None, "
    "Tensor? noise=None, *, float guidance_scale=1.0, float noise_factor=0.0, str path='linear') -> Tensor"
)


def _fake(
    sample,
    velocity,
    t,
    tau,
    velocity_uncond=None,
    noise=None,
    *,
    guidance_scale=1.0,
    noise_factor=0.0,
    path="linear",
):
    _checks.check_stablevs_step(sample, velocity, t, tau, velocity_uncond, noise, noise_factor, path)
    return sample.new_empty(sample.shape)


_OP = define(SCHEMA, fake=_fake, reference=reference.stablevs_step)
_EAGER = eager(_OP)


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
    """One closed-form step from time t to tau < t in the low-variance region (paper, StableVS).

    With x0_hat = (v - (sigma'/sigma) x) / (alpha' - sigma' alpha / sigma), beta = noise_factor * sigma_tau and
    s = sqrt(sigma_tau^2 - beta^2) / sigma_t, returns s x + (alpha_tau - s alpha_t) x0_hat + beta noise. With
    noise_factor 0 it is the exact probability-flow solution for a fixed x0_hat; on "linear" that is x + (tau - t) v.
    tau = 0 gives x0_hat.

    Args:
        sample: (N, *S) at time t; float16, bfloat16, float32 or float64.
        velocity, velocity_uncond, noise: (N, *S), any of the same dtypes. With velocity_uncond, v = velocity_uncond +
            guidance_scale (velocity - velocity_uncond); noise is standard normal, needed when noise_factor > 0.
        t, tau: (N,) or 0-d, float32 or float64, 0 at the data and 1 at the noise. t is clamped to [1e-5, 1 - 1e-5],
            tau to [0, 1].
        noise_factor: beta / sigma_tau in [0, 1].
        path: "linear" or "cosine"; for another interpolant use `affine_step`.

    Returns:
        (N, *S) of sample's dtype; arithmetic is in float32 (float64 for a float64 sample).

    Not differentiable: backward through it warns and stops there. (A backward that raises, as the targets have, costs
    more host time than the rest of a small call.)

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    op = _OP if is_dynamo_compiling() else _EAGER
    # Every keyword handed on is looked up: most of a microsecond for two.
    if noise_factor == 0.0 and path == "linear":
        if velocity_uncond is None:  # the scale is not used
            return op(sample, velocity, t, tau, None, noise)
        return op(sample, velocity, t, tau, velocity_uncond, noise, guidance_scale=guidance_scale)
    return op(
        sample,
        velocity,
        t,
        tau,
        velocity_uncond,
        noise,
        guidance_scale=guidance_scale,
        noise_factor=noise_factor,
        path=path,
    )

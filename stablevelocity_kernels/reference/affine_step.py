"""Reference of svel::affine_step."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks


def affine_step(
    sample: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
) -> Tensor:
    """See stablevelocity_kernels.affine_step."""
    _checks.check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise)
    work = torch.float64 if sample.dtype == torch.float64 else torch.float32

    def rows(scalar: Tensor) -> Tensor:
        return scalar.to(work).reshape(-1, *[1] * (sample.dim() - 1))

    v = velocity.to(work)
    if velocity_uncond is not None:
        u = velocity_uncond.to(work)
        v = u + guidance_scale * (v - u)
    out = rows(a) * sample.to(work) + rows(b) * v
    if c is not None:
        out = out + rows(c) * noise.to(work)
    return out.to(sample.dtype)

"""Reference of svel::conditional_target_."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..paths import clamp_time, conditional_coefficients, path_coefficients


def conditional_target_(
    target: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    t_set: Tensor,
    *,
    path: str = "linear",
    prediction: str = "velocity",
) -> None:
    """See stablevelocity_kernels.conditional_target_."""
    _checks.check_conditional_target(target, x0, noise, t, t_set, path, prediction)
    work = torch.float64 if target.dtype == torch.float64 else torch.float32

    def rows(scalar: Tensor) -> Tensor:
        return scalar.reshape(-1, *[1] * (target.dim() - 1))

    a, b = conditional_coefficients(prediction, path_coefficients(path, clamp_time(t.double())))
    value = rows(a.to(work)) * x0.to(work) + rows(b.to(work)) * noise.to(work)
    target.copy_(torch.where(rows(t_set.isnan() & ~t.isnan()), value.to(target.dtype), target))

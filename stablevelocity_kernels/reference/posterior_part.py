"""Reference of svel::posterior_part, in float64 whatever comes in."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .posterior_mean import posterior_mean_float64


def posterior_part(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:
    """See stablevelocity_kernels.posterior_part."""
    _checks.check_posterior_part(x, refs, alpha, sigma, labels, counts, precision)
    if labels is not None:
        _checks.check_labels_in_range("posterior_part", labels, refs.shape[0], -1)
    mean, lse = posterior_mean_float64(x, refs, alpha, sigma, labels, counts)
    return mean.to(torch.float64 if x.dtype == torch.float64 else torch.float32), lse

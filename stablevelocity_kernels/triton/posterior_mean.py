"""Triton version of svel::posterior_mean."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ._posterior import posterior


def posterior_mean(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    source: Tensor | None = None,
    *,
    precision: str = "exact",
    null_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """See stablevelocity_kernels.posterior_mean; "fast" computes the same as "exact"."""
    _checks.check_posterior_mean(x, refs, alpha, sigma, labels, counts, source, precision)
    if labels is not None:
        _checks.check_labels_in_range("posterior_mean", labels, refs.shape[0], -1)
    alpha, sigma = alpha.double().contiguous(), sigma.double().contiguous()
    a, b = torch.zeros_like(alpha), torch.ones_like(alpha)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return posterior(x, refs, alpha, sigma, a, b, labels, counts, source, dtype, dtype)

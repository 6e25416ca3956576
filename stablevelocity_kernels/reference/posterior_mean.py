"""Reference of svel::posterior_mean, in float64 whatever comes in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks

_CHUNK_ELEMENTS = 1 << 24  # references are taken to float64 this many values at a time


def _merge(mean: Tensor, lse: Tensor, mean_new: Tensor, lse_new: Tensor) -> tuple[Tensor, Tensor]:
    """Two results over disjoint references, weighted by their shares of the total. mean (n, D), lse (n,)."""
    lse_total = torch.logaddexp(lse, lse_new)
    share = torch.exp(lse_new - lse_total)
    return mean + share[:, None] * (mean_new - mean), lse_total


def _over_set(x: Tensor, refs: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """One pass of n rows over one set of m references, in chunks. x (n, D), refs (m, D), alpha and sigma (n, 1)."""
    mean, lse = torch.zeros_like(x), x.new_full(x.shape[:1], -math.inf)
    step = max(1, _CHUNK_ELEMENTS // max(1, refs.shape[1]))
    for chunk in refs.split(step):
        r = chunk.to(x.dtype)
        centre = r.mean(0)
        y, d = x - alpha * centre, r - centre  # |x - alpha r|^2 = |y|^2 - 2 alpha y.d + alpha^2 |d|^2
        distance = (y * y).sum(1, keepdim=True) - 2 * alpha * (y @ d.T) + alpha**2 * (d * d).sum(1)
        logits = (sigma**2 * x.shape[1] - distance) / (2 * sigma**2)
        mean, lse = _merge(mean, lse, torch.softmax(logits, 1) @ r, torch.logsumexp(logits, 1))
    return mean, lse


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
    """See stablevelocity_kernels.posterior_mean; computed in float64, and returned in float64 only for float64 x."""
    _checks.check_posterior_mean(x, refs, alpha, sigma, labels, counts, source, precision)
    if labels is not None:
        _checks.check_labels_in_range("posterior_mean", labels, refs.shape[0], -1)
    out_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, lse = posterior_mean_float64(x, refs, alpha, sigma, labels, counts, source)
    return mean.to(out_dtype), lse.to(out_dtype)


def posterior_mean_float64(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    source: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mean (N, *S) and lse (N,) in float64, for arguments that are already checked."""
    n = x.shape[0]
    rows = x.reshape(n, math.prod(x.shape[1:])).double()
    a, s = alpha.double()[:, None], sigma.double()[:, None]
    if labels is None:
        refs, labels = refs[None], torch.zeros(n, dtype=torch.int64, device=x.device)
    refs = refs.reshape(refs.shape[0], refs.shape[1], rows.shape[1])
    valid = [refs.shape[1]] * refs.shape[0] if counts is None else counts.clamp(0, refs.shape[1]).tolist()

    mean, lse = torch.zeros_like(rows), rows.new_full((n,), -math.inf)
    for group in range(refs.shape[0]):
        mine = ((labels == group) | (labels == -1)).nonzero()[:, 0]
        if len(mine) and valid[group]:
            part = _over_set(rows[mine], refs[group, : valid[group]], a[mine], s[mine])
            mean[mine], lse[mine] = _merge(mean[mine], lse[mine], *part)
    finite = torch.isfinite(rows).all(1)
    if source is not None:
        own = source.reshape(rows.shape).double()
        logit = (s[:, 0] ** 2 * rows.shape[1] - ((rows - a * own) ** 2).sum(1)) / (2 * s[:, 0] ** 2)
        mean, lse = _merge(mean, lse, own, logit)
        finite = finite & torch.isfinite(own).all(1)

    stray = (labels < -1) | (labels >= refs.shape[0])  # possible on CUDA only, where no label is read on the host
    broken = stray | lse.isneginf() | ~finite | ~torch.isfinite(lse)
    mean = mean.masked_fill(broken[:, None], math.nan)
    return mean.reshape(x.shape), lse.masked_fill(broken, math.nan)

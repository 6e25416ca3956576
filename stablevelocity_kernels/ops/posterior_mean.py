"""svel::posterior_mean — the one primitive: E[x_0 | x_t] under a reference set (paper, StableVM; spec section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define, refuse_gradient

SCHEMA = (
    "posterior_mean(Tensor x, Tensor refs, Tensor alpha, Tensor sigma, Tensor? labels=None, Tensor? counts=None, "
    "Tensor? source=None, *, str precision='exact', bool null_rows=False) -> (Tensor mean, Tensor lse)"
)


def _fake(x, refs, alpha, sigma, labels=None, counts=None, source=None, *, precision="exact", null_rows=False):
    _checks.check_posterior_mean(x, refs, alpha, sigma, labels, counts, source, precision)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=dtype)


define(SCHEMA, fake=_fake, reference=reference.posterior_mean)
refuse_gradient("posterior_mean")


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
    """Posterior mean of the clean sample given a noisy one, over a finite set of references.

    For a row x and references r_1..r_M: w = softmax_j(-|x - alpha r_j|^2 / (2 sigma^2)), mean = sum_j w_j r_j.

    Args:
        x: (N, *S) noisy samples; float16, bfloat16, float32 or float64.
        refs: (M, *S), shared by all rows, or (K, M, *S) groups with `labels`; any of the same dtypes.
        alpha, sigma: (N,) float32 (float64 allowed beside a float64 x): the interpolant at each row's time.
        labels: (N,) int64, the group of each row; -1 means all valid references of all groups.
        counts: (K,), or (1,) without labels; int32 or int64: how many leading references of each group are valid.
        source: (N, *S), one more reference for its own row alone; dtype of x or of refs.
        precision: "exact" (2e-6 against float64) or "fast" (1e-3 allowed).
        null_rows: rows of label -1 are to be expected. They come to the same either way, but on CUDA, beside a class
            bank of float16, 32 of them then read it together, at the cost of a few launches; otherwise every few of
            them do.

    Returns:
        mean (N, *S) and lse (N,), float32 (float64 for float64 x). With logit_j = -(|x - alpha r_j|^2 - sigma^2 D) /
        (2 sigma^2), lse is log sum_j exp(logit_j): two results over disjoint references merge exactly as
        softmax([lse_1, lse_2]) @ [mean_1, mean_2]. A row whose set is empty, or with NaN or Inf in its inputs, is NaN.
        Rows with NaN in alpha or sigma are not computed at all and cost nothing.

    Raises:
        RuntimeError: naming the argument, what was expected and what came. On CPU also for a label out of range; on
            CUDA such a row is NaN.
    """
    return torch.ops.svel.posterior_mean(
        x, refs, alpha, sigma, labels, counts, source, precision=precision, null_rows=null_rows
    )

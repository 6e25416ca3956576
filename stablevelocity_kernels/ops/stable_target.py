"""svel::stable_target — the StableVM training target: the posterior mean turned into a prediction, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define, refuse_gradient

SCHEMA = (
    "stable_target(Tensor x, Tensor refs, Tensor t, Tensor? labels=None, Tensor? counts=None, Tensor? source=None, *, "
    "str path='linear', str prediction='velocity', str precision='exact', bool null_rows=False) -> Tensor"
)


def _fake(
    x,
    refs,
    t,
    labels=None,
    counts=None,
    source=None,
    *,
    path="linear",
    prediction="velocity",
    precision="exact",
    null_rows=False,
):
    _checks.check_stable_target(x, refs, t, labels, counts, source, path, prediction, precision)
    return x.new_empty(x.shape)


define(SCHEMA, fake=_fake, reference=reference.stable_target)
refuse_gradient("stable_target")


def stable_target(
    x: Tensor,
    refs: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    source: Tensor | None = None,
    *,
    path: str = "linear",
    prediction: str = "velocity",
    precision: str = "exact",
    null_rows: bool = False,
) -> Tensor:
    """StableVM target of each noisy sample over its reference set (paper, StableVM: the self-normalised estimator).

    With m the posterior mean (see `posterior_mean`): velocity = (sigma'/sigma) x + (alpha' - sigma' alpha / sigma) m,
    x0 = m, noise = (x - alpha m) / sigma, score = -(x - alpha m) / sigma^2.

    Args:
        x: (N, *S) noisy samples x_t; float16, bfloat16, float32 or float64.
        refs: (M, *S), shared by all rows, or (K, M, *S) groups with `labels`; any of the same dtypes.
        t: (N,) float32 (float64 allowed beside a float64 x), 0 at the data and 1 at the noise, clamped to
            [1e-5, 1 - 1e-5]. A row with t = NaN is not computed: it costs nothing and comes back NaN.
        labels: (N,) int64, the group of each row; -1 means all valid references of all groups.
        counts: (K,), or (1,) without labels; int32 or int64: how many leading references of each group are valid.
        source: (N, *S), one more reference for its own row alone; dtype of x or of refs.
        path: "linear" or "cosine"; for another interpolant use `posterior_mean`.
        prediction: "velocity", "x0", "noise" or "score".
        precision: "exact" (2e-6 against float64) or "fast" (1e-3 allowed).
        null_rows: rows of label -1 are to be expected. They come to the same either way, but on CUDA, beside a class
            bank of float16, 32 of them then read it together, at the cost of a few launches; otherwise every few of
            them do.

    Returns:
        (N, *S) of x's dtype. A row whose set is empty, or with NaN or Inf in its inputs, is NaN.

    Raises:
        RuntimeError: naming the argument, what was expected and what came. On CPU also for a label out of range; on
            CUDA such a row is NaN.
    """
    return torch.ops.svel.stable_target(
        x,
        refs,
        t,
        labels,
        counts,
        source,
        path=path,
        prediction=prediction,
        precision=precision,
        null_rows=null_rows,
    )

"""Triton version of svel::stable_target."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ..paths import clamp_time, path_coefficients, prediction_coefficients
from ._posterior import posterior


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
    """See stablevelocity_kernels.stable_target; "fast" computes the same as "exact"."""
    _checks.check_stable_target(x, refs, t, labels, counts, source, path, prediction, precision)
    if labels is not None:
        _checks.check_labels_in_range("stable_target", labels, refs.shape[0], -1)
    at = path_coefficients(path, clamp_time(t.double().contiguous()))
    a, b = prediction_coefficients(prediction, at)
    return posterior(x, refs, at.alpha, at.sigma, a, b, labels, counts, source, x.dtype, at.alpha.dtype)[0]

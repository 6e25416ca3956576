"""Reference of svel::stable_target, in float64 whatever comes in."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ..paths import clamp_time, path_coefficients, prediction_coefficients
from .posterior_mean import posterior_mean_float64


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
    """See stablevelocity_kernels.stable_target."""
    _checks.check_stable_target(x, refs, t, labels, counts, source, path, prediction, precision)
    if labels is not None:
        _checks.check_labels_in_range("stable_target", labels, refs.shape[0], -1)
    at = path_coefficients(path, clamp_time(t.double()))
    mean, _ = posterior_mean_float64(x, refs, at.alpha, at.sigma, labels, counts, source)
    a, b = (c.reshape(-1, *[1] * (x.dim() - 1)) for c in prediction_coefficients(prediction, at))
    return (a * x.double() + b * mean).to(x.dtype)

"""svel::conditional_target_ — the target of conditional flow matching in the rows that a reference set left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define

SCHEMA = (
    "conditional_target_(Tensor(a!) target, Tensor x0, Tensor noise, Tensor t, Tensor t_set, *, "
    "str path='linear', str prediction='velocity') -> ()"
)


def _fake(target, x0, noise, t, t_set, *, path="linear", prediction="velocity"):
    _checks.check_conditional_target(target, x0, noise, t, t_set, path, prediction)


define(SCHEMA, fake=_fake, reference=reference.conditional_target_)


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
    """Write the prediction for the one x_0 and noise of a row into the rows where t_set is NaN and t is not.

    velocity = alpha' x0 + sigma' noise; x0 = x0; noise = noise; score = -noise / sigma. Formed from x_0 and noise, it
    has no cancellation as t goes to 0. Other rows are neither read nor written.

    Args:
        target: (N, *S), changed in place; float16, bfloat16, float32 or float64.
        x0, noise: (N, *S), any of the same dtypes.
        t: (N,) float32 or float64, 0 at the data and 1 at the noise, clamped to [1e-5, 1 - 1e-5].
        t_set: (N,) float32 or float64: the times that stable_target was given, NaN in the rows it was to skip.
        path: "linear" or "cosine".
        prediction: "velocity", "x0", "noise" or "score".

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    torch.ops.svel.conditional_target_(target, x0, noise, t, t_set, path=path, prediction=prediction)

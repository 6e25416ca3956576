"""svel::bank_draw — a reference for each row, drawn uniformly from its group, and the noisy sample made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define

SCHEMA = (
    "bank_draw(Tensor refs, Tensor counts, Tensor u, Tensor? labels=None, Tensor? fallback=None, Tensor? noise=None, "
    "Tensor? t=None, *, str path='linear', float t_min=0.0) -> (Tensor x0, Tensor slot, Tensor x_t, Tensor t_set)"
)


def _fake(refs, counts, u, labels=None, fallback=None, noise=None, t=None, *, path="linear", t_min=0.0):
    _checks.check_bank_draw(refs, counts, u, labels, fallback, noise, t, path)
    n, work = u.shape[0], torch.float64 if refs.dtype == torch.float64 else torch.float32
    shape = (n, *refs.shape[2:])
    return (
        refs.new_empty(shape, dtype=work),
        refs.new_empty((n,), dtype=torch.int64),
        refs.new_empty((0,) if t is None else shape, dtype=work),
        refs.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty((n,)),
    )


define(SCHEMA, fake=_fake, reference=reference.bank_draw)


def bank_draw(
    refs: Tensor,
    counts: Tensor,
    u: Tensor,
    labels: Tensor | None = None,
    fallback: Tensor | None = None,
    noise: Tensor | None = None,
    t: Tensor | None = None,
    *,
    path: str = "linear",
    t_min: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x_0 from the valid references of each row's group, and x_t = alpha x_0 + sigma noise (paper, StableVM).

    Row i takes the valid reference number floor(u_i c) of the c that its group has; the references of all groups, for
    label -1, are numbered one group after the other. The random numbers come from the caller: the op itself is
    deterministic.

    Args:
        refs: (K, M, *S) float16, bfloat16, float32 or float64.
        counts: (K,) int32 or int64: how many leading references of each group are valid.
        u: (N,) float64 or float32 in [0, 1); what lies outside counts as the nearest number inside.
        labels: (N,) int64, the group of each row; -1 means all valid references of all groups. None where K is 1.
        fallback: (N, *S), any of the dtypes of refs: x_0 of the rows whose group is empty.
        noise: (N, *S), any of the dtypes of refs; together with t.
        t: (N,) float32 or float64, 0 at the data and 1 at the noise; not clamped, so that t = 0 gives x_0.
        path: "linear" or "cosine".
        t_min: rows below it do not take the target over the set, see t_set; compared in the dtype of t.

    Returns:
        x0 (N, *S), float32 (float64 from float64 refs); NaN where the group is empty and there is no fallback.
        slot (N,) int64: which row of refs.flatten(0, 1) x0 is; -1 where the group is empty.
        x_t (N, *S) of x0's dtype, and t_set (N,) of t's: t where x0 is a reference and t >= t_min, else NaN, which
        tells stable_target to leave the row out and conditional_target_ to fill it. Both (0,) without noise and t.

    Raises:
        RuntimeError: naming the argument, what was expected and what came. On CPU also for a label out of range; on
            CUDA such a row is NaN, with or without a fallback, and its slot -1.
    """
    return torch.ops.svel.bank_draw(refs, counts, u, labels, fallback, noise, t, path=path, t_min=t_min)

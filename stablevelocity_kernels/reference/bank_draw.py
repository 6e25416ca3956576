"""Reference of svel::bank_draw, without a host synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from ..paths import path_coefficients


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
    """See stablevelocity_kernels.bank_draw."""
    _checks.check_bank_draw(refs, counts, u, labels, fallback, noise, t, path)
    groups, capacity = refs.shape[:2]
    if labels is None:
        labels = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
    _checks.check_labels_in_range("bank_draw", labels, groups, -1)
    work = torch.float64 if refs.dtype == torch.float64 else torch.float32
    shape = (u.shape[0], *refs.shape[2:])

    def rows(scalar: Tensor) -> Tensor:
        return scalar.reshape(-1, *[1] * (len(shape) - 1))

    known = (labels >= -1) & (labels < groups)
    slot = torch.full_like(labels, -1)
    x0 = torch.full(shape, math.nan, dtype=work, device=refs.device)
    if groups and capacity:
        slot = torch.where(known, _slots(counts.long().clamp(0, capacity), capacity, u, labels), -1)
        x0 = torch.where(rows(slot >= 0), refs.flatten(0, 1)[slot.clamp_min(0)].to(work), x0)
    if fallback is not None:
        x0 = torch.where(rows(known & (slot < 0)), fallback.to(work), x0)
    if t is None:
        return x0, slot, x0.new_empty(0), x0.new_empty(0, dtype=torch.float32)
    at = path_coefficients(path, t.double())
    x_t = rows(at.alpha.to(work)) * x0 + rows(at.sigma.to(work)) * noise.to(work)
    return x0, slot, x_t, t.masked_fill((slot < 0) | (t < t_min), math.nan)


def _slots(counts: Tensor, capacity: int, u: Tensor, labels: Tensor) -> Tensor:
    """Rows of refs.flatten(0, 1) that u (N,) picks, -1 from an empty group; labels out of range count as group 0.

    The valid references of all groups are numbered one group after the other.
    """
    ends = counts.cumsum(0)
    everything, group = labels == -1, labels.masked_fill((labels < 0) | (labels >= len(counts)), 0)
    count = torch.where(everything, ends[-1], counts[group])
    first = torch.where(everything, 0, (ends - counts)[group])
    # u < 1, but u * count may round up to count
    number = first + torch.minimum((u.double().clamp(0, 1) * count).long(), count - 1).clamp_min(0)
    ring = torch.searchsorted(ends, number, right=True).clamp_max(len(counts) - 1)
    return torch.where(count > 0, ring * capacity + number - (ends - counts)[ring], -1)

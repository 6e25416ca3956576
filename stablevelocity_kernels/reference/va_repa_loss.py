"""Reference of svel::va_repa_loss and of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

MIN_NORM = 1e-8
MIN_WEIGHT_SUM = 1e-8


def va_repa_loss(projected: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """See stablevelocity_kernels.va_repa_loss; plain torch operations, so autograd differentiates it to any order."""
    _checks.check_va_repa("va_repa_loss", projected, teacher, weight)
    work = torch.float64 if projected.dtype == torch.float64 else torch.float32
    p, z, w = projected.to(work), teacher.to(work), weight.to(work)
    cosine = (p * z).sum(-1) / (p.norm(dim=-1).clamp_min(MIN_NORM) * z.norm(dim=-1).clamp_min(MIN_NORM))
    total = w.sum()
    loss = -(w * cosine.mean(1)).sum() / total.clamp_min(MIN_WEIGHT_SUM)
    return torch.where(total < MIN_WEIGHT_SUM, torch.zeros_like(loss), loss)


def va_repa_loss_backward(grad: Tensor, projected: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to projected, (B, T, C) of its dtype: d cos / d p = (z_hat - cos p_hat) / |p|."""
    _checks.check_va_repa("va_repa_loss_backward", projected, teacher, weight)
    work = torch.float64 if projected.dtype == torch.float64 else torch.float32
    p, z, w = projected.to(work), teacher.to(work), weight.to(work)
    p_norm = p.norm(dim=-1, keepdim=True)
    z_hat = z / z.norm(dim=-1, keepdim=True).clamp_min(MIN_NORM)
    p_hat = p / p_norm.clamp_min(MIN_NORM)
    cosine = (p_hat * z_hat).sum(-1, keepdim=True)
    along = torch.where(p_norm > MIN_NORM, cosine * p_hat, torch.zeros_like(p))  # |p| is constant where it is clamped
    total = w.sum()
    scale = torch.where(total < MIN_WEIGHT_SUM, torch.zeros_like(w), -w * grad.to(work) / (total * p.shape[1]))
    return (scale[:, None, None] * (z_hat - along) / p_norm.clamp_min(MIN_NORM)).to(projected.dtype)

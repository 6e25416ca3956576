"""Triton version of svel::va_repa_loss and of its gradient: one pass over the tokens each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._launch import on_device_of, power_of_two

MIN_NORM = tl.constexpr(1e-8)
MIN_WEIGHT_SUM = 1e-8


@dataclass(frozen=True)
class Tiles:
    """Channels of one token that a program handles at a time."""

    block_c: int
    num_warps: int


def tiles_for(c: int) -> Tiles:
    """Usual teachers have 768 to 1536 channels: one block, whose second reading in the gradient comes from the L1."""
    block_c = min(2048, max(16, power_of_two(c)))
    return Tiles(block_c, 4 if block_c >= 512 else 1)


SUM_BLOCK = 1024  # tokens that the one program of the second stage adds at a time, eight a thread


@triton.jit
def _products(p_ptr, z_ptr, c, BLOCK_C: tl.constexpr, WORK: tl.constexpr):
    """p.z, |p|, |z| of one token, the norms not clamped; p_ptr and z_ptr point at its first channel."""
    pz = tl.full((), 0.0, tl.float64)
    pp = tl.full((), 0.0, tl.float64)
    zz = tl.full((), 0.0, tl.float64)
    for low in range(0, c, BLOCK_C):
        cols = low + tl.arange(0, BLOCK_C)
        p = tl.load(p_ptr + cols, mask=cols < c, other=0.0).to(WORK)
        z = tl.load(z_ptr + cols, mask=cols < c, other=0.0).to(WORK)
        pz += tl.sum(p * z, axis=0).to(tl.float64)
        pp += tl.sum(p * p, axis=0).to(tl.float64)
        zz += tl.sum(z * z, axis=0).to(tl.float64)
    return pz, tl.sqrt(pp), tl.sqrt(zz)


@triton.jit
def _cosines(p_ptr, z_ptr, cosine_ptr, c, BLOCK_C: tl.constexpr, WORK: tl.constexpr):
    """Grid B T. p, z (B T, C); cosine (B T,) float64 out."""
    token = tl.program_id(0).to(tl.int64)
    pz, p_norm, z_norm = _products(p_ptr + token * c, z_ptr + token * c, c, BLOCK_C, WORK)
    tl.store(cosine_ptr + token, pz / (tl.maximum(p_norm, MIN_NORM) * tl.maximum(z_norm, MIN_NORM)))


@triton.jit
def _weighted_mean(cosine_ptr, scale_ptr, loss_ptr, tokens, t, BLOCK: tl.constexpr):
    """One program, in a fixed order: sum of scale_i cos_it. cosine (B T,), scale (B,) float64; loss () out."""
    acc = tl.zeros((BLOCK,), tl.float64)
    for low in range(0, tokens, BLOCK):
        at = low + tl.arange(0, BLOCK)
        mask = at < tokens
        acc += tl.load(scale_ptr + at // t, mask=mask, other=0.0) * tl.load(cosine_ptr + at, mask=mask, other=0.0)
    tl.store(loss_ptr, tl.sum(acc, axis=0).to(loss_ptr.dtype.element_ty))


@triton.jit
def _gradient(p_ptr, z_ptr, scale_ptr, out_ptr, t, c, BLOCK_C: tl.constexpr, WORK: tl.constexpr):
    """Grid B T: scale_i d cos / d p = scale_i (z_hat - cos p_hat) / |p|. scale (B,) float64; out (B T, C)."""
    token = tl.program_id(0).to(tl.int64)
    pz, p_norm, z_norm = _products(p_ptr + token * c, z_ptr + token * c, c, BLOCK_C, WORK)
    p_bound = tl.maximum(p_norm, MIN_NORM)
    of_z = tl.load(scale_ptr + token // t) / (p_bound * tl.maximum(z_norm, MIN_NORM))
    of_p = tl.where(p_norm > MIN_NORM, of_z * pz / (p_bound * p_bound), 0.0)  # |p| is constant where it is clamped
    for low in range(0, c, BLOCK_C):
        cols = token * c + low + tl.arange(0, BLOCK_C)
        mask = low + tl.arange(0, BLOCK_C) < c
        p = tl.load(p_ptr + cols, mask=mask, other=0.0).to(WORK)
        z = tl.load(z_ptr + cols, mask=mask, other=0.0).to(WORK)
        out = of_z.to(WORK) * z - of_p.to(WORK) * p
        tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def _scale(weight: Tensor, tokens: int) -> Tensor:
    """What each sample's cosines are multiplied by, (B,) float64: -w_i / (T sum w), zero where the sum is too small."""
    w = weight.double()
    total = w.sum()
    return torch.where(total < MIN_WEIGHT_SUM, torch.zeros_like(w), -w / (total * tokens))


def va_repa_loss(projected: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """See stablevelocity_kernels.va_repa_loss."""
    _checks.check_va_repa("va_repa_loss", projected, teacher, weight)
    batch, t, c = projected.shape
    double = projected.dtype == torch.float64
    loss = projected.new_zeros((), dtype=torch.float64 if double else torch.float32)
    if batch * t == 0:
        return loss
    cosine = projected.new_empty(batch * t, dtype=torch.float64)
    scale = _scale(weight, t)
    tiles = tiles_for(c)
    with on_device_of(projected):
        _cosines[(batch * t,)](
            *(projected.contiguous(), teacher.contiguous(), cosine, c),
            BLOCK_C=tiles.block_c,
            WORK=tl.float64 if double else tl.float32,
            num_warps=tiles.num_warps,
        )
        _weighted_mean[(1,)](cosine, scale, loss, batch * t, t, BLOCK=SUM_BLOCK, num_warps=4)
    return loss


def va_repa_loss_backward(grad: Tensor, projected: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Gradient with respect to projected, (B, T, C) of its dtype; the cosines are computed again, not stored."""
    _checks.check_va_repa("va_repa_loss_backward", projected, teacher, weight)
    batch, t, c = projected.shape
    out = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    if out.numel() == 0:
        return out
    scale = _scale(weight, t) * grad.double()
    tiles = tiles_for(c)
    with on_device_of(projected):
        _gradient[(batch * t,)](
            *(projected.contiguous(), teacher.contiguous(), scale, out, t, c),
            BLOCK_C=tiles.block_c,
            WORK=tl.float64 if projected.dtype == torch.float64 else tl.float32,
            num_warps=tiles.num_warps,
        )
    return out

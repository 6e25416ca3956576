"""Triton version of svel::affine_step: one elementwise kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._launch import cdiv, on_device_of, power_of_two


@dataclass(frozen=True)
class Tiles:
    """Rows x values of D that one program handles."""

    rows: int
    block_d: int
    num_warps: int


def tiles_for(d: int) -> Tiles:
    """1024 values a program are eight a thread, enough loads in flight; short rows share a program."""
    block_d = min(1024, power_of_two(d))
    return Tiles(1024 // block_d, block_d, 4)


@triton.jit
def _affine_step(
    sample_ptr,  # (N, D)
    velocity_ptr,  # (N, D)
    uncond_ptr,  # (N, D)
    noise_ptr,  # (N, D)
    a_ptr,  # (N,), or one value with step 0
    b_ptr,
    c_ptr,
    out_ptr,  # (N, D) out
    a_step,
    b_step,
    c_step,
    scale_ptr,  # (1,) float64
    n,
    d,
    blocks,
    HAS_UNCOND: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid cdiv(N, ROWS) x blocks."""
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_n = rows < n
    mask = in_n[:, None] & (cols < d)[None, :]
    at = rows[:, None] * d + cols[None, :]
    a = tl.load(a_ptr + rows * a_step, mask=in_n, other=0.0).to(WORK)
    b = tl.load(b_ptr + rows * b_step, mask=in_n, other=0.0).to(WORK)
    v = tl.load(velocity_ptr + at, mask=mask, other=0.0).to(WORK)
    if HAS_UNCOND:
        u = tl.load(uncond_ptr + at, mask=mask, other=0.0).to(WORK)
        v = u + tl.load(scale_ptr).to(WORK) * (v - u)
    out = a[:, None] * tl.load(sample_ptr + at, mask=mask, other=0.0).to(WORK) + b[:, None] * v
    if HAS_NOISE:
        c = tl.load(c_ptr + rows * c_step, mask=in_n, other=0.0).to(WORK)
        out += c[:, None] * tl.load(noise_ptr + at, mask=mask, other=0.0).to(WORK)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def affine_step(
    sample: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    velocity_uncond: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
) -> Tensor:
    """See stablevelocity_kernels.affine_step."""
    _checks.check_affine_step(sample, velocity, a, b, c, velocity_uncond, noise)
    out = torch.empty(sample.shape, dtype=sample.dtype, device=sample.device)
    if out.numel() == 0:
        return out
    n, d = sample.shape[0], math.prod(sample.shape[1:])
    tiles = tiles_for(d)
    blocks = cdiv(d, tiles.block_d)
    sample, velocity = sample.contiguous(), velocity.contiguous()
    uncond = sample if velocity_uncond is None else velocity_uncond.contiguous()
    coefficients = (a, b, a if c is None else c)
    # A tensor filled on the device, because Triton would pass a Python float in float32.
    scale = torch.full((1,), guidance_scale, dtype=torch.float64, device=sample.device)
    with on_device_of(sample):
        _affine_step[(cdiv(n, tiles.rows) * blocks,)](
            *(sample, velocity, uncond, sample if noise is None else noise.contiguous(), *coefficients, out),
            *(k.stride(0) if k.dim() else 0 for k in coefficients),
            *(scale, n, d, blocks),
            HAS_UNCOND=velocity_uncond is not None,
            HAS_NOISE=noise is not None,
            ROWS=tiles.rows,
            BLOCK_D=tiles.block_d,
            WORK=tl.float64 if sample.dtype == torch.float64 else tl.float32,
            num_warps=tiles.num_warps,
        )
    return out

"""Triton version of svel::conditional_target_: one elementwise kernel, in which the other rows end at once."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..paths import clamp_time, conditional_coefficients, path_coefficients
from ._launch import cdiv, on_device_of, rounded

BLOCK_D = 1024  # eight values a thread


@triton.jit
def _fill(
    target_ptr,  # (N, D) changed
    x0_ptr,  # (N, D)
    noise_ptr,  # (N, D)
    t_ptr,  # (N,)
    t_set_ptr,  # (N,)
    a_ptr,  # (N,) float64
    b_ptr,  # (N,) float64
    d,
    blocks,
    BLOCK_D: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid N x blocks."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    t, t_set = tl.load(t_ptr + row), tl.load(t_set_ptr + row)
    if (t_set != t_set) & (t == t):
        cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        at = row * d + cols
        x0 = tl.load(x0_ptr + at, mask=cols < d, other=0.0).to(WORK)
        noise = tl.load(noise_ptr + at, mask=cols < d, other=0.0).to(WORK)
        value = tl.load(a_ptr + row).to(WORK) * x0 + tl.load(b_ptr + row).to(WORK) * noise
        tl.store(target_ptr + at, rounded(value, target_ptr), mask=cols < d)


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
    """See stablevelocity_kernels.conditional_target_."""
    _checks.check_conditional_target(target, x0, noise, t, t_set, path, prediction)
    if target.numel() == 0:
        return
    n, d = target.shape[0], math.prod(target.shape[1:])
    blocks = cdiv(d, BLOCK_D)
    a, b = conditional_coefficients(prediction, path_coefficients(path, clamp_time(t.double())))
    with on_device_of(target):
        _fill[(n * blocks,)](
            *(target, x0.contiguous(), noise.contiguous(), t.contiguous(), t_set.contiguous()),
            *(a.contiguous(), b.contiguous(), d, blocks),
            BLOCK_D=BLOCK_D,
            WORK=tl.float64 if target.dtype == torch.float64 else tl.float32,
            num_warps=4,
        )

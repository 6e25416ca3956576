"""Triton version of svel::bank_draw: each program finds the slot of its row, then makes its part of the row."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..paths import path_coefficients
from ._launch import cdiv, on_device_of


@dataclass(frozen=True)
class Tiles:
    """Values of D that one program makes; counts that a row with label -1 sums at a time."""

    block_d: int
    groups: int


TILES = Tiles(1024, 1024)  # eight values a thread


@triton.jit
def _valid(counts_ptr, group, capacity, mask):
    count = tl.load(counts_ptr + group, mask=mask, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(count, 0), capacity)


@triton.jit
def _pick(u, count):
    """Which of `count` references the number u of [0, 1) means."""
    number = u * count.to(tl.float64)
    inside = (number > 0.0) & (number < count.to(tl.float64))
    return tl.where(inside, tl.where(inside, number, 0.0).to(tl.int64), tl.where(number > 0.0, count - 1, 0))


@triton.jit
def _draw(
    refs_ptr,  # (K, M, D)
    counts_ptr,  # (K,)
    u_ptr,  # (N,)
    labels_ptr,  # (N,)
    fallback_ptr,  # (N, D)
    noise_ptr,  # (N, D)
    alpha_ptr,  # (N,) float64
    sigma_ptr,  # (N,) float64
    x0_ptr,  # (N, D) out
    slot_ptr,  # (N,) out
    x_t_ptr,  # (N, D) out
    groups,
    capacity,
    d,
    blocks,
    HAS_LABELS: tl.constexpr,
    HAS_FALLBACK: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
    WORK: tl.constexpr,
):
    """Grid N x blocks."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    u = tl.load(u_ptr + row).to(tl.float64)
    label = row * 0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
    known = (label >= -1) & (label < groups)
    group, number, count = label, row * 0, row * 0
    if label == -1:  # all groups: the references numbered one group after the other
        for low in range(0, groups, GROUPS):
            each = low + tl.arange(0, GROUPS)
            count += tl.sum(_valid(counts_ptr, each, capacity, each < groups))
        chosen = _pick(u, count)
        group, number, running = row * 0, chosen, row * 0
        for low in range(0, groups, GROUPS):
            each = low + tl.arange(0, GROUPS)
            valid = _valid(counts_ptr, each, capacity, each < groups)
            passed = (running + tl.cumsum(valid) <= chosen) & (each < groups)
            group += tl.sum(passed.to(tl.int64))
            number -= tl.sum(tl.where(passed, valid, 0))
            running += tl.sum(valid)
    else:
        count = _valid(counts_ptr, label, capacity, known)
        number = _pick(u, count)
    slot = tl.where(count > 0, group * capacity + number, -1)
    if block == 0:
        tl.store(slot_ptr + row, slot)

    cols = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < d
    drawn = cols < tl.where(slot >= 0, d, 0)
    x = tl.load(refs_ptr + slot * d + cols, mask=drawn, other=float("nan")).to(WORK)
    if HAS_FALLBACK:  # a label out of range does not take it: it is an error that shows as NaN
        own = cols < tl.where(known & (slot < 0), d, 0)
        x = tl.where(own, tl.load(fallback_ptr + row * d + cols, mask=own, other=0.0).to(WORK), x)
    tl.store(x0_ptr + row * d + cols, x, mask=inside)
    if HAS_NOISE:
        alpha, sigma = tl.load(alpha_ptr + row).to(WORK), tl.load(sigma_ptr + row).to(WORK)
        noise = tl.load(noise_ptr + row * d + cols, mask=inside, other=0.0).to(WORK)
        tl.store(x_t_ptr + row * d + cols, alpha * x + sigma * noise, mask=inside)


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
    groups, capacity, n = refs.shape[0], refs.shape[1], u.shape[0]
    if labels is not None:
        _checks.check_labels_in_range("bank_draw", labels, groups, -1)
    double = refs.dtype == torch.float64
    x0 = refs.new_empty((n, *refs.shape[2:]), dtype=torch.float64 if double else torch.float32)
    slot = refs.new_empty((n,), dtype=torch.int64)
    x_t = x0.new_empty(0) if t is None else torch.empty_like(x0)
    if n > 0:
        d = math.prod(refs.shape[2:])
        blocks = max(1, cdiv(d, TILES.block_d))
        alpha = sigma = u
        if t is not None:
            alpha, sigma, *_ = path_coefficients(path, t.double())
        with on_device_of(refs):
            _draw[(n * blocks,)](
                *(refs.contiguous(), counts.contiguous(), u.contiguous()),
                *(slot if labels is None else labels.contiguous(), x0 if fallback is None else fallback.contiguous()),
                *(x0 if noise is None else noise.contiguous(), alpha.contiguous(), sigma.contiguous()),
                *(x0, slot, x_t, groups, capacity, d, blocks),
                HAS_LABELS=labels is not None,
                HAS_FALLBACK=fallback is not None,
                HAS_NOISE=noise is not None,
                BLOCK_D=TILES.block_d,
                GROUPS=TILES.groups,
                WORK=tl.float64 if double else tl.float32,
                num_warps=4,
            )
    if t is None:
        return x0, slot, x_t, x0.new_empty(0, dtype=torch.float32)
    return x0, slot, x_t, t.masked_fill((slot < 0) | (t < t_min), math.nan).contiguous()

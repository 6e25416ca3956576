"""Triton version of svel::bank_push_: rank every row among its label's, then write the rows that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ._launch import cdiv, on_device_of, rounded


@dataclass(frozen=True)
class Tiles:
    """rows x others of the comparison of labels; values of D that one program copies."""

    rows: int
    others: int
    block_d: int


TILES = Tiles(64, 64, 1024)  # 32 comparisons a thread at a time; eight values copied a thread

NOT_WRITTEN = tl.constexpr(-1)


@triton.jit
def _rank(
    labels_ptr,  # (N,)
    heads_ptr,  # (K,)
    slot_ptr,  # (N,) out: where the row goes, or NOT_WRITTEN because its label is out of range or it is overwritten
    pushed_ptr,  # (N,) out: rows of this label in the batch, at the last of them; 0 at the others
    n,
    groups,
    capacity,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Grid cdiv(N, ROWS): earlier and later rows of the same label, which give the slot in the order of the batch."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    label = tl.load(labels_ptr + rows, mask=rows < n, other=-1)
    known = (label >= 0) & (label < groups)
    earlier = tl.zeros((ROWS,), tl.int64)
    later = tl.zeros((ROWS,), tl.int64)
    for low in range(0, n, OTHERS):
        others = low + tl.arange(0, OTHERS)
        other = tl.load(labels_ptr + others, mask=others < n, other=-1)
        same = label[:, None] == other[None, :]
        earlier += tl.sum((same & (others[None, :] < rows[:, None])).to(tl.int64), axis=1)
        later += tl.sum((same & (others[None, :] > rows[:, None])).to(tl.int64), axis=1)
    head = tl.load(heads_ptr + label, mask=known, other=0).to(tl.int64)
    slot = tl.where(known & (later < capacity), (head + earlier) % capacity, NOT_WRITTEN)
    tl.store(slot_ptr + rows, slot, mask=rows < n)
    tl.store(pushed_ptr + rows, tl.where(known & (later == 0), earlier + 1, 0), mask=rows < n)


@triton.jit
def _write(
    refs_ptr,  # (K, M, D) changed
    counts_ptr,  # (K,) changed
    heads_ptr,  # (K,) changed
    values_ptr,  # (N, D)
    labels_ptr,  # (N,)
    slot_ptr,  # (N,)
    pushed_ptr,  # (N,)
    capacity,
    d,
    blocks,
    BLOCK_D: tl.constexpr,
):
    """Grid N x blocks: copy a row to its slot; the last row of a label moves its head and count."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    slot = tl.load(slot_ptr + row)
    if slot != NOT_WRITTEN:
        label = tl.load(labels_ptr + row)
        cols = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        value = tl.load(values_ptr + row * d + cols, mask=cols < d)
        target = refs_ptr + (label * capacity + slot) * d + cols
        tl.store(target, rounded(value, refs_ptr), mask=cols < d)
        pushed = tl.load(pushed_ptr + row)
        if (block == 0) & (pushed > 0):
            count = tl.minimum(tl.load(counts_ptr + label).to(tl.int64) + pushed, capacity)
            tl.store(heads_ptr + label, ((slot + 1) % capacity).to(heads_ptr.dtype.element_ty))
            tl.store(counts_ptr + label, count.to(counts_ptr.dtype.element_ty))


def bank_push_(refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor) -> None:
    """See stablevelocity_kernels.bank_push_."""
    _checks.check_bank_push(refs, counts, heads, values, labels)
    _checks.check_labels_in_range("bank_push_", labels, refs.shape[0], 0)
    groups, capacity, n = refs.shape[0], refs.shape[1], labels.shape[0]
    if n == 0 or groups * capacity == 0:
        return
    d = math.prod(refs.shape[2:])
    blocks = max(1, cdiv(d, TILES.block_d))
    labels = labels.contiguous()
    slot, pushed = torch.empty_like(labels), torch.empty_like(labels)
    with on_device_of(refs):
        _rank[(cdiv(n, TILES.rows),)](
            *(labels, heads, slot, pushed, n, groups, capacity), ROWS=TILES.rows, OTHERS=TILES.others, num_warps=4
        )
        _write[(n * blocks,)](
            *(refs, counts, heads, values.contiguous(), labels, slot, pushed, capacity, d, blocks),
            BLOCK_D=TILES.block_d,
            num_warps=4,
        )

"""Triton version of svel::bank_push_: rank every row among its label's, then write the rows that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
def _ring(labels_ptr, pushes, n, groups, label_groups, mask):
    """The ring of each push, or -1: push i < n goes to its label's, the n after them to the last one."""
    label = tl.load(labels_ptr + pushes, mask=mask & (pushes < n), other=-1)
    known = (label >= 0) & (label < label_groups)
    return tl.where(pushes < n, tl.where(known, label, -1), tl.where(mask, groups - 1, -1))


@triton.jit
def _rank(
    labels_ptr,  # (N,)
    heads_ptr,  # (K,)
    slot_ptr,  # (pushes,) out: where the row goes, or NOT_WRITTEN: its label is out of range or it is overwritten
    pushed_ptr,  # (pushes,) out: pushes to this ring in the call, at the last of them; 0 at the others
    n,
    pushes,
    groups,
    label_groups,
    capacity,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Grid cdiv(pushes, ROWS): earlier and later pushes to the same ring, which give the slot in order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ring = _ring(labels_ptr, rows, n, groups, label_groups, rows < pushes)
    earlier = tl.zeros((ROWS,), tl.int64)
    later = tl.zeros((ROWS,), tl.int64)
    for low in range(0, pushes, OTHERS):
        others = low + tl.arange(0, OTHERS)
        other = _ring(labels_ptr, others, n, groups, label_groups, others < pushes)
        same = ring[:, None] == other[None, :]
        earlier += tl.sum((same & (others[None, :] < rows[:, None])).to(tl.int64), axis=1)
        later += tl.sum((same & (others[None, :] > rows[:, None])).to(tl.int64), axis=1)
    head = tl.load(heads_ptr + ring, mask=ring >= 0, other=0).to(tl.int64)
    slot = tl.where((ring >= 0) & (later < capacity), (head + earlier) % capacity, NOT_WRITTEN)
    tl.store(slot_ptr + rows, slot, mask=rows < pushes)
    tl.store(pushed_ptr + rows, tl.where((ring >= 0) & (later == 0), earlier + 1, 0), mask=rows < pushes)


@triton.jit
def _write(
    refs_ptr,  # (K, M, D) changed
    counts_ptr,  # (K,) changed
    heads_ptr,  # (K,) changed
    values_ptr,  # (N, D)
    labels_ptr,  # (N,)
    slot_ptr,  # (pushes,)
    pushed_ptr,  # (pushes,)
    n,
    groups,
    capacity,
    d,
    blocks,
    BLOCK_D: tl.constexpr,
):
    """Grid pushes x blocks: copy a row to its slot; the last push to a ring moves its head and count."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    slot = tl.load(slot_ptr + row)
    if slot != NOT_WRITTEN:
        label = tl.load(labels_ptr + row % n)
        ring = tl.where(row < n, label, groups - 1)
        cols = block.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        value = tl.load(values_ptr + row % n * d + cols, mask=cols < d)
        target = refs_ptr + (ring * capacity + slot) * d + cols
        tl.store(target, rounded(value, refs_ptr), mask=cols < d)
        pushed = tl.load(pushed_ptr + row)
        if (block == 0) & (pushed > 0):
            count = tl.minimum(tl.load(counts_ptr + ring).to(tl.int64) + pushed, capacity)
            tl.store(heads_ptr + ring, ((slot + 1) % capacity).to(heads_ptr.dtype.element_ty))
            tl.store(counts_ptr + ring, count.to(counts_ptr.dtype.element_ty))


def bank_push_(
    refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor, *, all_to_last: bool = False
) -> None:
    """See stablevelocity_kernels.bank_push_."""
    _checks.check_bank_push(refs, counts, heads, values, labels, all_to_last)
    groups, capacity, n = refs.shape[0], refs.shape[1], labels.shape[0]
    label_groups = groups - all_to_last
    _checks.check_labels_in_range("bank_push_", labels, label_groups, 0)
    if n == 0 or groups * capacity == 0:
        return
    pushes = 2 * n if all_to_last else n
    d = math.prod(refs.shape[2:])
    blocks = max(1, cdiv(d, TILES.block_d))
    labels = labels.contiguous()
    slot, pushed = labels.new_empty(pushes), labels.new_empty(pushes)
    with on_device_of(refs):
        _rank[(cdiv(pushes, TILES.rows),)](
            *(labels, heads, slot, pushed, n, pushes, groups, label_groups, capacity),
            ROWS=TILES.rows,
            OTHERS=TILES.others,
            num_warps=4,
        )
        _write[(pushes * blocks,)](
            *(refs, counts, heads, values.contiguous(), labels, slot, pushed, n, groups, capacity, d, blocks),
            BLOCK_D=TILES.block_d,
            num_warps=4,
        )

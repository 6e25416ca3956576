"""svel::bank_push_ — push rows into the per-class FIFO rings of a reference bank, in place and in order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define

SCHEMA = "bank_push_(Tensor(a!) refs, Tensor(b!) counts, Tensor(c!) heads, Tensor values, Tensor labels) -> ()"


def _fake(refs, counts, heads, values, labels):
    _checks.check_bank_push(refs, counts, heads, values, labels)


define(SCHEMA, fake=_fake, reference=reference.bank_push_)


def bank_push_(refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor) -> None:
    """Write each row of `values` into the ring of its label; the same as pushing the rows one by one, in order.

    For each row: refs[y, heads[y]] = value; heads[y] = (heads[y] + 1) % M; counts[y] = min(counts[y] + 1, M).

    Args:
        refs: (K, M, *S), changed in place; float16, bfloat16, float32, float64, or int64 (for dataset indices).
        counts, heads: (K,), changed in place; both int32 or both int64. counts: valid references per group; heads: the
            slot that is written next.
        values: (N, *S), cast to the dtype of refs; int64 exactly when refs is.
        labels: (N,) int64 in [0, K).

    Raises:
        RuntimeError: naming the argument, what was expected and what came. On CPU also for a label out of range; on
            CUDA such a row is skipped.
    """
    torch.ops.svel.bank_push_(refs, counts, heads, values, labels)

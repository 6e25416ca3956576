"""svel::bank_push_ — push rows into the per-class FIFO rings of a reference bank, in place and in order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define

SCHEMA = (
    "bank_push_(Tensor(a!) refs, Tensor(b!) counts, Tensor(c!) heads, Tensor values, Tensor labels, *, "
    "bool all_to_last=False) -> ()"
)


def _fake(refs, counts, heads, values, labels, *, all_to_last=False):
    _checks.check_bank_push(refs, counts, heads, values, labels, all_to_last)


define(SCHEMA, fake=_fake, reference=reference.bank_push_)


def bank_push_(
    refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor, *, all_to_last: bool = False
) -> None:
    """Write each row of `values` into the ring of its label; the same as pushing the rows one by one, in order.

    For each row: refs[y, heads[y]] = value; heads[y] = (heads[y] + 1) % M; counts[y] = min(counts[y] + 1, M).

    Args:
        refs: (K, M, *S), changed in place; float16, bfloat16, float32, float64, or int64 (for dataset indices).
        counts, heads: (K,), changed in place; both int32 or both int64. counts: valid references per group; heads: the
            slot that is written next.
        values: (N, *S), cast to the dtype of refs; int64 exactly when refs is.
        labels: (N,) int64 in [0, K); with all_to_last in [0, K - 1).
        all_to_last: push every row into the last group too, after all rows have gone to their own: a ring of the most
            recent samples of any label, in the same call.

    Raises:
        RuntimeError: naming the argument, what was expected and what came. On CPU also for a label out of range; on
            CUDA such a row is skipped (but not in the last group, with all_to_last).
    """
    torch.ops.svel.bank_push_(refs, counts, heads, values, labels, all_to_last=all_to_last)

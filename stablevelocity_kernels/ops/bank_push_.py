"""svel::bank_push_ — push rows into the per-class FIFO rings of a reference bank, in place and in order."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define

SCHEMA = "bank_push_(Tensor(a!) refs, Tensor(b!) counts, Tensor(c!) heads, Tensor values, Tensor labels) -> ()"


def check(refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor) -> None:
    op = "bank_push_"
    if refs.dim() < 2:
        _checks.fail(op, "refs", "shape (K, M, *S)", tuple(refs.shape))
    for arg, value in {"refs": refs, "counts": counts, "heads": heads}.items():
        if not value.is_contiguous():
            _checks.fail(op, arg, "a contiguous tensor, because it is written in place", f"strides {value.stride()}")
    _checks.check_dtype(op, "refs", refs, (*_checks.FLOATS, torch.int64))
    _checks.check_dtype(op, "values", values, (torch.int64,) if refs.dtype == torch.int64 else _checks.FLOATS)
    for arg, value in {"counts": counts, "heads": heads}.items():
        _checks.check_dtype(op, arg, value, (torch.int32, torch.int64))
        _checks.check_shape(op, arg, value, (refs.shape[0],), "(K,)")
        _checks.check_device(op, arg, value, refs)
    if heads.dtype != counts.dtype:
        _checks.fail(op, "heads", f"the dtype of counts, {counts.dtype}", heads.dtype)
    _checks.check_dtype(op, "labels", labels, (torch.int64,))
    if labels.dim() != 1:
        _checks.fail(op, "labels", "shape (N,)", tuple(labels.shape))
    _checks.check_shape(op, "values", values, (labels.shape[0], *refs.shape[2:]), "(N, *S)")
    _checks.check_device(op, "values", values, refs)
    _checks.check_device(op, "labels", labels, refs)


def _fake(refs, counts, heads, values, labels):
    check(refs, counts, heads, values, labels)


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

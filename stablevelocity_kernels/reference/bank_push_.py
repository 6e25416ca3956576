"""Reference of svel::bank_push_: the definition, one row after another."""

from __future__ import annotations

from torch import Tensor

from .. import _checks


def bank_push_(refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor) -> None:
    """See stablevelocity_kernels.bank_push_."""
    _checks.check_bank_push(refs, counts, heads, values, labels)
    _checks.check_labels_in_range("bank_push_", labels, refs.shape[0], 0)
    capacity = refs.shape[1]
    if capacity == 0:
        return
    for value, y in zip(values, labels.tolist(), strict=True):
        if not 0 <= y < refs.shape[0]:
            continue
        slot = int(heads[y])
        refs[y, slot] = value.to(refs.dtype)
        heads[y] = (slot + 1) % capacity
        counts[y] = min(int(counts[y]) + 1, capacity)

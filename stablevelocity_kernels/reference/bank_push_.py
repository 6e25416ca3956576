"""Reference of svel::bank_push_: the definition, one row after another."""

from __future__ import annotations

from torch import Tensor

from .. import _checks


def bank_push_(
    refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor, *, all_to_last: bool = False
) -> None:
    """See stablevelocity_kernels.bank_push_."""
    _checks.check_bank_push(refs, counts, heads, values, labels, all_to_last)
    groups, capacity = refs.shape[0] - all_to_last, refs.shape[1]
    _checks.check_labels_in_range("bank_push_", labels, groups, 0)
    if capacity == 0:
        return
    places = [y if 0 <= y < groups else None for y in labels.tolist()] + [groups] * (len(labels) * all_to_last)
    for i, y in enumerate(places):
        if y is None:
            continue
        slot = int(heads[y])
        refs[y, slot] = values[i % len(labels)].to(refs.dtype)
        heads[y] = (slot + 1) % capacity
        counts[y] = min(int(counts[y]) + 1, capacity)

"""The memory bank of StableVM: per-class rings of recent clean samples, on the device, without host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from stablevelocity_kernels import bank_draw, bank_push_

from .interpolants import Interpolant, get_interpolant

NULL_POLICIES = ("ring", "all")


class BankDraw(NamedTuple):
    """References drawn from a bank, one for each row."""

    x0: Tensor  # (N, *S) float32, or float64 from a float64 bank
    empty: Tensor  # (N,) bool: the row's group held no reference, and x0 is NaN
    index: Tensor | None  # (N,) int64 dataset index of x0, -1 where unknown; None unless the bank tracks indices


class MixtureDraw(NamedTuple):
    """Noisy samples made of a bank's references, one for each row; see `ReferenceBank.mixture`."""

    x0: Tensor  # (N, *S) float32, or float64 from a float64 bank: the reference, or the fallback of an empty group
    x_t: Tensor  # (N, *S) alpha x0 + sigma noise, of the dtype of x0
    t_set: Tensor  # (N,) t, or NaN where the target is not to be over the set: an empty group, or t below t_min


class ReferenceBank(nn.Module):
    """FIFO rings of references, one for each class (paper, StableVM: the memory bank).

    Args:
        shape: the shape S of one sample.
        num_classes: 0 for an unconditional bank of one ring, where labels are None everywhere. Otherwise labels are in
            [0, num_classes) when pushed, and up to num_classes, the null label, when read.
        capacity: M, references per ring.
        dtype: of the stored references.
        null: what the null label stands for. "ring": one more ring with the most recent samples of any class. "all":
            every valid reference of every class; classes then count by how full their rings are, equally once full.
        track_indices: keep the dataset index of every reference.
        device: of the buffers.

    Buffers: refs (G, M, *S), counts (G,) int32 of valid leading references, heads (G,) int32 of slots written next, and
    with track_indices, indices (G, M) int64. G is 1, num_classes + 1 ("ring") or num_classes ("all").
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int = 0,
        capacity: int = 256,
        *,
        dtype: torch.dtype = torch.float16,
        null: str = "ring",
        track_indices: bool = False,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if null not in NULL_POLICIES:
            raise ValueError(f"null: expected one of {NULL_POLICIES}, got {null!r}")
        if num_classes < 0:
            raise ValueError(f"num_classes: expected 0 (unconditional) or more, got {num_classes}")
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating point dtype, got {dtype}")
        self.shape, self.num_classes, self.capacity, self.null = tuple(shape), num_classes, capacity, null
        self.track_indices = track_indices
        groups = max(1, num_classes) + (num_classes > 0 and null == "ring")
        self._allocate(groups, dtype, device)
        self.register_buffer("counts", torch.zeros(groups, dtype=torch.int32, device=device))
        self.register_buffer("heads", torch.zeros(groups, dtype=torch.int32, device=device))

    def _allocate(self, groups: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """The buffers that hold references."""
        self.register_buffer("refs", torch.zeros(groups, self.capacity, *self.shape, dtype=dtype, device=device))
        if self.track_indices:
            self.register_buffer("indices", torch.full((groups, self.capacity), -1, dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return f"shape={self.shape}, num_classes={self.num_classes}, capacity={self.capacity}, null={self.null!r}"

    pushes_beside = True  # a push may be on another stream than what does not touch the bank

    @torch.no_grad()
    def push(self, values: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Store a batch, the oldest references of each ring making room.

        Args:
            values: (N, *S), any floating dtype, cast to the bank's.
            labels: (N,) int64 in [0, num_classes), or None for an unconditional bank.
            indices: (N,) int64 dataset indices, when the bank tracks them.

        Raises:
            ValueError, RuntimeError: naming the argument. On CPU also for a label out of range; on CUDA such a row is
                not stored under its class.
        """
        self._push(*self._to_push(values, labels, indices))

    def push_ahead(self, values: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """`push` where a `mixture` with pushed=True follows and then a `target`: a bank in parts goes on meanwhile."""
        self.push(values, labels, indices)

    def _to_push(
        self, values: Tensor, labels: Tensor | None, indices: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of `push`, checked: rows without a gradient, a label for each, and their indices."""
        self._check_labels(labels)
        self._check_indices(indices)
        if labels is None:
            labels = torch.zeros(values.shape[0], dtype=torch.int64, device=values.device)
        return values.detach(), labels, indices

    def _push(self, values: Tensor, labels: Tensor, indices: Tensor | None) -> None:
        recent = self.num_classes > 0 and self.null == "ring"  # the last ring takes every row
        if indices is not None:
            bank_push_(self.indices, self.counts.clone(), self.heads.clone(), indices, labels, all_to_last=recent)
        bank_push_(self.refs, self.counts, self.heads, values, labels, all_to_last=recent)

    def groups(self, labels: Tensor | None) -> Tensor | None:
        """Model labels (N,) in [0, num_classes] -> the ops' group labels (N,), -1 for every group; None stays None."""
        self._check_labels(labels)
        if labels is None or self.null == "ring":
            return labels
        return labels.masked_fill(labels == self.num_classes, -1)

    def use(self, labels: Tensor | None) -> None:
        """Make ready to draw and target for labels (N,): nothing here, where a `HostReferenceBank` fetches rings."""

    @torch.no_grad()
    def draw(
        self, labels: Tensor | None = None, *, n: int | None = None, generator: torch.Generator | None = None
    ) -> BankDraw:
        """A reference for each row, uniformly from the valid references of its label.

        Args:
            labels: (N,) int64 in [0, num_classes]; None for an unconditional bank, with `n` rows then.
            generator: on the bank's device; None for the default one.
        """
        group = self.groups(labels)
        if group is None and n is None:
            raise ValueError("n: expected the number of rows because labels are None, got None")
        u = self._numbers(group, n, generator)
        x0, slot, _, _, index = self._take(group, u, indexed=self.track_indices)
        return BankDraw(x0, slot < 0, index)

    @torch.no_grad()
    def mixture(
        self,
        t: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        fallback: Tensor | None = None,
        *,
        interpolant: str | Interpolant = "linear",
        t_min: float = 0.0,
        generator: torch.Generator | None = None,
        numbers: Tensor | None = None,
        send: str = "",
        pushed: bool = False,
    ) -> MixtureDraw:
        """A draw for each row from the mixture of its label's references, each blurred as time t blurs it.

        Args:
            t: (N,), 0 at the data; noise: (N, *S).
            labels: (N,) int64 in [0, num_classes]; None for an unconditional bank.
            fallback: (N, *S), x0 of the rows whose group is empty.
            t_min: rows below it are not to take the target over the set.
            generator: on the bank's device; None for the default one.
            numbers: (N,) float64, uniform in [0, 1), which pick the references in place of the generator.
            send: "exact" or "fast": the next call of the bank is a `target` of this precision for just these x_t, t_set
                and labels, with sent=True. A bank in parts then has x_t where all can read it, and begins with the
                target.
            pushed: the call before was `push_ahead`.
        """
        path, group = get_interpolant(interpolant), self.groups(labels)
        u = self._numbers(group, t.shape[0], generator) if numbers is None else numbers
        if path.name is not None:
            how = {"path": path.name, "t_min": t_min, "send": send, "pushed": pushed}
            x0, _, x_t, t_set, _ = self._take(group, u, fallback, noise, t, **how)
        else:
            x0, slot, _, _, _ = self._take(group, u, fallback, pushed=pushed)
            x_t = path.interpolate(x0, noise, t)
            t_set = t.masked_fill((slot < 0) | (t < t_min), math.nan)
        return MixtureDraw(x0, x_t, t_set)

    def _numbers(self, group: Tensor | None, n: int | None, generator: torch.Generator | None) -> Tensor:
        """Uniform numbers, one for each row, which pick its reference."""
        rows = n if group is None else group.shape[0]
        return torch.rand(rows, dtype=torch.float64, device=self.counts.device, generator=generator)

    def _take(
        self,
        group: Tensor | None,
        u: Tensor,
        *rest: Tensor | None,
        indexed: bool = False,
        send: str = "",
        pushed: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """`bank_draw` with numbers u (N,), and with `indexed` the dataset index of each row."""
        refs, counts, group, indices = self._drawn_from(group, u, indexed=indexed)
        x0, slot, x_t, t_set = bank_draw(refs, counts, u, group, *rest, **options)
        return x0, slot, x_t, t_set, None if indices is None else indices[slot].masked_fill(slot < 0, -1)

    def _drawn_from(
        self, group: Tensor | None, u: Tensor, *, indexed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """refs, counts and labels of the `bank_draw` with numbers u (N,), and with `indexed` the index of each slot."""
        return self.refs, self.counts, group, self.indices.flatten() if indexed else None

    def target(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        source: Tensor | None = None,
        *,
        interpolant: str | Interpolant = "linear",
        prediction: str = "velocity",
        precision: str = "exact",
        sent: bool = False,
    ) -> Tensor:
        """StableVM target (N, *S) of each x_t (N, *S) over the references of its label; see `Interpolant.target`.

        labels (N,) int64 in [0, num_classes] or None; `source` (N, *S) joins its own row's set. A row without any
        reference, or with t = NaN, comes back NaN. sent: x_t is what the `mixture` before has returned, which was asked
        to send it.
        """
        path, group = get_interpolant(interpolant), self.groups(labels)
        return self._target(path, x_t, t, group, source, prediction, precision, sent)

    def _target(self, path, x_t, t, group, source, prediction, precision, sent=False) -> Tensor:
        """`target` on an `Interpolant`, for rows of the ops' group labels."""
        refs = self.refs[0] if group is None else self.refs
        options = {
            "prediction": prediction,
            "precision": precision,
            "null_rows": group is not None and self.null == "all",
        }
        return path.target(x_t, refs, t, group, self.counts, source, **options)

    def filled(self) -> float:
        """Share of the class rings' slots that hold a reference, in [0, 1]. Waits for the device."""
        return float(self.counts[: max(1, self.num_classes)].sum()) / (max(1, self.num_classes) * self.capacity)

    def prefill(
        self,
        data: Dataset | Tensor | tuple[Tensor, ...] | Iterable,
        *,
        batch_size: int = 256,
        generator: torch.Generator | None = None,
    ) -> float:
        """Push data until every class ring is full or the data are exhausted. Waits for the device after each batch.

        Args:
            data: a map-style dataset of samples, or of (sample, label); or tensors x or (x, labels): visited in random
                order, each row's index being its position. Or an iterable of batches x, (x, labels) or
                (x, labels, indices), taken as they come. An unconditional bank ignores labels.
            batch_size: rows pushed at a time, where the batches are not given.
            generator: on the CPU, of the random order.

        Returns:
            `filled()`.
        """
        for values, labels, indices in _batches(data, batch_size, generator):
            labels = labels if self.num_classes else None
            indices = indices if self.track_indices else None
            parts = (None if part is None else part.to(self.refs.device) for part in (values, labels, indices))
            self._push_prefill(*parts)
            if self.filled() == 1.0:
                break
        return self.filled()

    def _push_prefill(self, values: Tensor, labels: Tensor | None, indices: Tensor | None) -> None:
        self.push(values, labels, indices)

    def _check_indices(self, indices: Tensor | None) -> None:
        if (indices is not None) != self.track_indices:
            expected = "a (N,) int64 tensor" if self.track_indices else "None"
            raise ValueError(
                f"indices: expected {expected} because track_indices = {self.track_indices}, "
                f"got {None if indices is None else tuple(indices.shape)}"
            )

    def _check_labels(self, labels: Tensor | None) -> None:
        if (labels is None) == (self.num_classes > 0):
            expected = "a (N,) int64 tensor" if self.num_classes else "None"
            got = None if labels is None else f"shape {tuple(labels.shape)}"
            raise ValueError(f"labels: expected {expected} because num_classes = {self.num_classes}, got {got}")

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Refuse what could only be restored approximately: another shape or dtype."""
        for name, own in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and (saved.shape, saved.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"{prefix}{name}: expected {tuple(own.shape)} {own.dtype} "
                    f"(num_classes = {self.num_classes}, capacity = {self.capacity}, null = {self.null!r}), "
                    f"got {tuple(saved.shape)} {saved.dtype}: build the bank as it was saved"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _batches(
    data: Dataset | Tensor | tuple[Tensor, ...] | Iterable, batch_size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Every kind of data that `prefill` takes, as (values, labels, indices)."""
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple) and all(isinstance(part, Tensor) for part in data):
        data = TensorDataset(*data)
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        for chosen in torch.randperm(len(data), generator=generator).split(batch_size):
            batch = default_collate([data[i] for i in chosen.tolist()])
            values, labels = (batch, None) if isinstance(batch, Tensor) else (*batch, None)[:2]
            yield values, labels, chosen
        return
    for batch in data:
        yield (batch, None, None) if isinstance(batch, Tensor) else (*batch, None, None)[:3]

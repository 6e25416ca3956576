"""A reference bank in host memory that brings the classes of the next batch to the device beside the current step.

    bank = HostReferenceBank(shape, num_classes=1000, capacity=8192, max_classes=64, device="cuda")
    objective = StableVMObjective(bank)
    bank.prefill(dataset)
    for x0, labels in bank.ahead(loader):  # labels on the device
        draw = objective.sample(x0.to("cuda", non_blocking=True), labels)

For banks larger than the GPU: of those 1,000 classes the device holds the 128 of two batches, and the null ring.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .bank import BankDraw, MixtureDraw, ReferenceBank


class HostReferenceBank(ReferenceBank):
    """The FIFO rings of `ReferenceBank` in pinned host memory, with room for a few classes on the device.

    It takes the place of a `ReferenceBank` in `StableVMObjective` and gives the same draws for the same random numbers.
    Their state dicts are interchangeable.

    A batch's classes must be known on the host before its step, where a loader has them. `prefetch(labels)` starts
    copying their rings and returns the labels on the device; a batch is recognised by that very tensor. Any others are
    read back and their rings copied while the host waits: always right, never hidden, and warned about once.
    `ahead(batches)` calls `prefetch` one batch ahead. `objective.sample` is then partly work of the host: keep it out
    of CUDA graphs and torch.compile, which may hold the model.

    What is where. `refs`, `counts`, `heads` (and `indices`) are the buffers of `ReferenceBank`, on the CPU. `staged` is
    a `ReferenceBank` on the device whose "classes" are places for rings. A class stays in its place until the place is
    needed, least recently used first, so what two batches share is copied once. The null ring always has a place, since
    any label may be dropped to it. null="all" is refused: a single dropped row would read the whole bank, seconds of
    copying for each step that no step could hide.

    A push goes to the staged rings, where the same step's draw and target see it, and the slots it wrote are then
    copied to the host's rings. So a staged ring is never older than the host's, whether it was copied before or after
    the push; and what the host holds is what the device holds, bit for bit.

    Order. Counts and heads follow from the labels, so the host knows them without asking the device. All copies of
    rings, in both directions, are on one side stream in the order in which they were asked for: a ring that leaves its
    place and comes back finds its pushed rows written. Copies begin after the last draw, target or push that was asked
    for before them, so no place is overwritten while it is read, and `use` makes the caller's stream wait for the rings
    of its batch. A push may overwrite a slot that is still on its way to the host; its own copy of that slot follows.
    The host itself touches `refs` only in `prefill`, `state_dict`, `load_state_dict` and pushes of CPU tensors, which
    wait; labels and tables travel in pinned blocks that torch's allocator keeps until they have arrived. Hence in a
    training step the host never waits, however far it runs ahead. Draws, targets and pushes belong on one stream.

    Args:
        shape, num_classes, capacity, dtype, track_indices: as in `ReferenceBank`; num_classes at least 1, since a
            single ring would have to be on the device whole.
        max_classes: most distinct classes in a batch; by default min(num_classes, 256). min(batch size, num_classes)
            always suffices.
        slots: places for class rings on the device. By default, and at least, min(2 * max_classes, num_classes): those
            of two batches. More places save copies. The device holds slots + 1 rings.
        null: "ring".
        device: of the batches. Without CUDA the same is done in ordinary memory, each copy at once.

    Raises:
        ValueError: naming the argument, what was expected and what came.
        RuntimeError: when the memory cannot be pinned.
    """

    pushes_beside = False  # it is ordered with draws and targets by the stream that all of them are on

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        capacity: int = 256,
        *,
        dtype: torch.dtype = torch.float16,
        null: str = "ring",
        track_indices: bool = False,
        max_classes: int | None = None,
        slots: int | None = None,
        device: torch.device | str | None = None,
    ):
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1 for a bank on the host, got {num_classes}")
        if null == "all":
            raise ValueError(
                "null: expected 'ring' for a bank on the host, got 'all', "
                "which would copy the whole bank to the device whenever a label is dropped"
            )
        most = min(num_classes, 256) if max_classes is None else max_classes
        if not 1 <= most <= num_classes:
            raise ValueError(f"max_classes: expected 1 to num_classes = {num_classes}, got {max_classes}")
        least = min(2 * most, num_classes)
        if slots is not None and slots < least:
            raise ValueError(f"slots: expected at least {least}, the classes of two batches, got {slots}")
        options = {"dtype": dtype, "null": null, "track_indices": track_indices}
        super().__init__(shape, num_classes, capacity, **options, device="cpu")
        self.max_classes, self.slots = most, min(slots or least, num_classes)
        device = torch.device("cpu" if device is None else device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        # not a submodule: it is a copy, and has no part in state dicts or in moves
        self.__dict__["staged"] = ReferenceBank(shape, self.slots, capacity, **options, device=device)
        if device.type == "cuda":
            _pin(self, device, [ring for ring, _ in self._rings()])
        self._side = SideStream(device)
        self.copied = 0  # bytes brought to the device so far
        self._warned = False
        self._forget()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, device={str(self.device)!r}, max_classes={self.max_classes}, slots={self.slots}"
        )

    def ahead(self, batches: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
        """The batches (x, labels, ...) with their labels on the device, each prefetched one batch ahead.

        Each batch is taken from `batches`, and its classes' copies begin, when the one before it is handed out.
        """
        waiting = None
        for x, labels, *rest in batches:
            coming = (x, self.prefetch(labels), *rest)
            if waiting is not None:
                yield waiting
            waiting = coming
        if waiting is not None:
            yield waiting

    def prefetch(self, labels: Tensor) -> Tensor:
        """Start bringing the classes of a coming batch to the device, without waiting.

        The rings of the last two prefetched batches are there: the current one's and the next one's.

        Args:
            labels: (N,) int64 on the CPU, in [0, num_classes] (num_classes, the null label, where already dropped).

        Returns:
            (N,) the labels on the device, to be given to `objective.sample`, or to `use` or `push`.

        Raises:
            ValueError: for labels elsewhere or out of range, or more than `max_classes` distinct classes.
        """
        self._check_labels(labels)
        if labels.device.type != "cpu" or labels.dtype != torch.int64 or labels.dim() != 1:
            got = f"{labels.dtype} {tuple(labels.shape)} on {labels.device}"
            raise ValueError(f"labels: expected a (N,) int64 tensor on the CPU, got {got}")
        host = labels.numpy().copy()
        return self._stage(host, self._send(host)).labels

    def use(self, labels: Tensor | None) -> None:
        """Make a batch the current one, whose classes (and the null label) `draw` and `target` can read from now on.

        `StableVMObjective` and `push` do this. Labels that are not a tensor which `prefetch` returned, or that were
        changed since, are read back and staged here, which waits for the device.
        """
        self._check_labels(labels)
        batch = self._find(labels)
        if batch is None:
            if labels.is_cuda and not self._warned:
                self._warned = True
                warnings.warn(
                    "labels: not a tensor that HostReferenceBank.prefetch returned: each such step reads its labels "
                    "back and waits for its references; see HostReferenceBank.ahead",
                    stacklevel=3,
                )
            batch = self._stage(labels.cpu().numpy().copy(), labels)
        if batch is self._current:
            return
        self._side.wait(batch.ready)
        classes, places = (np.fromiter(part, np.int64) for part in (self._place.keys(), self._place.values()))
        table = np.full(self.num_classes + 3, self.slots + 1)  # label + 1 -> place; unknown labels -> out of range
        table[classes + 1] = places
        state = np.zeros((2, self.slots + 1), np.int64)
        state[:, places] = self.counts.numpy()[classes], self.heads.numpy()[classes]
        sent = self._send(np.concatenate([table, *state]))
        self._table, counts, heads = sent.split([len(table), self.slots + 1, self.slots + 1])
        self.staged.counts.copy_(counts)
        self.staged.heads.copy_(heads)
        self._current = batch

    @torch.no_grad()
    def push(self, values: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Store a batch; arguments and errors as in `ReferenceBank.push`, all on the bank's device.

        CPU tensors whose labels were not prefetched go straight into the host's rings, whatever the number of classes;
        this waits, and empties the staging.

        Raises:
            ValueError: also for a label out of range, on any device, before anything is stored.
        """
        if values.device.type == "cpu" and self._find(labels) is None:
            self.synchronize()
            super().push(values, labels, indices)
            self._forget()
            return
        self.use(labels)
        batch = self._current
        self._check_range(batch.host, self.num_classes - 1)
        self.staged.push(values, self._places(labels), indices)
        self._side.mark()
        self._side.copy(self._advance(batch.host))

    def _advance(self, labels: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Counts and heads after a push of labels (N,); what it wrote, as pairs of host slots and staged slots."""
        counts, heads, moved = self.counts.numpy(), self.heads.numpy(), []
        classes, pushed = np.unique(labels, return_counts=True)
        for y, n in [*zip(classes.tolist(), pushed.tolist(), strict=True), (self.num_classes, len(labels))]:
            place, head = self._place[y], int(heads[y])
            end = head + min(n, self.capacity)
            for a, b in ((head, min(end, self.capacity)), (0, end - self.capacity)):  # what wraps is the second run
                moved += [(ring[y, a:b], staged[place, a:b]) for ring, staged in self._rings() if a < b]
            heads[y], counts[y] = (head + n) % self.capacity, min(int(counts[y]) + n, self.capacity)
        return moved

    @torch.no_grad()
    def draw(self, labels: Tensor | None = None, **options: Any) -> BankDraw:
        """As `ReferenceBank.draw`, for labels (N,) among those of the current batch and the null label."""
        drawn = self.staged.draw(self._places(labels), **options)
        self._side.mark()
        return drawn

    @torch.no_grad()
    def mixture(
        self, t: Tensor, noise: Tensor, labels: Tensor | None = None, fallback: Tensor | None = None, **options: Any
    ) -> MixtureDraw:
        """As `ReferenceBank.mixture`, for labels (N,) among those of the current batch and the null label."""
        drawn = self.staged.mixture(t, noise, self._places(labels), fallback, **options)
        self._side.mark()
        return drawn

    def target(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, source: Tensor | None = None, **options: Any
    ) -> Tensor:
        """As `ReferenceBank.target`, for labels (N,) among those of the current batch and the null label.

        A row of another label is NaN on CUDA. Without a current batch, or on the CPU, `labels` become one: see `use`.
        """
        out = self.staged.target(x_t, t, self._places(labels), source, **options)
        self._side.mark()
        return out

    def synchronize(self) -> None:
        """Wait until every push has reached `refs`."""
        self._side.synchronize()

    def _apply(self, fn, recurse=True):
        """Module.to and the like change nothing: a module that holds the bank may move, the bank stays where it is."""
        return self

    # -- batches and places

    def _rings(self) -> list[tuple[Tensor, Tensor]]:
        """What is on both sides: on the host (G, M, ...), staged (slots + 1, M, ...)."""
        pairs = [(self.refs, self.staged.refs)]
        return [*pairs, (self.indices, self.staged.indices)] if self.track_indices else pairs

    def _forget(self) -> None:
        """Nothing is staged."""
        self._place: dict[int, int] = {}  # class -> its place in `staged`, least recently used first
        self._free = list(range(self.slots))
        self._batches: deque[_Batch] = deque(maxlen=2)
        self._current: _Batch | None = None
        self._side.mark()

    def _find(self, labels: Tensor | None) -> _Batch | None:
        known = (b for b in self._batches if b.labels is labels and b.version == labels._version)
        return next(known, None)

    def _stage(self, host: np.ndarray, labels: Tensor) -> _Batch:
        """Give every class of a batch a place, start the copies of those that had none, and remember the batch."""
        self._check_range(host, self.num_classes)
        classes = {*host.tolist(), self.num_classes}
        if len(classes) - 1 > self.max_classes:
            raise ValueError(
                f"labels: expected at most {self.max_classes} distinct classes (max_classes), got {len(classes) - 1}"
            )
        for y in sorted(classes & self._place.keys()):
            self._place[y] = self._place.pop(y)
        copies = []
        for y in sorted(classes - self._place.keys()):
            self._place[y] = place = self._find_place(y)
            n = int(self.counts[y])
            copies += [(staged[place, :n], ring[y, :n]) for ring, staged in self._rings() if n]
        self.copied += sum(target.nbytes for target, _ in copies)
        batch = _Batch(labels, labels._version, host, classes, self._side.copy(copies))
        self._batches.append(batch)
        if all(b is not self._current for b in self._batches):
            self._current = None  # its places may be overwritten
        return batch

    def _find_place(self, y: int) -> int:
        """A free place, or the least recently used: never one of the last two batches', as those fit together."""
        if y == self.num_classes:
            return self.slots  # the null ring of `staged`
        return self._free.pop() if self._free else self._place.pop(next(iter(self._place)))

    def _places(self, labels: Tensor | None) -> Tensor:
        """Labels (N,) -> places (N,) in `staged`, on the device."""
        self._check_labels(labels)
        if self._current is None or (
            labels.device.type == "cpu" and not self._current.classes.issuperset(labels.tolist())
        ):
            self.use(labels)
        return self._table[labels.clamp(-1, self.num_classes + 1) + 1]

    def _check_range(self, labels: np.ndarray, last: int) -> None:
        outside = labels[(labels < 0) | (labels > last)]
        if len(outside):
            raise ValueError(f"labels: expected values in [0, {last}], got {outside[0]}")

    def _send(self, values: np.ndarray) -> Tensor:
        """Integers to the device, in the caller's stream, from memory that is theirs until they have arrived."""
        sent = torch.from_numpy(values)
        return sent.clone() if self.device.type == "cpu" else sent.pin_memory().to(self.device, non_blocking=True)

    # -- state

    def _save_to_state_dict(self, *args, **kwargs):
        self.synchronize()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self.synchronize()
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()


class _Batch(NamedTuple):
    """A batch whose classes have places."""

    labels: Tensor  # (N,) on the device: the tensor it is recognised by
    version: int  # of that tensor when it was made
    host: np.ndarray  # (N,) the same labels
    classes: set[int]  # the distinct ones, and the null label
    ready: Any  # the event after its copies; None on the CPU


class SideStream:
    """Copies beside the caller's stream, in the order they are given; on the CPU each is made at once.

    A copy begins after what the caller's stream had been given at the last `mark`, and lies before the event that
    `copy` returns, which `wait` puts before what the caller's stream is given next.
    """

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._marked = None if self.stream is None else torch.cuda.Event()

    def mark(self) -> None:
        if self.stream is not None:
            self._marked.record(torch.cuda.current_stream(self.stream.device))

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """Copy each (target, source); the event after them."""
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self.stream.wait_event(self._marked)
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, event: Any) -> None:
        if event is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(event)

    def synchronize(self) -> None:
        """The host waits for all copies."""
        if self.stream is not None:
            self.stream.synchronize()


def _pin(owner: HostReferenceBank, device: torch.device, tensors: list[Tensor]) -> None:
    """Page-lock memory as it stands, until the owner goes: torch's pinned allocator rounds up to a power of two."""
    cuda = torch.cuda.cudart()
    with torch.cuda.device(device):
        for tensor in tensors:
            code = int(cuda.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)) if tensor.nbytes else 0
            if code != 0:
                raise RuntimeError(
                    f"refs: expected {tensor.nbytes / 2**30:.1f} GiB of host memory that can be pinned, "
                    f"got CUDA error {code} from cudaHostRegister"
                )
            if tensor.nbytes:
                weakref.finalize(owner, _unpin, device, tensor)


def _unpin(device: torch.device, tensor: Tensor) -> None:
    torch.cuda.synchronize(device)  # copies under way
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())

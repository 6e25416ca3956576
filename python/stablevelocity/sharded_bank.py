"""A reference bank in parts, one to a process of a group: as large as all their devices together, and as exact as one.

    bank = ShardedReferenceBank(shape, num_classes=1000, capacity=8192, device="cuda")  # over the default group
    objective = StableVMObjective(bank)
    bank.prefill(dataset)
    draw = objective.sample(x0, labels)  # by every process, each with rows of its own

Every process's rows are evaluated against all parts; what a part gives, a mean and its log-sum-exp, merges exactly.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from stablevelocity_kernels import affine_step, clamp_time, posterior_part, prediction_coefficients

from . import peer_memory
from .bank import ReferenceBank
from .interpolants import check_prediction

PIECE_BYTES = 1 << 28  # of a part's references in one entry of a checkpoint, which is read as a whole


class ShardedReferenceBank(ReferenceBank):
    """The FIFO rings of `ReferenceBank` over the processes of a group, each of which holds a part of every ring.

    It takes the place of a `ReferenceBank` in `StableVMObjective`. For the same pushes and the same random numbers the
    draws are those of one bank that holds everything, bit for bit, and the targets agree within the numerical contract,
    for any number of processes and any `capacity`: parts may be uneven, empty, or without a class.

    What is where. Of ring y, slot s is with process (s + y) mod P of the P processes, as its slot s div P. So pushes go
    round the processes, the parts of a ring differ by one reference at most at any time, and what leaves is the oldest
    of the whole ring. `counts` and `heads` are those of the whole rings, the same everywhere; `local_counts` are those
    of this process, and `refs` (G, ceil(M / P), *S) is its part.

    Communication. `push`, `draw`, `mixture` and `target` are collective: every process of the group calls them in the
    same order, with equal numbers of rows. A push gathers the rows in the dtype of the bank. A draw gathers 16 bytes a
    row and fetches the drawn references by an all-to-all. A target gathers the rows x_t and 24 bytes each, evaluates
    all rows against the own part, and hands mean and log-sum-exp back by an all-to-all, which moves as many bytes as a
    reduce-scatter but needs no round before it that finds the largest log-sum-exp of each row. A process thus sends
    (P - 1) N D values in each of these exchanges. They are functional collectives, so a step captures in a CUDA graph
    and compiles with torch.compile(fullgraph=True). With `portions` above 1 rows travel and are evaluated in so many of
    them, one travelling while another is evaluated; each portion reads its references anew, which costs more
    than it hides where reading them is what takes the time.

    GPUs of one host. Where they reach one another's memory, kernels write to it and read it in place of collectives,
    see `peer_memory`, with the same results. A row that is pushed goes straight to its slot, a draw reads its reference
    where it is, and a target sends the times and rings: x_t is read by those who evaluate it, who leave their means
    with the process whose row it is, while they evaluate others. All calls of a bank are then on one stream or ordered
    as on one, `prefill`, `load` and `load_state_dict` among them, and the first call with so many rows is outside of
    graph capture.

    A process that ends takes the others out of their next collective with an error: at once under gloo, after the
    group's timeout under NCCL (`init_process_group(timeout=...)`), whose watchdog then waits for a minute, for traces
    that others write (four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC), and after it through memory, where the kernel
    that waited says for whom and ends the process's use of the device. Numbers of rows are compared on the host, in the
    first call and where they change, outside of torch.compile.

    Args:
        shape, num_classes, capacity, dtype, null, track_indices: as in `ReferenceBank`; capacity counts the references
            of a ring over all processes.
        group: a process group or a one-dimensional `DeviceMesh` (one dimension of a larger one: `mesh["bank"]`). None:
            the default group, or this process alone without `init_process_group`. Along other dimensions of a mesh
            there are further banks, each fed by its own group.
        portions: how many the rows of a target travel in.
        peer_memory: use it; None: where all processes can, and portions is 1. False: collectives.
        device: of this process's part.

    Raises:
        ValueError: naming the argument, what was expected and what came; on every process, where these bring different
            numbers of rows.
        RuntimeError: from any collective method, when another process of the group does not take part in it.
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
        group: dist.ProcessGroup | DeviceMesh | None = None,
        portions: int = 1,
        peer_memory: bool | None = None,
        device: torch.device | str | None = None,
    ):
        if portions < 1:
            raise ValueError(f"portions: expected at least 1, got {portions}")
        group = _process_group(group)
        parts, part = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        self.group, self.parts, self.part, self.portions = group, parts, part, portions
        self._name = "" if group is None else group.group_name
        self._brought: dict[str, str] = {}  # by method: what each process has brought to it last
        self.link = _link(group, device, portions, peer_memory)
        options = {"dtype": dtype, "null": null, "track_indices": track_indices}
        super().__init__(shape, num_classes, capacity, **options, device=device)

    def _allocate(self, groups: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        self.local_capacity = -(-self.capacity // self.parts)
        # One row more than there are slots: it takes what other processes store.
        slots = groups * self.local_capacity + 1
        zeros = functools.partial(torch.zeros, device=device) if self.link is None else self.link.zeros
        self.register_buffer("rows", zeros((slots, *self.shape), dtype=dtype))
        if self.track_indices:
            self.register_buffer("row_indices", zeros((slots,), dtype=torch.int64).fill_(-1))
        if self.link is not None:
            held = self.rows, self.row_indices if self.track_indices else None
            self.link.serve(*held, (groups, self.local_capacity))
        y = torch.arange(groups, dtype=torch.int32, device=device)
        self.register_buffer("_first", (self.part - y) % self.parts, persistent=False)  # the first own slot of a ring
        self.register_buffer("local_counts", torch.zeros_like(y), persistent=False)
        # By ring, and last for all of them: -inf, the lse of a row whose own part is empty, or NaN where it is not.
        nothing = torch.full((groups + 1,), -math.inf, dtype=torch.float64, device=device)
        self.register_buffer("_nothing", nothing, persistent=False)
        self.register_buffer("_order", torch.zeros(1, device=device), persistent=False)  # see peer_memory

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, part={self.part}, parts={self.parts}"

    @property
    def refs(self) -> Tensor:
        """This process's references, (G, ceil(M / P), *S); of ring y the leading local_counts[y] are valid."""
        return self.rows[:-1].view(len(self.counts), self.local_capacity, *self.shape)

    @property
    def indices(self) -> Tensor:
        """Their dataset indices, (G, ceil(M / P)) int64."""
        return self.row_indices[:-1].view(len(self.counts), self.local_capacity)

    # -- storing

    def _to_push(self, values: Tensor, labels: Tensor | None, indices: Tensor | None) -> tuple[Tensor, ...]:
        if tuple(values.shape[1:]) != self.shape or values.dim() == 0:
            raise ValueError(f"values: expected shape (N, *S) with S = {self.shape}, got {tuple(values.shape)}")
        values, labels, indices = super()._to_push(values, labels, indices)
        for name, given in (("labels", labels), ("indices", indices)):
            if given is not None and (given.dtype != torch.int64 or given.shape != values.shape[:1]):
                got = f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
                raise ValueError(f"{name}: expected int64 (N,) = ({values.shape[0]},), got {got}")
        return values if self.link is not None else values.to(self.rows.dtype), labels, indices

    @torch.no_grad()
    def push_ahead(self, values: Tensor, labels: Tensor | None = None, indices: Tensor | None = None) -> None:
        self._push(*self._to_push(values, labels, indices), ahead=True)

    def _push(self, values: Tensor, labels: Tensor, indices: Tensor | None, ahead: bool = False) -> None:
        self._check_alike("push", values)
        if self.link is not None:
            recent = self.num_classes > 0 and self.null == "ring"
            about = self._order, self.counts, self.heads, self.local_counts
            peer_memory.push(*about, values, labels, indices, recent, self.capacity, ahead, self.link.name)
            return
        sent = [values, labels] + ([] if indices is None else [indices])
        self._store(*(self._wait(part) for part in self._gather(*sent)))

    def _push_prefill(self, values: Tensor, labels: Tensor | None, indices: Tensor | None) -> None:
        """Every process has the same rows and keeps its share."""
        values, labels, indices = self._to_push(values, labels, indices)
        self._store(values.to(self.rows.dtype), labels, indices)

    def prefill(self, data: Any, *, batch_size: int = 256, generator: torch.Generator | None = None) -> float:
        """As `ReferenceBank.prefill`, with the same data on every process, of which each keeps its part.

        Nothing but the seed of the random order travels; without a `generator` the first process draws it.
        """
        if generator is None and (isinstance(data, (Tensor, tuple)) or hasattr(data, "__getitem__")):
            seed = torch.randint(2**62, (1,)).to(self.rows.device)
            generator = torch.Generator().manual_seed(int(self._wait(self._gather(seed)[0])[0]))
        self._meet()
        filled = super().prefill(data, batch_size=batch_size, generator=generator)
        self._meet()
        return filled

    def _store(self, values: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        """Push rows (N, *S) of the bank's dtype, which every process has, in order; stray labels are skipped."""
        rings, rows = max(1, self.num_classes), torch.arange(len(labels), device=labels.device)
        self._check_range(labels, 0, rings)
        known, y = (labels >= 0) & (labels < rings), labels.clamp(0, rings - 1)
        ordered, order = labels.sort(stable=True)
        first = torch.searchsorted(ordered, labels)
        among = torch.searchsorted(ordered, labels, right=True) - first  # rows of the same label
        rank = torch.empty_like(labels).scatter_(0, order, rows) - first  # of a row among them
        self._write(values, indices, y, (self.heads[y] + rank) % self.capacity, known & (rank >= among - self.capacity))
        pushed = torch.zeros_like(self.counts).index_add_(0, y, known.to(self.counts.dtype))
        if self.num_classes and self.null == "ring":  # the last ring takes every row
            slot = (self.heads[-1] + rows) % self.capacity
            self._write(values, indices, self.num_classes, slot, rows >= len(rows) - self.capacity)
            pushed[-1].fill_(len(rows))  # an assignment would copy a scalar from the host
        self.heads.add_(pushed).remainder_(self.capacity)
        self.counts.add_(pushed).clamp_(max=self.capacity)
        self._count()

    def _write(self, values: Tensor, indices: Tensor | None, y: Tensor | int, slot: Tensor, kept: Tensor) -> None:
        """Write those rows into slots (N,) of rings y that are `kept` and whose slot is here."""
        own = kept & ((slot + y) % self.parts == self.part)
        at = torch.where(own, y * self.local_capacity + slot // self.parts, len(self.rows) - 1)
        self.rows.index_copy_(0, at, values)
        if indices is not None:
            self.row_indices.index_copy_(0, at, indices)

    def _count(self) -> None:
        """What follows from `counts`."""
        self.local_counts.copy_((self.counts - self._first + (self.parts - 1)) // self.parts)
        empty = torch.cat([self.local_counts == 0, (self.local_counts == 0).all()[None]])
        self._nothing.copy_(torch.where(empty, -math.inf, math.nan))

    # -- drawing

    def _take(
        self,
        group,
        u,
        fallback=None,
        noise=None,
        t=None,
        *,
        path="linear",
        t_min=0.0,
        indexed=False,
        send="",
        pushed=False,
    ):
        if self.link is None:
            return super()._take(group, u, fallback, noise, t, path=path, t_min=t_min, indexed=indexed)
        self._check_alike("draw", u)
        about = self._order, self.counts, u, group, fallback, noise, t, path, t_min
        heads = self.heads if pushed else None
        *drawn, index = peer_memory.draw(*about, self.capacity, indexed, send, heads, self.local_counts, self.link.name)
        return *drawn, index if indexed else None

    def _drawn_from(
        self, group: Tensor | None, u: Tensor, *, indexed: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The references that u (N,) picks, brought from the processes that hold them: a table (P N, 1, *S)."""
        self._check_alike("draw", u)
        n = len(u)
        ring = torch.zeros_like(u) if group is None else group.double()
        asked = self._wait(self._gather(torch.stack([u, ring], 1))[0])
        ring = asked[:, 1].long()
        self._check_range(ring, -1, len(self.counts))
        slot = _slots(self.counts.long(), self.capacity, asked[:, 0], ring)
        y, s = slot // self.capacity, slot % self.capacity
        owner = (s + y) % self.parts
        own = (slot >= 0) & (owner == self.part)
        at = torch.where(own, y * self.local_capacity + s // self.parts, len(self.rows) - 1)
        table = self._wait(self._exchange(self.rows[at]))[:, None]
        indices = self._wait(self._exchange(self.row_indices[at])) if indexed else None
        mine = slice(self.part * n, (self.part + 1) * n)
        slot, ring = slot[mine], ring[mine]
        pick = owner[mine] * n + torch.arange(n, device=u.device)
        # Not (slot >= 0).repeat(P), which torch 2.11's inductor gets wrong on CUDA.
        counts = torch.zeros(len(table), dtype=torch.int32, device=u.device).scatter_(0, pick, (slot >= 0).int())
        pick = pick.masked_fill((ring < -1) | (ring >= len(self.counts)), len(table))  # NaN, as in the op
        return table, counts, pick, indices

    # -- targets

    def _target(self, path, x_t, t, group, source, prediction, precision, sent=False) -> Tensor:
        check_prediction(prediction)
        if self.link is not None and path.name is not None:  # the kernels know it
            on = {"path": path.name, "prediction": prediction, "sent": sent and self.rows.dtype != torch.float64}
            return self._over_peers(x_t, t, None, group, source, precision, **on)
        at = path.coefficients(clamp_time(t.double()))
        factors = prediction_coefficients(prediction, at)
        if self.link is not None:
            return self._over_peers(x_t, at.alpha, at.sigma, group, source, precision, factors)
        mean = self.posterior_mean(x_t, at.alpha, at.sigma, group, source, precision=precision)
        return affine_step(x_t, mean, *factors)

    @torch.no_grad()
    def posterior_mean(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        group: Tensor | None = None,
        source: Tensor | None = None,
        *,
        precision: str = "exact",
    ) -> Tensor:
        """Posterior mean over the references of all processes; collective, with the same number of rows everywhere.

        Args:
            x: (N, *S) noisy samples, of the same dtype everywhere.
            alpha, sigma: (N,) float32 or float64.
            group: (N,) int64 rings, -1 for all of them, as `groups` gives them; None for an unconditional bank.
            source: (N, *S), one more reference for its own row alone. It does not travel.
            precision: "exact" or "fast".

        Returns:
            (N, *S) float32, or float64 for float64 x. A row without any reference or with NaN in it is NaN.
        """
        if self.link is not None:
            return self._over_peers(x, alpha.double(), sigma.double(), group, source, precision)
        self._check_rows(x)
        ring = torch.zeros_like(alpha) if group is None else group
        about = torch.stack([alpha.double(), sigma.double(), ring.double()], 1)
        size = max(1, -(-len(x) // self.portions))
        coming = [self._gather(*both) for both in zip(x.split(size), about.split(size), strict=True)]
        going = []
        for rows, those in coming:
            part = self._part(self._wait(rows), self._wait(those), group is None, precision)
            going.append(self._exchange(part))
        back = [self._wait(part).unflatten(0, (self.parts, len(part) // self.parts)) for part in going]
        return self._merge(back[0] if len(back) == 1 else torch.cat(back, 1), x, alpha, sigma, source)

    @torch.no_grad()
    def _over_peers(
        self,
        x,
        time_or_alpha,
        sigma,
        group,
        source,
        precision,
        factors=(None, None),
        *,
        path="",
        prediction="x0",
        sent=False,
    ) -> Tensor:
        """The prediction at times on a path; for alpha and sigma a x + b mean of factors (a, b), or the mean itself."""
        self._check_rows(x)
        given = self._order, x, time_or_alpha, sigma, group, self.counts, self.local_counts, *factors, source
        return peer_memory.target(*given, path, prediction, precision, sent, self.link.name)

    def _check_rows(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x_t: expected shape (N, *S) with S = {self.shape}, got {tuple(x.shape)}")
        self._check_alike("target", x)

    def _part(self, x: Tensor, about: Tensor, one_ring: bool, precision: str) -> Tensor:
        """Rows x (N, *S) over this part: mean (N, D) and, in the last columns, the bits of the float64 lse."""
        alpha, sigma, group = about[:, 0], about[:, 1], about[:, 2].long()
        if one_ring:
            mean, lse = posterior_part(x, self.refs[0], alpha, sigma, None, self.local_counts, precision=precision)
        else:
            mean, lse = posterior_part(x, self.refs, alpha, sigma, group, self.local_counts, precision=precision)
        lse = torch.where(lse.isnan(), self._nothing[group.clamp(-1, len(self.counts) - 1)], lse)
        bits = lse.view(mean.dtype).reshape(len(x), 8 // mean.element_size())
        return torch.cat([mean.reshape(len(x), math.prod(self.shape)), bits], 1)

    def _merge(self, back: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, source: Tensor | None) -> Tensor:
        """What the parts gave for the own rows, (P, N, D + columns of lse), weighted by their shares of the whole."""
        d = math.prod(self.shape)
        bits = back[..., d:].clone(memory_format=torch.contiguous_format)  # at an even offset, also without rows
        mean, lse = back[..., :d], bits.view(torch.float64)[..., 0]
        if source is not None:  # one part more, of one reference to a row
            rows = torch.arange(len(x), device=x.device)
            _, own = posterior_part(x, source[:, None], alpha, sigma, rows)
            lse = torch.cat([lse, own[None]])
        share = torch.softmax(lse, 0)  # NaN in rows without a reference, and where one part is broken
        weight = share.to(mean.dtype)[:, :, None]
        parts = weight[: self.parts]
        merged = (torch.where(parts > 0, mean, 0.0) * parts).sum(0)  # an empty part's mean is NaN
        if source is not None:
            merged = merged + weight[-1] * source.reshape(merged.shape)
        return merged.reshape(x.shape)

    # -- collectives: nothing where there is one process

    def _gather(self, *own: Tensor) -> Sequence[Tensor]:
        """Each (N, ...) of every process -> (P N, ...), by rank; to be waited for one by one."""
        if self.parts == 1:
            return own
        sent = [part.contiguous() for part in own]
        if len(sent) > 1 and sent[0].is_cuda:  # one launch of NCCL; gloo would make all of one dtype
            return self._call(_OPS.all_gather_into_tensor_coalesced, sent, self.parts, self._name)
        return [self._start(_OPS.all_gather_into_tensor, part, self.parts, self._name) for part in sent]

    def _exchange(self, sent: Tensor) -> Tensor:
        """(P N, ...), N rows for each process -> (P N, ...), N rows from each; to be waited for."""
        if self.parts == 1:
            return sent
        sizes = [sent.shape[0] // self.parts] * self.parts
        return self._start(_OPS.all_to_all_single, sent.contiguous(), sizes, sizes, self._name)

    def _start(self, collective: Callable[..., Any], sent: Tensor, *about: Any) -> Tensor:
        """One at a time on the CPU: gloo's memory is not safe with several under way (seen in torch 2.13)."""
        coming = self._call(collective, sent, *about)
        return coming if sent.is_cuda else self._wait(coming)

    def _wait(self, coming: Tensor) -> Tensor:
        """Also of what has been waited for."""
        return coming if self.parts == 1 else self._call(_OPS.wait_tensor, coming)

    def _call(self, collective: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return collective(*args)
        try:
            return collective(*args)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(self.lost("a step")) from error

    def lost(self, during: str) -> str:
        """The message for a collective that failed."""
        return (
            f"ShardedReferenceBank: expected all {self.parts} processes of the group to take part in {during}; process "
            f"{self.part} waited for one that has ended, or did not answer within the group's timeout"
        )

    def _meet(self) -> None:
        """Where others may read or write this part, the device waits until they have come so far."""
        if self.link is not None:
            self.link.meet()

    def _apply(self, fn, recurse=True):
        """As of any module; a part that has moved is no longer where the others reach it: collectives from then on."""
        before = self.rows.data_ptr()
        super()._apply(fn, recurse)
        if self.rows.data_ptr() != before:
            self.link = None
        return self

    # -- checks

    def _check_alike(self, method: str, rows: Tensor) -> None:
        """That every process brings as many rows (N, ...) of the same dtype, or all raise.

        Compared through the group's store, by the host alone, and only where a process brings other rows than in its
        last call: where that is so on one process and not on all, it waits until the group's timeout.
        """
        if self.parts == 1 or torch.compiler.is_compiling():
            return
        brought = f"{method}: {len(rows)} rows of {str(rows.dtype).removeprefix('torch.')}"
        if self._brought.get(method) == brought:
            return
        everywhere = compare(self.group, brought)
        if everywhere is None:
            raise RuntimeError(f"{self.lost('a step')}, or whose rows are as before; here {brought}")
        if set(everywhere) != {brought}:
            got = ", ".join(f"process {part} {given}" for part, given in enumerate(everywhere))
            raise ValueError(f"rows: expected as many on every process, and of the same dtype, got {got}")
        self._brought[method] = brought

    def _check_range(self, labels: Tensor, low: int, end: int) -> None:
        """On the CPU, of the labels of all processes, so that all of them raise; in a compiled graph none is read."""
        if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
            return
        least, most = int(labels.min()), int(labels.max())
        if least < low or most >= end:
            raise RuntimeError(f"labels: expected values in [{low}, {end}), got values in [{least}, {most}]")

    # -- checkpoints

    def save(self, folder: str | os.PathLike) -> None:
        """Write the bank with torch.distributed.checkpoint, all or nothing; collective.

        The files are written to a folder beside it, which is renamed when every process has written and flushed its
        own. Whichever process is killed, and whenever: `folder` is whole or not there, and the others get an error.
        Banks along other dimensions of a mesh have folders of their own.

        Args:
            folder: what is to hold the files, on storage that all processes share; it must not exist.

        Raises:
            ValueError: when it exists, or cannot be made.
            RuntimeError: when a process of the group does not take part.
        """
        from . import sharded_checkpoint

        sharded_checkpoint.save(self, folder)

    def load(self, folder: str | os.PathLike) -> None:
        """Take up what `save` wrote, with any number of processes; collective.

        The rings, their order and so all later draws are those of the bank that was saved. A process reads the parts
        that can hold something for it: where the two numbers of processes have the common divisor g, one in g.

        Raises:
            ValueError: when the folder does not hold a whole bank of this shape, capacity, null policy and dtype.
            RuntimeError: when a process of the group does not take part.
        """
        from . import sharded_checkpoint

        self._meet()
        sharded_checkpoint.load(self, folder)

    def pieces(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the counts of the whole rings, and this part under names that say which part it is.

        The same as `state_dict`, so the keys of two processes differ and torch.distributed.checkpoint saves them all.
        """
        state = {
            "layout": torch.tensor([self.capacity, len(self.counts), self.num_classes]),
            "counts": self.counts,
            "heads": self.heads,
        }
        for name, rows in self._stored().items():
            size = max(1, PIECE_BYTES // max(1, rows[0].nbytes))
            for first in range(0, len(rows) - 1, size):
                piece = rows[first : min(first + size, len(rows) - 1)]
                state[f"{name}.{self.part}of{self.parts}.{first}"] = piece
        return state

    def place(self, key: str, piece: Tensor) -> None:
        """Keep, of a piece that some process had under this name, what belongs to this process."""
        name = split_key(key)[0]
        y, slot = slots_of(key, len(piece), self.capacity)
        own = (slot < self.capacity) & ((slot + y) % self.parts == self.part)
        rows = self._stored()[name]
        rows[(y * self.local_capacity + slot // self.parts)[own].to(rows.device)] = piece[own].to(rows.device)

    def load_whole(self, state: dict[str, Tensor]) -> None:
        """Keep this process's part of the state dict of a `ReferenceBank`, which every process has."""
        pieces = {f"{name}.0of1.0": state[name].flatten(0, 1) for name in ("refs", "indices") if name in state}
        groups, capacity = state["refs"].shape[:2]
        about = {key: (tuple(piece.shape), piece.dtype) for key, piece in pieces.items()}
        self.check_saved([capacity, groups, self.num_classes], about, "the state dict")
        self._meet()
        for key, piece in pieces.items():
            self.place(key, piece)
        self.take_counts(state["counts"], state["heads"])

    def take_counts(self, counts: Tensor, heads: Tensor) -> None:
        """Take over the counts and heads (G,) of the whole rings."""
        self.counts.copy_(counts)
        self.heads.copy_(heads)
        self._count()
        self._meet()

    def check_saved(
        self, layout: list[int], pieces: dict[str, tuple[tuple[int, ...], torch.dtype]], place: str
    ) -> None:
        """Refuse what could only be restored approximately; `pieces` are the shapes and dtypes of what was saved."""
        refs = next(about for key, about in pieces.items() if key.startswith("refs."))
        theirs = [*layout, refs[0][1:], refs[1], any(key.startswith("indices.") for key in pieces)]
        ours = [self.capacity, len(self.counts), self.num_classes, self.shape, self.rows.dtype, self.track_indices]
        names = ("capacity", "rings", "num_classes", "shape", "dtype", "track_indices")
        for name, mine, saved in zip(names, ours, theirs, strict=True):
            if mine != saved:
                raise ValueError(
                    f"{name}: expected {saved} as in {place}, got {mine} (null = {self.null!r}): build the bank as it "
                    "was saved"
                )

    def _stored(self) -> dict[str, Tensor]:
        return {"refs": self.rows} | ({"indices": self.row_indices} if self.track_indices else {})

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for key, value in self.pieces().items():
            destination[prefix + key] = value

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, *args):
        """The same part of the same number of parts; `load` is for another number."""
        keys = self.pieces().keys()
        given = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
        missing = [key for key in keys if key not in given]
        missing_keys += [prefix + key for key in missing]
        unexpected_keys += [prefix + key for key in given if key not in keys] if strict else []
        if missing:
            return
        about = {key: (tuple(given[key].shape), given[key].dtype) for key in keys if _PIECE.fullmatch(key)}
        self.check_saved(given["layout"].tolist(), about, "the state dict")
        self._meet()
        for key in about:
            self.place(key, given[key])
        self.take_counts(given["counts"], given["heads"])


_OPS = torch.ops._c10d_functional
_COMPARED: dict[str, int] = {}  # by group: how often its processes have compared what they bring
_PIECE = re.compile(r"(refs|indices)\.(\d+)of(\d+)\.(\d+)")


def split_key(key: str) -> tuple[str, int, int, int] | None:
    """The name of a piece as (what it holds, part, parts, first row of the part); None for another name."""
    found = _PIECE.fullmatch(key)
    return None if found is None else (found[1], int(found[2]), int(found[3]), int(found[4]))


def slots_of(key: str, rows: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Ring and slot (rows,) of every row of a piece of this name; a slot from `capacity` on is not in use."""
    _, part, parts, first = split_key(key)
    at = first + torch.arange(rows)
    local = -(-capacity // parts)
    y = at // local
    return y, at % local * parts + (part - y) % parts


def compare(group: dist.ProcessGroup, said: str) -> list[str] | None:
    """What every process of the group says at this call, by rank; None when one says nothing within the timeout."""
    store, name, parts, part = group.get_group_store(), group.group_name, group.size(), group.rank()
    call = _COMPARED[name] = _COMPARED.get(name, 0) + 1
    keys = [f"svel/{call}/{of}" for of in range(parts)]
    store.set(keys[part], said)
    try:
        store.wait(keys)
    except RuntimeError:  # of a file store, and the base of a DistStoreError
        return None
    everywhere = [store.get(key).decode() for key in keys]
    if call > 1:  # all have read what was said before this
        store.delete_key(f"svel/{call - 1}/{part}")
    return everywhere


def _link(
    group: dist.ProcessGroup | None, device: torch.device | str | None, portions: int, wanted: bool | None
) -> peer_memory.Link | None:
    """The processes' memory, where `wanted` or where it can be and is not unwanted."""
    if wanted is False or (wanted is None and portions > 1):
        return None
    if wanted and portions > 1:
        raise ValueError(f"portions: expected 1 with peer_memory=True, got {portions}")
    link = peer_memory.connect(group, device, compare)
    if wanted and link is None:
        raise ValueError(
            "peer_memory: expected False or None, because not all processes of the group have a GPU of one host that "
            "reaches those of the others; got True"
        )
    return link


def _process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group: expected a DeviceMesh of one dimension, got {group.ndim}: take one, mesh[name]")
        return group.get_group()
    if group is None:
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"group: expected a process group that this process is in, a DeviceMesh or None, got {group!r}"
        )
    return group


def _slots(counts: Tensor, capacity: int, u: Tensor, ring: Tensor) -> Tensor:
    """As `bank_draw` numbers them: the slot y M + s that u (N,) picks of ring (N,), -1 from an empty ring.

    The valid references of all rings, for ring -1, are numbered one ring after the other. A ring out of range gives -1.
    """
    ends = counts.cumsum(0)
    everything, known = ring == -1, (ring >= -1) & (ring < len(counts))
    y = ring.masked_fill((ring < 0) | ~known, 0)
    count = torch.where(everything, ends[-1], counts[y])
    first = torch.where(everything, 0, (ends - counts)[y])
    # u < 1, but u * count may round up to count
    number = first + torch.minimum((u.clamp(0, 1) * count).long(), count - 1).clamp_min(0)
    y = torch.searchsorted(ends, number, right=True).clamp_max(len(counts) - 1)
    return torch.where(known & (count > 0), y * capacity + number - (ends - counts)[y], -1)

"""A `ShardedReferenceBank` on the GPUs of one host, which read and write one another's memory.

    link = connect(group, device)                # None where they cannot
    rows = link.zeros(shape, dtype, "rows")      # a tensor of this process that all of them reach

The exchanges of the bank are then kernels that write to the other GPUs and read from them (NVLink), and flags in memory
tell when: microseconds where a collective takes tens of them, and nothing for the host to do. The memory is that of
torch.distributed._symmetric_memory, without multicast. Three operators, `push`, `draw` and `target`, hold all of it, so
a step compiles and captures as with collectives. Each takes `order`, a tensor that it says it changes and does not:
compilers keep the operators in the order of the program by it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from stablevelocity_kernels import backends, peers, posterior_part

_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@dataclass
class Mailbox:
    """What one kind of exchange needs: a header, then its areas."""

    memory: Tensor  # the own one
    addresses: Tensor  # (P,) int64, of the mailboxes of all processes
    areas: list[Tensor]
    at: list[int]  # where they begin, in bytes


class Link:
    """The memory of the processes of a group, reached by all of them; see `connect`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.part, self.parts = dist.get_rank(group), dist.get_world_size(group)
        self.seconds = group._get_backend(device).options._timeout.total_seconds()
        self.addresses: dict[int, Tensor] = {}  # by that of the own tensor, (P,) int64 of all
        self.served: list[tuple[Tensor, Tensor]] = []  # see serve
        self._mailboxes: dict[tuple, Mailbox] = {}
        self.name = f"link {next(_NUMBERS)}"  # a number would be made symbolic by torch.compile
        _LINKS[self.name] = self

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros that every process of the group reaches; collective."""
        import torch.distributed._symmetric_memory as symmetric

        own = symmetric.empty(shape, dtype=dtype, device=self.device)
        with _without_multicast():
            handle = symmetric.rendezvous(own, self.group)
        self.addresses[own.data_ptr()] = torch.tensor(handle.buffer_ptrs, device=self.device)
        return own.zero_()

    def serve(self, rows: Tensor, indices: Tensor | None, rings: tuple[int, int]) -> None:
        """Serve a bank of G rings of so many slots here: its rows, one more than there are slots, and their indices."""
        for held in (rows, indices):
            if held is not None:
                view = held[:-1].view(*rings, *held.shape[1:])
                self.served.append((view, self.addresses[held.data_ptr()]))

    def mailbox(self, kind: str, *areas: tuple[tuple[int, ...], torch.dtype]) -> Mailbox:
        """That for these areas. The first call with these is collective, and waits for the device."""
        key = kind, *areas
        if key not in self._mailboxes:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"ShardedReferenceBank: expected a {kind} of as many rows before the first one under graph "
                    "capture, to make room for the exchange; got none"
                )
            at, end = [], peers.HEADER_BYTES
            for shape, dtype in areas:
                at.append(end)
                end += -(-math.prod(shape) * dtype.itemsize // 256) * 256
            own = self.zeros((end,), dtype=torch.uint8)
            views = [
                own[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for first, (shape, dtype) in zip(at, areas, strict=True)
            ]
            torch.cuda.synchronize(self.device)
            dist.barrier(self.group)  # all of them are zero now
            self._mailboxes[key] = Mailbox(own, self.addresses[own.data_ptr()], views, at)
        return self._mailboxes[key]

    def gather(self, box: Mailbox, *own: Tensor | None, ready: bool = True) -> None:
        """Rows of every process into the first areas of the mailboxes of all.

        ready: they wait until all have read what the gather before brought; False: a merge has told them.
        """
        like = box.areas[0] if box.areas else box.addresses
        own = (*own, *[None] * (4 - len(own)))
        torch.ops.svel.peers_gather_(box.addresses, self.part, self.seconds, ready, like, *own)


_NUMBERS = itertools.count()
_LINKS: weakref.WeakValueDictionary[str, Link] = weakref.WeakValueDictionary()


def connect(
    group: dist.ProcessGroup | None,
    device: torch.device | str | None,
    compare: Callable[[dist.ProcessGroup, str], list[str] | None],
) -> Link | None:
    """A link of the processes of a group if all of their GPUs reach one another, else None; the same on all of them.

    Args:
        compare: what every process of the group says, by rank.
    """
    device = torch.device("cpu" if device is None else device)
    if group is None or device.type != "cuda" or not 1 < dist.get_world_size(group) <= peers.MAX_PEERS:
        return None
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    native = backends().get("CUDA") == "native"
    everywhere = compare(group, f"{_host()} {uuid}" if native else "none")
    if everywhere is None or "none" in everywhere or len(set(everywhere)) < len(everywhere):
        return None
    alike = {said.split()[0] for said in everywhere} == {_host()}
    seen = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    others = [seen.get(said.split()[1]) for said in everywhere if said.split()[1] != uuid]
    reached = alike and all(i is not None and torch.cuda.can_device_access_peer(device.index, i) for i in others)
    if set(compare(group, str(reached)) or ()) != {"True"}:
        return None
    return Link(group, device)


def _host() -> str:
    """Of the running kernel, the same for all processes of one host."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()}/{file.read().strip()}"
    except OSError:
        return socket.gethostname()


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    before = os.environ.get(_NO_MULTICAST)
    os.environ[_NO_MULTICAST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_MULTICAST]
        else:
            os.environ[_NO_MULTICAST] = before


# -- the operators

_LIBRARY = torch.library.Library("stablevelocity", "FRAGMENT")


def _push(order, counts, heads, local_counts, values, labels, indices, all_to_last, capacity, link) -> None:
    link = _LINKS[link]
    rows, n = link.served[0][0], link.parts * len(labels)
    areas = [((n, *rows.shape[2:]), rows.dtype), ((n,), torch.int64)]
    box = link.mailbox("push", *areas, *([] if indices is None else [areas[1]]))
    link.gather(box, values, labels, indices)
    place = all_to_last, capacity, link.part, link.parts
    push = torch.ops.svel.bank_push_part_
    if indices is not None:
        about = [part.clone() for part in (counts, heads, local_counts)]
        push(link.served[1][0], *about, box.areas[2], box.areas[1], *place)
    push(rows, counts, heads, local_counts, box.areas[0], box.areas[1], *place)


def _target_box(link: Link, x: tuple[int, ...], dtype: torch.dtype, in_rings: bool) -> Mailbox:
    """Of a target of rows of shape x here: alpha, sigma, rings if there are several, x; mean and lse over the part."""
    n = link.parts * x[0]
    rows, numbers = (n, *x[1:]), ((n,), torch.float64)
    mean = torch.float64 if dtype == torch.float64 else torch.float32
    rings = [((n,), torch.int64)] if in_rings else []
    return link.mailbox("target", numbers, numbers, *rings, (rows, dtype), (rows, mean), numbers)


def _draw(order, counts, u, labels, fallback, noise, t, path, t_min, capacity, indexed, send, link):
    link = _LINKS[link]
    meeting = link.mailbox("draw").addresses
    rows, rows_at = link.served[0]
    about = counts, u, labels, fallback, noise, t, path, t_min
    to = None, 0
    if send and t is not None:
        box = _target_box(link, (len(u), *rows.shape[2:]), torch.float32, labels is not None)
        to = box.addresses, box.at[-3]
    us = link.part, link.seconds
    x0, slot, x_t, t_set = torch.ops.svel.bank_draw_parts(meeting, *us, rows_at, capacity, rows, *about, *to)
    index = slot.new_empty(0)
    if indexed:  # the same draw, of words
        own, at = link.served[1]
        about = counts, u, labels, None, None, None, path, t_min
        words = torch.ops.svel.bank_draw_parts(meeting, *us, at, capacity, own.view(torch.float64), *about, None, 0)[0]
        index = words.view(torch.int64).masked_fill(slot < 0, -1)
    return x0, slot, x_t, t_set, index


def _draw_fake(order, counts, u, labels, fallback, noise, t, path, t_min, capacity, indexed, send, link):
    rows, n = _LINKS[link].served[0][0], u.shape[0]
    work = torch.float64 if rows.dtype == torch.float64 else torch.float32
    shape = (n, *rows.shape[2:])
    return (
        u.new_empty(shape, dtype=work),
        u.new_empty((n,), dtype=torch.int64),
        u.new_empty((0,) if t is None else shape, dtype=work),
        u.new_empty((0,), dtype=torch.float32) if t is None else t.new_empty((n,)),
        u.new_empty((n if indexed else 0,), dtype=torch.int64),
    )


def _target(order, x, alpha, sigma, rings, counts, local_counts, a, b, source, precision, sent, link) -> Tensor:
    link = _LINKS[link]
    box = _target_box(link, tuple(x.shape), x.dtype, rings is not None)
    about = [alpha, sigma] if rings is None else [alpha, sigma, rings]
    link.gather(box, *about, *([] if sent else [x]), ready=False)
    *asked, rows, means, lses = box.areas
    labels = asked[2] if rings is not None else None
    refs = link.served[0][0] if rings is not None else link.served[0][0][0]
    to = box.addresses, link.part, *box.at[-2:]
    part = rows, refs, *asked[:2], labels, local_counts, precision
    home = torch.ops.svel.posterior_part_out(*part, means, lses, *to)
    own = None
    if source is not None:  # one part more, of one reference to a row
        each = torch.arange(len(x), device=x.device)
        own = posterior_part(x, source[:, None], alpha, sigma, each)[1]
    about = x, counts, rings, a, b, source, own
    return torch.ops.svel.peers_merge(box.addresses, link.part, link.seconds, *box.at[-2:], home, *about)


def _target_fake(order, x, alpha, sigma, rings, counts, local_counts, a, b, source, precision, sent, link):
    mean = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, dtype=mean if a is None else x.dtype, memory_format=torch.contiguous_format)


def _define(schema: str, run: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"stablevelocity::{name}", fake, lib=_LIBRARY)


_define(
    "bank_push(Tensor(a!) order, Tensor(b!) counts, Tensor(c!) heads, Tensor(d!) local_counts, Tensor values, "
    "Tensor labels, Tensor? indices, bool all_to_last, int capacity, str link) -> ()",
    _push,
    lambda *args: None,
)
_define(
    "bank_draw(Tensor(a!) order, Tensor counts, Tensor u, Tensor? labels, Tensor? fallback, Tensor? noise, Tensor? t, "
    "str path, float t_min, int capacity, bool indexed, bool send, str link) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _draw,
    _draw_fake,
)
_define(
    "bank_target(Tensor(a!) order, Tensor x, Tensor alpha, Tensor sigma, Tensor? rings, Tensor counts, "
    "Tensor local_counts, Tensor? a, Tensor? b, Tensor? source, str precision, bool sent, str link) -> Tensor",
    _target,
    _target_fake,
)
push, draw, target = (getattr(torch.ops.stablevelocity, f"bank_{name}") for name in ("push", "draw", "target"))

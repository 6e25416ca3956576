"""A `ShardedReferenceBank` on the GPUs of one host, which read and write one another's memory.

    link = connect(group, device)                # None where they cannot
    rows = link.zeros(shape, dtype, "rows")      # a tensor of this process that all of them reach

The exchanges of the bank are then kernels that write to the other GPUs and read from them (NVLink), and flags in memory
tell when: microseconds where a collective takes tens of them, and nothing for the host to do. The memory is that of
torch.distributed._symmetric_memory, without multicast. Three operators, `push`, `draw` and `target`, hold all of it, so
a step compiles and captures as with collectives. Each takes `order`, a tensor that it says it changes and does not:
compilers keep the operators in the order of the program by it.

Who writes what another may still read, waits first. A push begins and ends with all processes having come so far, so
a draw, which reads from all parts, waits for nobody; whoever else writes to a part calls `meet` before and after. A
push that is `ahead` of a draw and a target is on a stream beside: the draw begins when all slots are known, and waits
for those rows that it takes. A target begins when all have come, which have then read what the last one brought, and
ends when all parts have been evaluated. A draw of the rows of a target begins that: times and rings travel, and the
list of its work is made, beside the draw; each x_t is there when its process says so.
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

from stablevelocity_kernels import backends, clamp_time, path_coefficients, peers, posterior_part

_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


@dataclass
class Mailbox:
    """What one kind of exchange needs: a header, then its areas."""

    memory: Tensor  # the own one
    addresses: Tensor  # (P,) int64 on the CPU, of those of all processes
    addresses_there: Tensor  # the same on the device
    areas: list[Tensor]
    at: list[int]  # where they begin, in bytes


class Link:
    """The memory of the processes of a group, reached by all of them; see `connect`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.part, self.parts = dist.get_rank(group), dist.get_world_size(group)
        self.seconds = group._get_backend(device).options._timeout.total_seconds()
        self.served: list[tuple[Tensor, Tensor]] = []  # see serve
        self._addresses: dict[int, Tensor] = {}  # by that of the own tensor, (P,) int64 of all
        self._mailboxes: dict[tuple, Mailbox] = {}
        self.fresh: Tensor | None = None  # by ring the rows that the last push brings, and its round
        self.pushed: Mailbox | None = None  # that of this push
        self._side: torch.cuda.Stream | None = None  # where its rows are on their way, and what holds them
        self._on_their_way: tuple[Tensor, ...] = ()
        self.placed: torch.cuda.Event | None = None  # behind what tells its slots
        self.listed: Tensor | None = None  # the work of the target that the last draw is made for
        self.name = f"link {next(_NUMBERS)}"  # a number would be made symbolic by torch.compile
        _LINKS[self.name] = self

    def zeros(self, shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros that every process of the group reaches; collective."""
        import torch.distributed._symmetric_memory as symmetric

        own = symmetric.empty(shape, dtype=dtype, device=self.device)
        with _without_multicast():
            handle = symmetric.rendezvous(own, self.group)
        self._addresses[own.data_ptr()] = torch.tensor(handle.buffer_ptrs)
        return own.zero_()

    def serve(self, rows: Tensor, indices: Tensor | None, rings: tuple[int, int]) -> None:
        """Serve a bank of G rings of so many slots here: its rows, one more than there are slots, and their indices."""
        for held in (rows, indices):
            if held is not None:
                view = held[:-1].view(*rings, *held.shape[1:])
                self.served.append((view, self._addresses[held.data_ptr()]))
        self.fresh = torch.zeros(rings[0] + 1, dtype=torch.int64, device=self.device)

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
            addresses = self._addresses[own.data_ptr()]
            self._mailboxes[key] = Mailbox(own, addresses, addresses.to(self.device), views, at)
        return self._mailboxes[key]

    @contextlib.contextmanager
    def beside(self, *held: Tensor) -> Iterator[None]:
        """On a stream beside the current one, until `join`; what is held there is kept so long."""
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        self._on_their_way = held
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        if self._on_their_way:
            torch.cuda.current_stream(self.device).wait_stream(self._side)
            self._on_their_way, self.placed = (), None

    def gather(self, box: Mailbox, *about: Tensor, x: Tensor | None = None, words: int | None = None) -> None:
        """Rows of every process into the first areas of the mailboxes of all.

        words: where in a mailbox they may go by when they are little, see `peers_gather_`.
        """
        about = (*about, *[None] * (3 - len(about)))
        torch.ops.svel.peers_gather_(box.memory, box.addresses, self.part, self.seconds, *about, x, False, words)

    def meet(self) -> None:
        """Kernels of this stream wait here until those of all processes have come so far."""
        self.join()
        self.gather(self.mailbox("meeting"))


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
    kind = f"{_host()}/{torch.cuda.get_device_name(device)}"  # other kinds would plan other kernels for the same rows
    native = backends().get("CUDA") == "native"
    everywhere = compare(group, f"{_uuid(device.index)} {kind if native else None}") or ["none none"]
    uuids, kinds = zip(*(said.split(" ", 1) for said in everywhere), strict=True)
    seen = {_uuid(i): i for i in range(torch.cuda.device_count())}
    reached = (
        set(kinds) == {kind}
        and len(set(uuids)) == len(uuids)
        and all(
            uuid in seen and (seen[uuid] == device.index or torch.cuda.can_device_access_peer(device.index, seen[uuid]))
            for uuid in uuids
        )
    )
    if set(compare(group, str(reached)) or ()) != {"True"}:
        return None
    return Link(group, device)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


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


def _push(order, counts, heads, local_counts, values, labels, indices, all_to_last, capacity, ahead, link) -> None:
    link = _LINKS[link]
    box = link.mailbox("push", ((2, link.parts * len(labels)), torch.int64))
    link.join()
    link.pushed = box if ahead else None
    push, us = torch.ops.svel.bank_push_parts_, (box.addresses, link.part, link.seconds, link.fresh if ahead else None)
    if indices is not None:
        own, at = link.served[1]
        about = [part.clone() for part in (counts, heads, local_counts)]
        push(own, *about, indices, labels, all_to_last, capacity, at, *us)
    own, at = link.served[0]
    given = own, counts, heads, local_counts, values, labels, all_to_last, capacity, at, *us
    if not ahead:
        return push(*given)
    places = labels.new_empty(4 * link.parts * len(labels))
    with link.beside(values, labels, places):
        push(*given, places, 1)
        link.placed = torch.cuda.current_stream(link.device).record_event()
        push(*given, places, 2)


def _draw(
    order, counts, u, labels, fallback, noise, t, path, t_min, capacity, indexed, send, heads, local_counts, link
):
    link, also = _LINKS[link], None
    served = link.served
    own, at = served[0]
    placed, link.placed, link.listed = link.placed, None, None
    if placed is not None:
        torch.cuda.current_stream(link.device).wait_event(placed)
    if send and t is not None and own.dtype != torch.float64:  # x_t is float32: it is what the target will be given
        scalars = [t.dtype] if labels is None else [t.dtype, torch.int64]
        box = _target_box(link, (len(u), *own.shape[2:]), torch.float32, scalars)
        xs = box.areas[-4]
        also = xs[link.part * len(u) :][: len(u)]
        if labels is not None and t.dtype == torch.float32:
            link.listed = _list_ahead(link, box, xs, own, t, labels, local_counts, t_min, send)
    draw, about = torch.ops.svel.bank_draw_parts, (counts, u, labels)
    fresh = (None, None, None) if heads is None else (heads, link.fresh, link.pushed.addresses)
    fresh = *fresh, link.part, link.seconds
    of_rows = fallback, noise, t, path, t_min, also
    x0, slot, x_t, t_set = draw(at, capacity, own, *about, *of_rows, *fresh, link.listed is not None)
    index = slot.new_empty(0)
    if indexed:  # the same draw, of words
        own, at = served[1]
        words = draw(at, capacity, own.view(torch.float64), *about, None, None, None, path, t_min, None, *fresh)[0]
        index = words.view(torch.int64).masked_fill(slot < 0, -1)
    return x0, slot, x_t, t_set, index


def _list_ahead(link, box, xs, own, t, labels, local_counts, t_min, precision) -> Tensor | None:
    """Begin a target of rows xs, those of a draw that follows; None where that has to wait for them."""
    times, rings = box.areas[:2]
    if torch.ops.svel.part_goes_home(xs, own, rings, precision) < 3:
        return None
    us = box.addresses_there, link.part, t, labels, t_min, box.at[-1], link.seconds, box.addresses
    return torch.ops.svel.posterior_part_list(xs, own, times, rings, local_counts, precision, *us)


def _draw_fake(
    order, counts, u, labels, fallback, noise, t, path, t_min, capacity, indexed, send, heads, local_counts, link
):
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


def _target_box(link: Link, x: tuple[int, ...], dtype: torch.dtype, scalars: list[torch.dtype]) -> Mailbox:
    """Of a target of rows of shape x here: scalars and x; mean and lse over the part; words for the scalars."""
    n = link.parts * x[0]
    rows, mean = (n, *x[1:]), torch.float64 if dtype == torch.float64 else torch.float32
    words = n * sum(-(-scalar.itemsize // 4) for scalar in scalars)
    given = [((n,), scalar) for scalar in scalars]
    results = (rows, mean), ((n,), torch.float64)
    return link.mailbox("target", *given, (rows, dtype), *results, ((words,), torch.int64))


def _target(
    order, x, time_or_alpha, sigma, rings, counts, local_counts, a, b, source, path, prediction, precision, sent, link
) -> Tensor:
    link = _LINKS[link]
    listed, link.listed = link.listed if sent else None, None
    if listed is None:  # else the draw has waited for it
        link.join()
    about = [given for given in (time_or_alpha, sigma, rings) if given is not None]
    if any(given.shape != x.shape[:1] for given in about):
        raise ValueError(f"t, labels: expected shape (N,) = ({len(x)},), got {[tuple(given.shape) for given in about]}")
    box = _target_box(link, tuple(x.shape), x.dtype, [given.dtype for given in about])
    *asked, xs, means, lses, _ = box.areas
    *_, xs_at, means_at, lses_at, words = box.at
    refs = link.served[0][0] if rings is not None else link.served[0][0][0]
    labels = asked.pop() if rings is not None else None
    scalars = (*asked, None)[:2]
    home, merged = torch.ops.svel.part_goes_home(xs, refs, labels, precision), None
    to = None, link.part, xs_at, means_at, lses_at
    if home:
        own = (*about, None, None)[:3]
        to = box.addresses_there, *to[1:], *own, None if sent else x, words, link.seconds, box.addresses
        if home >= 2 and path and source is None:
            rows = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
            merged = torch.empty_like(rows)
            to = *to, merged, rows, prediction, listed
    else:
        link.gather(box, *about, x=x, words=words)
    torch.ops.svel.posterior_part_out(xs, refs, *scalars, path, labels, local_counts, precision, means, lses, *to)
    if merged is not None:
        link.join()
        return merged
    lse = None
    if source is not None:  # one part more, of one reference to a row
        alpha = time_or_alpha
        if sigma is None:
            alpha, sigma = path_coefficients(path, clamp_time(time_or_alpha.double()))[:2]
        each = torch.arange(len(x), device=x.device)
        lse = posterior_part(x, source[:, None], alpha, sigma, each)[1]
    on = time_or_alpha if path else None, path, prediction
    us, parts = (box.addresses, link.part, link.seconds), (means_at, lses_at, home > 0)
    return torch.ops.svel.peers_merge(*us, *parts, x, counts, rings, a, b, *on, source, lse)


def _target_fake(
    order, x, time_or_alpha, sigma, rings, counts, local_counts, a, b, source, path, prediction, precision, sent, link
) -> Tensor:
    mean = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = x.dtype if path or a is not None else mean
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _define(schema: str, run: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"stablevelocity::{name}", fake, lib=_LIBRARY)


# values, labels and indices of this process; with all_to_last the last ring takes every row. ahead: a draw follows that
# is given `heads`, and then a target: the draw waits for those rows that it takes, and others may be on their way.
_define(
    "bank_push(Tensor(a!) order, Tensor(b!) counts, Tensor(c!) heads, Tensor(d!) local_counts, Tensor values, "
    "Tensor labels, Tensor? indices, bool all_to_last, int capacity, bool ahead, str link) -> ()",
    _push,
    lambda *args: None,
)
# x0, slot, x_t and t_set as of bank_draw, and the index of each row. send: the precision of a target of these x_t at
# these t_set, which follows and is `sent`; else "".
_define(
    "bank_draw(Tensor(a!) order, Tensor counts, Tensor u, Tensor? labels, Tensor? fallback, Tensor? noise, Tensor? t, "
    "str path, float t_min, int capacity, bool indexed, str send, Tensor? heads, Tensor local_counts, str link) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _draw,
    _draw_fake,
)
# The prediction at times on a path; or, where path is "", for alpha and sigma: a x + b mean, or the mean itself.
_define(
    "bank_target(Tensor(a!) order, Tensor x, Tensor time_or_alpha, Tensor? sigma, Tensor? rings, Tensor counts, "
    "Tensor local_counts, Tensor? a, Tensor? b, Tensor? source, str path, str prediction, str precision, bool sent, "
    "str link) -> Tensor",
    _target,
    _target_fake,
)

push = torch.ops.stablevelocity.bank_push
draw = torch.ops.stablevelocity.bank_draw
target = torch.ops.stablevelocity.bank_target

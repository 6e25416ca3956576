"""Ops of a bank in parts that reach one another's memory: the parts here are on streams of one GPU."""

import math

import pytest
import torch
from kernel_cases import between

from stablevelocity_kernels import (
    backends,
    bank_draw,
    bank_push_,
    path_coefficients,
    peers,
    posterior_part,
    prediction_coefficients,
    stable_target,
)
from stablevelocity_kernels.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(backends().get("CUDA") != "native", reason="the ops are compiled"),
]
svel = torch.ops.svel
PARTS, RINGS, CAPACITY = 3, 5, 7
LOCAL = -(-CAPACITY // PARTS)
PATIENCE = 20.0  # seconds


def mailboxes(size):
    """One for each part, and their addresses."""
    boxes = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(PARTS)]
    return boxes, addresses_of(boxes)


@pytest.fixture(scope="module", autouse=True)
def _loaded():
    """All kernels, each by one part alone: loading one while another waits on the device may wait for that."""
    box = torch.zeros(1 << 16, dtype=torch.uint8, device="cuda")
    address = addresses_of([box])
    counts, rows = torch.zeros(3, 1, dtype=torch.int32, device="cuda"), torch.zeros(1, 8, device="cuda")
    labels = torch.zeros(1, dtype=torch.int64, device="cuda")
    for dtype in (torch.float32, torch.float64):
        refs = torch.zeros(1, 1, 8, dtype=dtype, device="cuda")
        at = addresses_of([refs])
        svel.bank_push_parts_(refs, *counts, rows, labels, False, 1, at, address, 0, PATIENCE)
        svel.peers_gather_(box, address, 0, PATIENCE, labels, labels.half(), labels.float(), rows, False, None)
        svel.peers_gather_(box, address, 0, PATIENCE, labels, None, None, None, False, 2048)
        svel.bank_draw_parts(at, 1, refs, counts[0], rows[0, :1], None, None, None, None, "linear", 0.0, None)
        about = rows.to(dtype), counts[0], None, None, None, None, "", "x0", None, None
        svel.peers_merge(address, 0, PATIENCE, 512, 1024, True, *about)
    torch.cuda.synchronize()


def addresses_of(tensors):
    return torch.tensor([own.data_ptr() for own in tensors])


def all_parts(call, parts=PARTS):
    """What call(part) gives on a stream for each part, all of them under way at once."""
    streams, results = [torch.cuda.Stream() for _ in range(parts)], []
    torch.cuda.synchronize()
    for part, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            results.append(call(part))
    torch.cuda.synchronize()
    return results


def make_rings(dtype, d, seed=0):
    """(refs, counts, heads) of one bank after some pushes, and the same of every part with its local counts."""
    rng = torch.Generator("cuda").manual_seed(seed)
    whole = [torch.zeros(RINGS, CAPACITY, d, dtype=dtype, device="cuda")]
    whole += [torch.zeros(RINGS, dtype=torch.int32, device="cuda") for _ in range(2)]
    parts = [
        [torch.zeros(RINGS, LOCAL, d, dtype=dtype, device="cuda")]
        + [torch.zeros(RINGS, dtype=torch.int32, device="cuda") for _ in range(3)]
        for _ in range(PARTS)
    ]
    at = addresses_of(own[0] for own in parts)
    for rows in (4, 1, 30, 0, 7, 64):  # of each part; 64: more than the rings hold
        values = torch.randn(PARTS, rows, d, device="cuda", generator=rng)
        labels = torch.randint(-1, RINGS - 2, (PARTS, rows), device="cuda", generator=rng)  # ring 3 stays empty
        bank_push_(*whole, values.flatten(0, 1), labels.flatten(), all_to_last=True)
        boxes, addresses = mailboxes(512 + 2 * PARTS * rows * 8)
        all_parts(
            lambda part, values=values, labels=labels, addresses=addresses: svel.bank_push_parts_(
                *parts[part], values[part], labels[part], True, CAPACITY, at, addresses, part, PATIENCE
            )
        )
        del boxes  # which had to be there until now
    return whole, parts, at


@pytest.mark.parametrize("d", [1, 40, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pushes_keep_the_slots_of_every_part(dtype, d):
    (refs, counts, heads), parts, _ = make_rings(dtype, d)
    for part, (own, own_counts, own_heads, local_counts) in enumerate(parts):
        assert torch.equal(own_counts, counts)
        assert torch.equal(own_heads, heads)
        for y, count in enumerate(counts.tolist()):
            slots = [s for s in range(count) if (s + y) % PARTS == part]
            assert local_counts[y] == len(slots)
            assert torch.equal(own[y, : len(slots)], refs[y, slots])


@pytest.mark.parametrize("d", [1, 40, 1000, 4096])
def test_draws_are_those_of_one_bank(d):
    (refs, counts, _), parts, at = make_rings(torch.float16, d)
    rng = torch.Generator("cuda").manual_seed(1)
    n = 40
    labels = torch.randint(-1, RINGS + 1, (n,), device="cuda", generator=rng)  # one beyond the last, too
    u, t = torch.rand(n, dtype=torch.float64, device="cuda", generator=rng), torch.rand(n, device="cuda")
    noise = torch.randn(n, d, device="cuda", generator=rng)
    for fallback in (None, torch.randn(n, d, device="cuda")):
        about = counts, u, labels, fallback, noise, t
        whole = bank_draw(refs, *about, t_min=0.3)
        for own in parts:
            also = torch.full((n, d), torch.nan, device="cuda")
            ours = svel.bank_draw_parts(at, CAPACITY, own[0], *about, "linear", 0.3, also)
            assert torch.equal(also.nan_to_num(), whole[2].nan_to_num())
            for one, other in zip(ours, whole, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num())
                assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("stays", [False, True])
def test_a_gather_brings_the_rows_of_all_in_every_round(rows, stays):
    words = [torch.randint(2**40, (rows,), device="cuda") for _ in range(PARTS)]
    halves = [torch.randn(rows, 1001, device="cuda").half() for _ in range(PARTS)]
    x = [torch.randn(rows, 1001, device="cuda") for _ in range(PARTS)]
    begins, end = [], 512
    for given in (words, halves, x):
        begins.append(end)
        end += -(-PARTS * given[0].nbytes // 256) * 256
    boxes, addresses = mailboxes(end)
    for scale in (1, 2, 3):
        sent = [[given[part] * scale for given in (words, halves, x)] for part in range(PARTS)]
        all_parts(
            lambda part, sent=sent: svel.peers_gather_(
                boxes[part], addresses, part, PATIENCE, sent[part][0], sent[part][1], None, sent[part][2], stays, None
            )
        )
        for part, box in enumerate(boxes):
            for i, begin in enumerate(begins):
                whole = torch.stack([own[i] for own in sent])
                came = box[begin : begin + whole.nbytes].view(whole.dtype).view(whole.shape)
                if i == 2 and stays:
                    assert torch.equal(came[part], whole[part])
                    came[part] = 0
                    assert not came.any()
                else:
                    assert torch.equal(came, whole)


@pytest.mark.parametrize("rows", [1, 3, 64, 2000])  # the last is not little
def test_little_goes_by_words(rows):
    end = 512 + 3 * -(-PARTS * rows * 8 // 256) * 256
    boxes, addresses = mailboxes(end + 5 * PARTS * rows * 8)
    for scale in (1, 2, 3):
        words = torch.randint(2**40, (PARTS, rows), device="cuda") * scale
        sent = [(own, torch.randn(rows, device="cuda"), own.double().sqrt()) for own in words]
        all_parts(
            lambda part, sent=sent: svel.peers_gather_(
                boxes[part], addresses, part, PATIENCE, *sent[part], None, False, end
            )
        )
        for box in boxes:
            at = 512
            for i in range(3):
                whole = torch.stack([own[i] for own in sent])
                assert torch.equal(box[at : at + whole.nbytes].view(whole.dtype).view(whole.shape), whole)
                at += -(-whole.nbytes // 256) * 256


@pytest.mark.parametrize("d", [3, 40, 4096, 8200, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("path", ["linear", "cosine", ""])
def test_merged_parts_are_the_whole(d, dtype, with_source, path):
    """Rows of empty rings and with NaN among them; for times on a path, and for alpha and sigma."""
    (refs, counts, _), parts, _ = make_rings(torch.float16, d)
    n = 8
    rng = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(PARTS * n, d, device="cuda", generator=rng).to(dtype)
    x[5, 0] = torch.nan
    labels = torch.arange(PARTS * n, device="cuda") % (RINGS + 1) - 1
    t = torch.linspace(0.1, 0.9, PARTS * n, dtype=torch.float64, device="cuda")
    at = path_coefficients(path or "linear", t)
    alpha, sigma = at.alpha, at.sigma
    row_bytes = PARTS * n * d * dtype.itemsize
    xs, means, lses = 512, 512 + -(-row_bytes // 256) * 256, 512 + 2 * (-(-row_bytes // 256) * 256)
    boxes, addresses = mailboxes(lses + PARTS * n * 8)
    home = svel.part_goes_home(x, parts[0][0], labels, "exact") > 0
    assert home == (d >= 40 and dtype == torch.float32)  # the kernel that reads from the other processes
    for part, box in enumerate(boxes):  # each x where its process is, and nowhere else
        box[xs : xs + row_bytes].view(dtype).fill_(torch.nan)
        rows = slice(part * n, (part + 1) * n)
        box[xs : xs + row_bytes].view(dtype).view(PARTS * n, d)[rows] = x[rows]
    for part, (box, (own, _, _, local_counts)) in enumerate(zip(boxes, parts, strict=True)):
        here = box[xs : xs + row_bytes].view(dtype).view(PARTS * n, d) if home else x
        mean = box[means : means + row_bytes].view(dtype).view(PARTS * n, d)
        lse = box[lses:].view(torch.float64)
        scalars = (t, None, path) if path else (alpha, sigma, path)
        about = labels, local_counts, "exact", mean, lse
        svel.posterior_part_out(here, own, *scalars, *about, addresses.cuda() if home else None, part, xs, means, lses)
    source = torch.randn(PARTS * n, d, device="cuda", generator=rng).to(dtype) if with_source else None
    whole = posterior_part(x, refs, alpha, sigma, labels, counts)
    expected = whole[0]
    if with_source:
        own = posterior_part(x, source[:, None], alpha, sigma, torch.arange(PARTS * n, device="cuda"))
        lse = torch.stack([whole[1].masked_fill(whole[1].isnan() & ~x.isnan().any(1), -torch.inf), own[1]])
        share = torch.softmax(lse, 0)[:, :, None].to(dtype)
        expected = torch.where(share[0] > 0, expected, 0) * share[0] + share[1] * source
    own_lse = own[1] if with_source else None
    a, b = prediction_coefficients("velocity", at)
    for mean_alone in (False, True):
        if path and mean_alone:
            continue
        all_parts(
            lambda part: svel.peers_gather_(boxes[part], addresses, part, PATIENCE, None, None, None, None, False, None)
        )

        def merged(part, mean_alone=mean_alone):
            mine = slice(part * n, (part + 1) * n)
            factors = (None, None) if path or mean_alone else (a[mine], b[mine])
            own = [None if given is None else given[mine] for given in (source, own_lse)]
            on = t[mine] if path else None, path, "velocity"
            about = x[mine], counts, labels[mine], *factors, *on, *own
            return svel.peers_merge(addresses, part, PATIENCE, means, lses, home, *about)

        out = torch.cat(all_parts(merged))
        wanted = expected if mean_alone else a[:, None] * x + b[:, None] * expected
        assert out.dtype == dtype
        assert torch.equal(out.isnan(), wanted.isnan())
        assert_close(out.nan_to_num(), wanted.to(dtype).nan_to_num())


@pytest.mark.parametrize("d", [40, 1000, 4096, 8200])
@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize("between", [False, True])
def test_draws_wait_for_pushes_under_way(d, rows, between):
    whole, parts, at = make_rings(torch.float16, d)
    rng = torch.Generator("cuda").manual_seed(3)
    streams = [torch.cuda.Stream() for _ in range(PARTS)]
    values = torch.randn(PARTS, rows, d, device="cuda", generator=rng)
    labels = torch.randint(-1, RINGS - 2, (PARTS, rows), device="cuda", generator=rng)
    asked = torch.randint(-1, RINGS + 1, (PARTS, 40), device="cuda", generator=rng)
    u = torch.rand(PARTS, 40, dtype=torch.float64, device="cuda", generator=rng)
    bank_push_(*whole, values.flatten(0, 1), labels.flatten(), all_to_last=True)
    _boxes, addresses = mailboxes(512 + 2 * PARTS * rows * 8)
    fresh = torch.full((PARTS, RINGS + 1), -7, device="cuda")
    places = torch.empty(PARTS, 4 * PARTS * rows, dtype=torch.int64, device="cuda")

    def push_and_draw(part):
        given = *parts[part], values[part], labels[part], True, CAPACITY, at, addresses, part, PATIENCE
        side = streams[part]
        side.wait_stream(torch.cuda.current_stream())
        svel.bank_push_parts_(*given, fresh[part], places[part], 1)
        placed = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(side):
            side.wait_event(placed)
            _, counts, heads, _ = parts[part]
            about = counts, u[part], asked[part], None, None, None
            push = heads, fresh[part], addresses, part, PATIENCE, between
            drawn = svel.bank_draw_parts(at, CAPACITY, parts[part][0], *about, "linear", 0.0, None, *push)
        svel.bank_push_parts_(*given, fresh[part], places[part], 2)
        return drawn

    for part, drawn in enumerate(all_parts(push_and_draw)):
        for one, other in zip(drawn, bank_draw(whole[0], whole[1], u[part], asked[part]), strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


# So few slots that all blocks run at once.
@pytest.mark.parametrize(("d", "slots"), [(264, 48), (520, 48), (4096, 48), (8200, 8)])
@pytest.mark.parametrize(
    ("dtype", "path"), [(torch.float16, "linear"), (torch.float16, "cosine"), (torch.bfloat16, "linear")]
)
@pytest.mark.parametrize("ahead", [False, True])
def test_parts_merge_their_rows_themselves(d, slots, dtype, path, ahead):
    """Round after round: rows of two parts, cut between blocks, over all rings, an empty one and one of a tile, NaN
    among them."""
    world, n, t_min = 2, 3, 0.15
    rng = torch.Generator("cuda").manual_seed(4)
    refs = torch.randn(3, world * slots, d, device="cuda", generator=rng).to(dtype)
    few = 8 * world  # a tile of each part, so that a block has all of a row
    counts = torch.tensor([world * slots, 0, few], dtype=torch.int32, device="cuda")
    parts = [torch.stack([refs[y, (part - y) % world :: world] for y in range(3)]) for part in range(world)]
    held = [(counts - (part - torch.arange(3, device="cuda")) % world + world - 1) // world for part in range(world)]
    rows, at = world * n, [512]
    for size in (4 * rows, 8 * rows, 4 * rows * d, 4 * rows * d, 8 * rows, 24 * rows):
        at.append(at[-1] + -(-size // 256) * 256)
    times_at, rings_at, xs, means, lses, words, end = at

    def target(part, boxes, addresses, there, x, t, labels):
        def area(begin, dtype, *rest):
            held = boxes[part][begin : begin + len(boxes) * n * math.prod(rest) * dtype.itemsize]
            return held.view(dtype).view(len(boxes) * n, *rest)

        merged = torch.full((n, d), torch.nan, device="cuda")
        about = area(xs, torch.float32, d), parts[part], area(times_at, torch.float32), None, path
        rings = area(rings_at, torch.int64), held[part].int(), "exact"
        to = area(means, torch.float32, d), area(lses, torch.float64)
        us = there, part, xs, means, lses, t, labels, None, None if ahead else x, words, PATIENCE, addresses
        made = None
        if ahead:
            given = *about[:3], *rings, there, part, t, labels, t_min, words, PATIENCE, addresses
            made = svel.posterior_part_list(*given)
            about[0][part * n :][:n] = x
        svel.posterior_part_out(*about, *rings, *to, *us, merged, x, "velocity", made)
        return merged

    def make_boxes(count):
        boxes = [torch.zeros(end, dtype=torch.uint8, device="cuda") for _ in range(count)]
        return boxes, addresses_of(boxes), addresses_of(boxes).cuda()

    x, t, labels = torch.zeros(n, d, device="cuda"), torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda").long()
    assert svel.part_goes_home(x, parts[0], labels, "exact") == 3
    target(0, *make_boxes(1), x, t, labels)  # loads the kernels; so few scalars of one part lie where those of two do
    boxes = make_boxes(world)
    for again in range(4):
        labels = torch.randint(-1, 4, (world, n), device="cuda", generator=rng)
        labels[:, 0] = 0
        t = 0.1 + 0.8 * torch.rand(world, n, device="cuda", generator=rng)
        at = path_coefficients(path, t.double())
        labels[:, 1], t[:, 1] = 2, 0.99  # its weight is with many
        slot = torch.randint(world * slots, (world, n), device="cuda", generator=rng)
        slot = slot.where(labels != 2, slot % few)
        picked, noise = refs[labels.clamp(0, 2), slot], torch.randn(world, n, d, device="cuda", generator=rng)
        x = (at.alpha[..., None] * picked + at.sigma[..., None] * noise).float()
        if again % 2:  # rows between two references of the process whose rows they are
            a, b = torch.stack([own[0, :2] for own in parts], 1)
            x[:, 0] = between(a, b, at.alpha[:, :1], at.sigma[:, :1])
        x[1, 2, 0], t[0, 1] = torch.nan, torch.nan
        evaluated = t.where(t >= t_min, torch.nan) if ahead else t
        given = x.flatten(0, 1).double(), refs, evaluated.flatten().double(), labels.flatten(), counts
        wanted = stable_target(*given, path=path).float()
        each = list(zip(x, t, labels, strict=True))
        out = torch.cat(all_parts(lambda part, each=each: target(part, *boxes, *each[part]), world))
        assert torch.equal(out.isnan(), wanted.isnan())
        for one, other in zip(out.nan_to_num(), wanted.nan_to_num(), strict=True):
            assert_close(one, other)


@pytest.mark.parametrize("d", [264, 1000, 4096, 8200])
def test_targets_wait_for_draws_under_way(d):
    """The launches of a target begin while the draw of its rows waits for a push."""
    n, rings, capacity, t_min = 4, 2, 6, 0.15
    rng = torch.Generator("cuda").manual_seed(6)
    refs = torch.randn(rings, capacity, d, device="cuda", generator=rng).half()
    counts = torch.full((rings,), capacity, dtype=torch.int32, device="cuda")
    heads, fresh = torch.zeros_like(counts), torch.full((rings + 1,), capacity, device="cuda")
    fresh[rings] = 1  # the round in which all slots were pushed
    at = [512]
    for size in (4 * n, 8 * n, 4 * n * d, 4 * n * d, 8 * n, 24 * n):
        at.append(at[-1] + -(-size // 256) * 256)
    times_at, rings_at, xs_at, means_at, lses_at, words, end = at
    box = torch.zeros(end, dtype=torch.uint8, device="cuda")
    addresses = addresses_of([box])
    there = addresses.cuda()

    def area(begin, dtype, *rest):
        return box[begin : begin + n * math.prod(rest) * dtype.itemsize].view(dtype).view(n, *rest)

    xs, times, labels_of_all = area(xs_at, torch.float32, d), area(times_at, torch.float32), area(rings_at, torch.int64)
    to = area(means_at, torch.float32, d), area(lses_at, torch.float64)
    labels, side = torch.tensor([0, 1, -1, 0], device="cuda"), torch.cuda.Stream()
    assert svel.part_goes_home(xs, refs, labels, "exact") == 3
    for again in range(4):
        t = 0.2 + 0.7 * torch.rand(n, device="cuda", generator=rng)
        noise = torch.randn(n, d, device="cuda", generator=rng)
        u = torch.rand(n, dtype=torch.float64, device="cuda", generator=rng)
        flags = torch.zeros(peers.HEADER_BYTES // 4, dtype=torch.int32, device="cuda")  # of two parts that push
        flags[peers.MAX_PEERS] = 1  # the own rows are there
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            if again > 0:  # else kernels are loaded
                torch.cuda._sleep(100_000_000)
            flags[peers.MAX_PEERS + 1].fill_(1)
        about = labels_of_all, counts, "exact"
        made = svel.posterior_part_list(xs, refs, times, *about, there, 0, t, labels, t_min, words, PATIENCE, addresses)
        drawn = counts, u, labels, None, noise, t, "linear", t_min, xs
        push = heads, fresh, addresses_of([flags, flags]), 0, PATIENCE, True
        _, _, x, _ = svel.bank_draw_parts(addresses_of([refs]), capacity, refs, *drawn, *push)
        merged = torch.empty_like(x)
        us = there, 0, xs_at, means_at, lses_at, t, labels, None, None, words, PATIENCE, addresses
        scalars = times, None, "linear"
        svel.posterior_part_out(xs, refs, *scalars, *about, *to, *us, merged, x, "velocity", made)
        torch.cuda.synchronize()
        wanted = stable_target(x.double(), refs, t.double(), labels, counts, path="linear").float()
        assert_close(merged, wanted)


def test_what_a_compiled_library_alone_has():
    assert peers.HEADER_BYTES == 512
    names = "bank_draw_parts", "bank_push_parts_", "peers_gather_", "peers_merge"
    names += "posterior_part_list", "posterior_part_out"
    assert all(hasattr(svel, name) for name in names)

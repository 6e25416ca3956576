"""Ops of a bank in parts that reach one another's memory: the parts here are on streams of one GPU."""

import pytest
import torch

from stablevelocity_kernels import backends, bank_draw, bank_push_, peers, posterior_part
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
    return boxes, torch.tensor([box.data_ptr() for box in boxes], device="cuda")


def all_parts(call):
    """What call(part) gives on a stream for each part, all of them under way at once."""
    streams, results = [torch.cuda.Stream() for _ in range(PARTS)], []
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
    for rows in (4, 1, 30):
        values = torch.randn(rows, d, device="cuda", generator=rng)
        labels = torch.randint(-1, RINGS - 2, (rows,), device="cuda", generator=rng)  # ring 3 stays empty
        bank_push_(*whole, values, labels, all_to_last=True)
        for part, state in enumerate(parts):
            svel.bank_push_part_(*state, values, labels, True, CAPACITY, part, PARTS)
    return whole, parts


@pytest.mark.parametrize("d", [1, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pushes_keep_the_slots_of_every_part(dtype, d):
    (refs, counts, heads), parts = make_rings(dtype, d)
    for part, (own, own_counts, own_heads, local_counts) in enumerate(parts):
        assert torch.equal(own_counts, counts)
        assert torch.equal(own_heads, heads)
        for y, count in enumerate(counts.tolist()):
            slots = [s for s in range(count) if (s + y) % PARTS == part]
            assert local_counts[y] == len(slots)
            assert torch.equal(own[y, : len(slots)], refs[y, slots])


@pytest.mark.parametrize("d", [1, 40, 1000, 4096])
def test_draws_are_those_of_one_bank(d):
    (refs, counts, _), parts = make_rings(torch.float16, d)
    rng = torch.Generator("cuda").manual_seed(1)
    at = torch.tensor([own[0].data_ptr() for own in parts], device="cuda")
    n = 40
    labels = torch.randint(-1, RINGS + 1, (n,), device="cuda", generator=rng)  # one beyond the last, too
    u, t = torch.rand(n, dtype=torch.float64, device="cuda", generator=rng), torch.rand(n, device="cuda")
    noise = torch.randn(n, d, device="cuda", generator=rng)
    boxes, addresses = mailboxes(512 + PARTS * n * d * 4)
    halls, meeting = mailboxes(512)
    for fallback in (None, torch.randn(n, d, device="cuda")):
        about = counts, u, labels, fallback, noise, t
        whole = bank_draw(refs, *about, t_min=0.3)
        drawn = all_parts(
            lambda part, about=about: svel.bank_draw_parts(
                meeting, part, PATIENCE, at, CAPACITY, parts[part][0], *about, "linear", 0.3, addresses, 512
            )
        )
        assert all(int(hall[:512].view(torch.int32).sum()) for hall in halls)  # they met
        for ours in drawn:
            for one, other in zip(ours, whole, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num())
                assert torch.equal(one.isnan(), other.isnan())
        for box in boxes:
            for sent in box[512:].view(torch.float32).view(PARTS, n, d):
                assert torch.equal(sent.nan_to_num(), whole[2].nan_to_num())


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_gather_brings_the_rows_of_all_in_every_round(rows):
    values = [torch.randn(rows, 1001, device="cuda") for _ in range(PARTS)]
    words = [torch.randint(2**40, (rows,), device="cuda") for _ in range(PARTS)]
    first = PARTS * rows * 1001 * 2
    second = 512 + -(-first // 256) * 256
    boxes, addresses = mailboxes(second + PARTS * rows * 8)
    like = torch.empty(0, dtype=torch.float16, device="cuda")
    for scale in (1.0, 2.0, 3.0):
        all_parts(
            lambda part, scale=scale: svel.peers_gather_(
                addresses, part, PATIENCE, True, like, values[part] * scale, words[part], None, None
            )
        )
        for box in boxes:
            came = box[512 : 512 + first].view(torch.float16).view(PARTS, rows, 1001)
            assert torch.equal(came, torch.stack(values).mul(scale).half())
            assert torch.equal(box[second:].view(torch.int64).view(PARTS, rows), torch.stack(words))


@pytest.mark.parametrize("d", [3, 40, 4096, 8200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_source", [False, True])
def test_merged_parts_are_the_whole(d, dtype, with_source):
    """Rows of empty rings and with NaN among them; as a mean, and as a x + b mean."""
    (refs, counts, _), parts = make_rings(torch.float16, d)
    n = 8
    rng = torch.Generator("cuda").manual_seed(2)
    x = torch.randn(PARTS * n, d, device="cuda", generator=rng).to(dtype)
    x[5, 0] = torch.nan
    labels = torch.arange(PARTS * n, device="cuda") % (RINGS + 1) - 1
    sigma = torch.linspace(0.1, 0.9, PARTS * n, dtype=torch.float64, device="cuda")
    alpha = 1 - sigma
    means = 512
    lses = means + -(-PARTS * n * d * dtype.itemsize // 256) * 256
    boxes, addresses = mailboxes(lses + PARTS * n * 8)
    for part, (box, (own, _, _, local_counts)) in enumerate(zip(boxes, parts, strict=True)):
        mean = box[means : means + PARTS * n * d * dtype.itemsize].view(dtype).view(PARTS * n, d)
        lse = box[lses:].view(torch.float64)
        about = own, alpha, sigma, labels, local_counts, "exact", mean, lse
        home = svel.posterior_part_out(x, *about, addresses, part, means, lses)
    assert home == (d >= 40 and dtype == torch.float32)  # the kernel that writes to the other processes
    like = torch.empty(0, device="cuda")
    source = torch.randn(PARTS * n, d, device="cuda", generator=rng).to(dtype) if with_source else None
    whole = posterior_part(x, refs, alpha, sigma, labels, counts)
    expected = whole[0]
    if with_source:
        own = posterior_part(x, source[:, None], alpha, sigma, torch.arange(PARTS * n, device="cuda"))
        lse = torch.stack([whole[1].masked_fill(whole[1].isnan() & ~x.isnan().any(1), -torch.inf), own[1]])
        share = torch.softmax(lse, 0)[:, :, None].to(dtype)
        expected = torch.where(share[0] > 0, expected, 0) * share[0] + share[1] * source
    own_lse = own[1] if with_source else None
    for factors in ((None, None), (sigma, -alpha)):
        all_parts(lambda part: svel.peers_gather_(addresses, part, PATIENCE, True, like, None, None, None, None))

        def merged(part, factors=factors):
            mine = slice(part * n, (part + 1) * n)
            own = [None if given is None else given[mine] for given in (*factors, source, own_lse)]
            return svel.peers_merge(addresses, part, PATIENCE, means, lses, home, x[mine], counts, labels[mine], *own)

        out = torch.cat(all_parts(merged))
        a, b = factors
        wanted = expected if a is None else a[:, None] * x + b[:, None] * expected
        assert out.dtype == dtype
        assert torch.equal(out.isnan(), wanted.isnan())
        assert_close(out.nan_to_num(), wanted.to(dtype).nan_to_num())


def test_what_a_compiled_library_alone_has():
    assert peers.HEADER_BYTES == 512
    assert all(hasattr(svel, name) for name in ("bank_draw_parts", "bank_push_part_", "peers_gather_", "peers_merge"))

"""The reference bank against a plain Python model of it, and what a training step asks of it."""

from collections import deque

import pytest
import stablevelocity as sv
import torch
from torch.utils.data import Dataset, TensorDataset

from stablevelocity_kernels.testing import assert_close

SHAPE, CLASSES, CAPACITY = (2, 3), 4, 5


def batches(count, size, rng, classes=CLASSES):
    """(values, labels, dataset indices); small integers, so that every dtype stores them exactly."""
    for b in range(count):
        index = torch.arange(b * size, (b + 1) * size)
        values = (index % 251).float()[:, None, None] + torch.arange(6.0).reshape(SHAPE) / 8
        yield values, torch.randint(classes, (size,), generator=rng), index


def model_rings(pushed, classes, null):
    rings = [deque(maxlen=CAPACITY) for _ in range(classes + (null == "ring"))]
    for _, labels, index in pushed:
        for y, i in zip(labels.tolist(), index.tolist(), strict=True):
            rings[y].append(i)
            if null == "ring":
                rings[classes].append(i)
    return [set(ring) for ring in rings]


@pytest.mark.parametrize("null", ["ring", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rings_hold_the_most_recent_of_each_class(null, dtype, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, dtype=dtype, null=null, track_indices=True)
    pushed = []
    for batch in batches(6, 7, rng):
        pushed.append(batch)
        bank.push(*batch)
        expected = model_rings(pushed, CLASSES, null)
        assert bank.counts.tolist() == [len(ring) for ring in expected]
        values = torch.cat([v for v, _, _ in pushed])
        for group, ring in enumerate(expected):
            stored = bank.indices[group, : len(ring)]
            assert set(stored.tolist()) == ring
            assert torch.equal(bank.refs[group, : len(ring)], values[stored].to(dtype))


def test_unconditional_bank_is_one_ring(rng):
    bank = sv.ReferenceBank((), capacity=CAPACITY, track_indices=True)
    assert bank.groups(None) is None
    bank.push(torch.arange(3.0), indices=torch.arange(3))
    assert bank.counts.tolist() == [3]
    bank.push(torch.arange(3.0, 9.0), indices=torch.arange(3, 9))
    assert sorted(bank.refs[0].tolist()) == [4, 5, 6, 7, 8]
    assert torch.equal(bank.indices[0].to(bank.refs.dtype), bank.refs[0])


@pytest.mark.parametrize("null", ["ring", "all"])
def test_draw_stays_in_the_ring_of_the_label(null, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, null=null, track_indices=True)
    pushed = list(batches(2, 6, rng, classes=3))  # class 3 stays empty, the others are filled in part
    for batch in pushed:
        bank.push(*batch)
    rings = model_rings(pushed, CLASSES, null)
    everything = set.union(*rings[:CLASSES])
    labels = torch.arange(CLASSES + 1).repeat(200)
    drawn = bank.draw(labels, generator=rng)
    assert torch.equal(drawn.empty, labels == 3)
    assert drawn.x0.dtype == torch.float32
    seen = [set() for _ in range(CLASSES + 1)]
    values = torch.cat([v for v, _, _ in pushed])
    for i, y in enumerate(labels.tolist()):
        if y != 3:
            seen[y].add(int(drawn.index[i]))
            assert torch.equal(drawn.x0[i], values[drawn.index[i]])
    assert seen[:3] == rings[:3]
    assert seen[CLASSES] == (rings[CLASSES] if null == "ring" else everything)


@pytest.mark.parametrize("null", ["ring", "all"])
def test_draw_is_uniform(null):
    """Chi-square over the members of a ring that is full in part and over the null set, each at p = 1e-6."""
    bank = sv.ReferenceBank((1,), 3, 8, null=null, track_indices=True)
    labels = torch.tensor([0] * 3 + [2] * 8)
    bank.push(torch.arange(11.0)[:, None], labels, torch.arange(11))
    draws, rng = 40_000, torch.Generator().manual_seed(1)
    for label, members in ((0, 3), (3, 8 if null == "ring" else 11)):
        index = bank.draw(torch.full((draws,), label), generator=rng).index
        found = torch.bincount(index, minlength=11)
        found = found[found > 0].double()
        assert len(found) == members
        chi2 = ((found - draws / members) ** 2 / (draws / members)).sum()
        p = torch.special.gammaincc(torch.tensor((members - 1) / 2).double(), chi2 / 2)
        assert p > 1e-6, (label, found)


class Plain(sv.Interpolant):
    """The linear path as a user's own, without a name: x_t is made outside the op."""

    def coefficients(self, t):
        return sv.Linear().coefficients(t)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("interpolant", ["linear", "cosine", Plain()], ids=str)
def test_mixture_is_a_draw_and_its_noisy_sample(interpolant, dtype, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, dtype=dtype)
    for batch in batches(3, 7, rng, classes=3):  # class 3 stays empty
        bank.push(*batch[:2])
    labels, t = torch.arange(CLASSES + 1).repeat(20), torch.rand(100, generator=rng)
    noise, own = (torch.randn(100, *SHAPE, generator=rng) for _ in range(2))
    drawn = bank.draw(labels, generator=torch.Generator().manual_seed(2))
    mixed = bank.mixture(
        t, noise, labels, own, interpolant=interpolant, t_min=0.4, generator=torch.Generator().manual_seed(2)
    )
    empty = labels == 3
    assert torch.equal(drawn.empty, empty)
    assert drawn.x0[empty].isnan().all()
    assert torch.equal(mixed.x0[~empty], drawn.x0[~empty])
    assert torch.equal(mixed.x0[empty], own[empty].to(mixed.x0.dtype))
    assert_close(mixed.x_t, sv.get_interpolant(interpolant).interpolate(mixed.x0.double(), noise, t))
    assert torch.equal(mixed.t_set.isnan(), empty | (t < 0.4))
    assert torch.equal(mixed.t_set.nan_to_num(), t.masked_fill(mixed.t_set.isnan(), 0.0))
    numbers = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    given = bank.mixture(t, noise, labels, own, interpolant=interpolant, numbers=numbers)
    assert torch.equal(given.x0, mixed.x0)


def test_draw_survives_the_largest_random_number(monkeypatch):
    bank = sv.ReferenceBank((), 3, 8, null="all")
    bank.push(torch.arange(9.0), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1]))
    monkeypatch.setattr(torch, "rand", lambda n, **kw: torch.full((n,), 1 - 2.0**-53, dtype=torch.float64))
    drawn = bank.draw(torch.tensor([0, 1, 2, 3]))
    assert drawn.x0[[0, 1, 3]].tolist() == [4, 8, 8]
    assert drawn.empty.tolist() == [False, False, True, False]


def test_empty_bank_draws_nothing_and_targets_nothing():
    for null in ("ring", "all"):
        bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, null=null)
        labels = torch.arange(CLASSES + 1)
        assert bank.draw(labels).empty.all()
        assert bank.target(torch.randn(5, *SHAPE), torch.full((5,), 0.5), labels).isnan().all()


@pytest.mark.parametrize("null", ["ring", "all"])
@pytest.mark.parametrize("with_source", [False, True])
def test_target_is_over_the_set_of_the_label(null, with_source, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, dtype=torch.float32, null=null, track_indices=True)
    pushed = [(torch.randn(7, *SHAPE, generator=rng), y, i) for _, y, i in batches(3, 7, rng, classes=3)]
    for batch in pushed:
        bank.push(*batch)
    values, rings = torch.cat([v for v, _, _ in pushed]), model_rings(pushed, CLASSES, null)
    rings = rings if null == "ring" else [*rings, set.union(*rings)]
    labels, t = torch.tensor([0, 1, 2, CLASSES]), torch.tensor([0.3, 0.5, 0.7, 0.9])
    own = torch.randn(4, *SHAPE, generator=rng)
    x_t = sv.Linear().interpolate(own, torch.randn(4, *SHAPE, generator=rng), t)
    out = bank.target(x_t, t, labels, own if with_source else None)
    for i, y in enumerate(labels.tolist()):
        members = values[sorted(rings[y])]
        members = torch.cat([members, own[i : i + 1]]) if with_source else members
        assert_close(out[i : i + 1], sv.Linear().target(x_t[i : i + 1].double(), members, t[i : i + 1]))


def test_state_dict_restores_exactly(rng):
    def build(**change):
        arguments = {"num_classes": CLASSES, "capacity": CAPACITY, "track_indices": True} | change
        return sv.ReferenceBank(SHAPE, **arguments)

    bank, copy = build(), build()
    stream = list(batches(5, 7, rng))
    for batch in stream[:3]:
        bank.push(*batch)
    copy.load_state_dict(bank.state_dict())
    for b in (bank, copy):
        for batch in stream[3:]:
            b.push(*batch)
    for name, value in bank.state_dict().items():
        assert torch.equal(value, copy.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"refs: expected \(5, 8, 2, 3\) .*capacity = 8.*got \(5, 5, 2, 3\)"):
        build(capacity=8).load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match=r"refs: expected .*torch.float32.*got .*torch.float16"):
        build(dtype=torch.float32).load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match=r"null = 'all'"):
        build(null="all").load_state_dict(bank.state_dict())
    with pytest.raises(RuntimeError, match="indices"):
        build(track_indices=False).load_state_dict(bank.state_dict())


def test_a_loaded_bank_inside_a_module_names_its_place():
    parent, other = torch.nn.Module(), torch.nn.Module()
    parent.bank, other.bank = sv.ReferenceBank((2,), capacity=3), sv.ReferenceBank((2,), capacity=4)
    with pytest.raises(ValueError, match=r"bank\.refs: expected"):
        parent.load_state_dict(other.state_dict())


def test_to_changes_the_stored_dtype(rng):
    bank = sv.ReferenceBank(SHAPE, capacity=CAPACITY)
    bank.push(torch.randn(5, *SHAPE, generator=rng))
    before = bank.refs.clone()
    bank.to(torch.float32)
    assert bank.refs.dtype == torch.float32
    assert bank.counts.dtype == torch.int32
    assert torch.equal(bank.refs, before.float())
    bank.push(torch.randn(2, *SHAPE, generator=rng))
    assert bank.target(torch.randn(1, *SHAPE), torch.tensor([0.5])).isfinite().all()


class Squares(Dataset):
    """A map-style dataset of (image, label) that counts how many items were read."""

    def __init__(self, count):
        self.count, self.read = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.read += 1
        return torch.full(SHAPE, float(i)), i % CLASSES


def test_prefill_stops_when_full(rng):
    data, bank = Squares(1000), sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, track_indices=True)
    assert bank.prefill(data, batch_size=16, generator=rng) == 1.0
    assert data.read < 200
    for group in range(CLASSES):
        assert (bank.indices[group] % CLASSES == group).all()
        assert torch.equal(bank.refs[group, :, 0, 0].long(), bank.indices[group])
    assert set((bank.indices[CLASSES] % CLASSES).tolist()) != {CLASSES - 1}, "the null ring saw one class only"


def test_prefill_takes_what_there_is(rng):
    x, y = torch.randn(6, *SHAPE, generator=rng), torch.tensor([0, 0, 1, 1, 2, 2])
    expected = 6 / (CLASSES * CAPACITY)
    for data in ((x, y), TensorDataset(x, y), [(x[:4], y[:4]), (x[4:], y[4:])]):
        bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY)
        assert bank.prefill(data) == pytest.approx(expected)
        assert bank.counts.tolist() == [2, 2, 2, 0, 5]
    bank = sv.ReferenceBank(SHAPE, capacity=8)
    for data in (x, (x, y), [x]):
        assert bank.prefill(data) > 0
    assert bank.filled() == 1.0


def test_push_does_not_keep_a_graph():
    bank = sv.ReferenceBank((2,), capacity=3)
    bank.push(torch.randn(2, 2, requires_grad=True) * 2)
    assert not bank.refs.requires_grad


def test_errors_name_the_argument():
    for arguments, message in (
        ({"null": "none"}, "null: expected one of .*'ring'.*, got 'none'"),
        ({"num_classes": -1}, "num_classes: expected 0 .*, got -1"),
        ({"capacity": 0}, "capacity: expected at least 1, got 0"),
        ({"dtype": torch.int64}, "dtype: expected a floating point dtype, got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            sv.ReferenceBank((2,), **arguments)
    plain, classes = sv.ReferenceBank((2,)), sv.ReferenceBank((2,), 3)
    x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: expected None because num_classes = 0, got shape \(4,\)"):
        plain.push(x, y)
    with pytest.raises(ValueError, match=r"labels: expected a \(N,\) int64 tensor because num_classes = 3, got None"):
        classes.draw(n=4)
    with pytest.raises(ValueError, match="indices: expected None because track_indices = False"):
        plain.push(x, indices=y)
    with pytest.raises(ValueError, match=r"indices: expected a \(N,\) int64 tensor"):
        sv.ReferenceBank((2,), track_indices=True).push(x)
    with pytest.raises(ValueError, match="n: expected the number of rows"):
        plain.draw()
    with pytest.raises(RuntimeError, match="values: expected shape"):
        plain.push(torch.zeros(4, 3))
    with pytest.raises(RuntimeError, match="labels: expected values in"):
        classes.push(x, y + 3)  # the null label is not a class
    assert classes.counts.sum() == 0


@pytest.mark.parametrize("null", ["ring", "all"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(null, backend, rng):
    def step(bank, values, labels, indices, x_t, t):
        bank.push(values, labels, indices)
        drawn = bank.draw(labels)
        return drawn, bank.target(x_t, t, labels)

    eager, compiled = (sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, null=null, track_indices=True) for _ in range(2))
    fast = torch.compile(step, backend=backend, fullgraph=True)
    for values, labels, index in batches(3, 6, rng):
        inputs = (values, labels, index, torch.randn(6, *SHAPE, generator=rng), torch.rand(6, generator=rng))
        torch.manual_seed(3)
        drawn, target = step(eager, *inputs)
        torch.manual_seed(3)
        drawn_compiled, target_compiled = fast(compiled, *inputs)
        assert_close(target_compiled, target)
        for one, other in zip(drawn, drawn_compiled, strict=True):
            assert torch.equal(one, other)
        for name, value in eager.state_dict().items():
            assert torch.equal(value, compiled.state_dict()[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("null", ["ring", "all"])
def test_never_waits_for_the_device(null, rng):
    bank = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, null=null, track_indices=True).to("cuda")
    assert bank.refs.is_cuda
    stream = [tuple(part.cuda() for part in batch) for batch in batches(3, 7, rng)]
    x_t, t = torch.randn(7, *SHAPE, device="cuda"), torch.rand(7, device="cuda")
    bank.push(*stream[0])
    bank.target(x_t, t, stream[0][1])  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for values, labels, index in stream[1:]:
            bank.push(values, labels, index)
            drawn = bank.draw(labels)
            target = bank.target(x_t, t, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not drawn.empty.any()
    assert target.isfinite().all()

"""The bank on the host against the bank on the device: equal rings, draws and targets, whenever its copies arrive."""

import copy
import math
import shutil
import warnings

import pytest
import stablevelocity as sv
import torch
from stablevelocity.host_bank import SideStream

from stablevelocity_kernels.testing import assert_close

SHAPE, CLASSES, CAPACITY, ROWS = (2, 3), 11, 5, 6


class LateCopies(SideStream):
    """A side stream on the CPU whose copies are made as late as their order allows: when somebody waits for them."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.given, self.made = [], 0

    def copy(self, pairs):
        self.given.append(pairs)
        return len(self.given)

    def wait(self, event):
        while event is not None and self.made < event:
            for target, source in self.given[self.made]:
                target.copy_(source)
            self.made += 1

    def synchronize(self):
        self.wait(len(self.given))


def build(device="cpu", late=False, **change):
    """A bank on the device and one on the host with the least room that a batch of ROWS allows."""
    plain = sv.ReferenceBank(SHAPE, CLASSES, CAPACITY, device=device, **change)
    host = sv.HostReferenceBank(SHAPE, CLASSES, CAPACITY, max_classes=4, device=device, **change)
    if late:
        host._side = LateCopies()
    return plain, host


def batches(count, rng, classes=CLASSES, rows=ROWS):
    """(values, labels, indices) with at most four classes each: some stay for the next batch, some come back later."""
    for b in range(count):
        some = torch.randperm(classes, generator=rng)[:4]
        labels = some[torch.randint(4, (rows,), generator=rng)]
        yield torch.randn(rows, *SHAPE, generator=rng), labels, torch.arange(b * rows, (b + 1) * rows)


def assert_same_state(host, plain):
    state = host.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name].cpu(), value.cpu()), name


def assert_same_draw(one, other, exact=True):
    for name in ("x_t", "t", "labels", "x0", "noise"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    if exact:
        assert torch.equal(one.target, other.target)
    else:  # on CUDA the order of a sum depends on how many groups there are
        assert_close(one.target, other.target)


def in_turn(host, stream, device):
    """Each batch's labels prefetched after the draw of the batch before: the other order in which a user may do it."""
    stream = list(stream)
    labels = host.prefetch(stream[0][1])
    for i, (values, _, index) in enumerate(stream):
        yield values.to(device), labels, index.to(device)
        if i + 1 < len(stream):
            labels = host.prefetch(stream[i + 1][1])


def train(plain, host, batches, seed=0, exact=True, **options):
    """Both banks through the same steps with the same random numbers, everything compared after each."""
    objectives = [sv.StableVMObjective(bank, **{"cfg_prob": 0.3, "t_min": 0.3} | options) for bank in (plain, host)]
    for step, (values, labels, index) in enumerate(batches):
        values, labels = values.to(host.device), labels.to(host.device)
        index = index.to(host.device) if host.track_indices else None
        draws = []
        for objective in objectives:
            torch.manual_seed(seed + step)
            draws.append(objective.sample(values, labels, indices=index))
        assert_same_draw(*draws, exact=exact)
        assert draws[0].target.isfinite().all()


# --- equality over many steps


@pytest.mark.parametrize("late", [False, True], ids=["copies-at-once", "copies-late"])
@pytest.mark.parametrize("order", ["ahead", "in turn", "never prefetched"])
@pytest.mark.parametrize("source", ["bank", "loader"])
def test_equals_the_bank_on_the_device(source, order, late, rng):
    plain, host = build(late=late, track_indices=True)
    stream = list(batches(60, rng))  # about 30 samples a class: every ring wraps
    given = {"ahead": host.ahead, "in turn": lambda s: in_turn(host, s, "cpu"), "never prefetched": iter}[order]
    train(plain, host, given(stream), source=source)
    assert_same_state(host, plain)
    assert (plain.counts == CAPACITY).all()


@pytest.mark.parametrize("late", [False, True], ids=["copies-at-once", "copies-late"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_of_bank_and_batch(dtype, late, rng):
    plain, host = build(late=late, dtype=dtype)
    stream = [(values.double() * math.pi, *rest) for values, *rest in batches(12, rng)]
    train(plain, host, host.ahead(stream))
    assert_same_state(host, plain)


@pytest.mark.parametrize("late", [False, True], ids=["copies-at-once", "copies-late"])
def test_more_rows_of_a_class_than_its_ring_holds(late, rng):
    plain, host = build(late=late, track_indices=True)
    for rows in (3, 5, 13):
        train(plain, host, host.ahead(batches(9, rng, classes=4, rows=rows)), cfg_prob=0.5)
        assert_same_state(host, plain)


@pytest.mark.parametrize("late", [False, True], ids=["copies-at-once", "copies-late"])
def test_a_class_in_consecutive_batches_is_never_stale(late, rng):
    """Copied before the push of the batch that shares it, drawn from after: the draw must see the pushed sample."""
    host = sv.HostReferenceBank((1,), 4, 1, dtype=torch.float32, max_classes=2)
    if late:
        host._side = LateCopies()
    shared = [torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 3]), torch.tensor([1, 2])]
    stream = [(torch.tensor([[10.0 * i], [10.0 * i + 1]]), shared[i % 4]) for i in range(40)]
    latest = {}
    for values, labels in host.ahead(stream):
        host.push(values, labels)
        latest |= dict(zip(labels.tolist(), values[:, 0].tolist(), strict=True))
        assert host.draw(labels).x0[:, 0].tolist() == [latest[y] for y in labels.tolist()]
        assert host.draw(torch.full_like(labels, 4)).x0[:, 0].tolist() == [values[1, 0]] * 2  # the null ring
    host.synchronize()
    assert host.refs[:4, 0, 0].tolist() == [latest[y] for y in range(4)]


def test_without_an_update_the_draw_still_has_its_classes(rng):
    plain, host = build()
    plain.prefill([(values, labels) for values, labels, _ in batches(40, rng)])
    host.load_state_dict(plain.state_dict())
    train(plain, host, host.ahead(batches(10, rng)), update_bank=False)
    assert_same_state(host, plain)


def test_attach_with_labels_dropped_by_the_trainer(rng):
    plain, host = build()
    objectives = [sv.StableVMObjective(bank, source="loader", t_min=0.0) for bank in (plain, host)]
    for values, labels, _ in host.ahead(batches(20, rng)):
        noise, t = torch.randn(values.shape, generator=rng), torch.rand(ROWS, generator=rng).clamp(0.1, 0.9)
        x_t = sv.Linear().interpolate(values, noise, t)
        dropped = labels.masked_fill(torch.rand(ROWS, generator=rng) < 0.5, CLASSES)
        one, other = (o.attach(x_t, values, noise, t, dropped, class_labels=labels) for o in objectives)
        assert torch.equal(one, other)
    assert_same_state(host, plain)


# --- what is copied


def test_only_the_valid_references_of_new_classes_are_copied(rng):
    host = sv.HostReferenceBank(SHAPE, 8, CAPACITY, max_classes=2)
    ring = 6 * 2  # bytes of one reference
    host.push(torch.randn(7, *SHAPE, generator=rng), torch.tensor([0, 0, 0, 1, 2, 2, 3]))
    null = 5 * ring
    for labels, expected in (
        ([0, 1, 0], null + 4 * ring),
        ([1, 2], 2 * ring),
        ([2, 1], 0),
        ([0, 3], ring),  # class 0 is still in its place
        ([4, 2], 2 * 0),  # 4 is empty; it takes the place of 1, the least recently used
        ([1], ring),
    ):
        before = host.copied
        host.prefetch(torch.tensor(labels))
        assert host.copied - before == expected, labels


def test_prefetch_of_two_batches_fits_whatever_they_are(rng):
    host = sv.HostReferenceBank(SHAPE, 9, 2, max_classes=4)
    assert host.slots == 8
    for _ in range(200):
        host.prefetch(torch.randint(9, (4,), generator=rng))
    places = list(host._place.values())
    assert len(set(places)) == len(places) <= 9


def test_a_batch_that_lost_its_places_gets_them_back(rng):
    plain, host = build(track_indices=True)
    for bank in (plain, host):
        bank.prefill(batches(30, rng))
        rng.manual_seed(0)
    x_t, t = torch.randn(4, *SHAPE, generator=rng), torch.full((4,), 0.7)
    first, *others = [host.prefetch(torch.arange(4) + i) for i in (0, 4, 7)]
    for y in (first, *others):
        assert torch.equal(host.target(x_t, t, y), plain.target(x_t, t, y))
    host.use(first)
    others = [host.prefetch(torch.arange(4) + i) for i in (4, 7)]  # while `first` is the current one
    for y in (first, *others):
        assert torch.equal(host.target(x_t, t, y), plain.target(x_t, t, y))


def test_labels_changed_in_place_are_read_again(rng):
    plain, host = build()
    for values, labels, _ in batches(12, rng):
        given = host.prefetch(labels)
        given.copy_((labels + 1) % CLASSES)
        plain.push(values, (labels + 1) % CLASSES)
        host.push(values, given)
    assert_same_state(host, plain)


def test_a_place_is_taken_from_the_class_used_least_recently(rng):
    host = sv.HostReferenceBank(SHAPE, 8, 1, max_classes=2)
    host.push(torch.randn(8, *SHAPE, generator=rng), torch.arange(8))
    copied = []
    for labels in ([0, 1], [2, 3], [0, 1], [4, 5], [0, 1], [2, 3]):
        before = host.copied
        host.prefetch(torch.tensor(labels))
        copied.append((host.copied - before) // 12)
    assert copied == [3, 2, 0, 2, 0, 2]  # the first with the null ring


@pytest.mark.parametrize("late", [False, True], ids=["copies-at-once", "copies-late"])
def test_unprefetched_pushes_on_the_cpu_take_any_number_of_classes(late, rng):
    plain, host = build(late=late)
    train(plain, host, host.ahead(batches(3, rng)))
    labels = torch.arange(CLASSES).repeat(CAPACITY)
    values = torch.randn(len(labels), *SHAPE, generator=rng)
    for bank in (plain, host):
        bank.push(values, labels)
    assert_same_state(host, plain)
    x_t, t, y = torch.randn(2, *SHAPE, generator=rng), torch.full((2,), 0.8), torch.tensor([0, CLASSES])
    assert torch.equal(host.target(x_t, t, y), plain.target(x_t, t, y))  # not what was staged before


# --- state, prefill, errors


def test_state_moves_between_both_banks(rng):
    plain, host = build(track_indices=True)
    stream = list(batches(40, rng))
    train(plain, host, host.ahead(stream[:15]))
    other_plain, other_host = build(track_indices=True)
    other_plain.load_state_dict(copy.deepcopy(host.state_dict()))
    other_host.use(torch.tensor([0, 1]))  # a staging that loading must forget
    other_host.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(other_plain, other_host, other_host.ahead(stream[15:]), seed=50)
    train(plain, host, host.ahead(stream[15:]), seed=50)
    for bank in (host, other_plain, other_host):
        assert_same_state(bank, plain)
    with pytest.raises(ValueError, match=r"refs: expected .*capacity = 4.*build the bank as it was saved"):
        sv.HostReferenceBank(SHAPE, CLASSES, 4, track_indices=True).load_state_dict(plain.state_dict())


def test_prefill_needs_no_places(rng):
    x, y = torch.randn(200, *SHAPE, generator=rng), torch.arange(200) % CLASSES
    plain, host = build(track_indices=True)
    for bank in (plain, host):
        assert bank.prefill((x, y), batch_size=64, generator=torch.Generator().manual_seed(3)) == 1.0
    assert_same_state(host, plain)
    assert host.filled() == 1.0
    assert host.copied == 0


def test_a_module_that_holds_the_bank_moves_without_it(rng):
    parent = torch.nn.Module()
    parent.bank = host = build()[1]
    host.push(torch.randn(4, *SHAPE, generator=rng), torch.arange(4))
    parent.to(torch.float32).half()
    assert host.refs.dtype == torch.float16
    assert list(parent.state_dict()) == ["bank.refs", "bank.counts", "bank.heads"]
    assert "slots=8" in repr(parent)


def test_errors_name_the_argument(rng):
    for arguments, message in (
        ({"num_classes": 0}, "num_classes: expected at least 1 for a bank on the host, got 0"),
        ({"null": "all"}, "null: expected 'ring' for a bank on the host, got 'all', which would copy the whole bank"),
        ({"null": "none"}, "null: expected one of"),
        ({"max_classes": 0}, "max_classes: expected 1 to num_classes = 11, got 0"),
        ({"max_classes": 12}, "max_classes: expected 1 to num_classes = 11, got 12"),
        ({"max_classes": 4, "slots": 7}, "slots: expected at least 8, the classes of two batches, got 7"),
        ({"capacity": 0}, "capacity: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sv.HostReferenceBank(SHAPE, **{"num_classes": CLASSES} | arguments)
    host = build()[1]
    for labels, message in (
        (torch.arange(5), r"labels: expected at most 4 distinct classes \(max_classes\), got 5"),
        (torch.tensor([0, 12]), r"labels: expected values in \[0, 11\], got 12"),
        (torch.tensor([-1]), r"labels: expected values in \[0, 11\], got -1"),
        (torch.tensor([1.0]), r"labels: expected a \(N,\) int64 tensor on the CPU, got torch.float32 \(1,\)"),
        (torch.zeros(1, 1, dtype=torch.int64), r"labels: expected a \(N,\) int64 tensor on the CPU"),
        (None, r"labels: expected a \(N,\) int64 tensor because num_classes = 11, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            host.prefetch(labels)
    values = torch.randn(2, *SHAPE, generator=rng)
    before = {name: value.clone() for name, value in host.state_dict().items()}
    given = host.prefetch(torch.tensor([0, CLASSES]))  # dropped by the trainer: to be read, not to be pushed
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 10\], got 11"):
        host.push(values, given)
    given = host.prefetch(torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="values: expected shape"):
        host.push(values[:, :1], given)
    with pytest.raises(ValueError, match="indices: expected None because track_indices = False"):
        host.push(values, given, torch.arange(2))
    for name, value in host.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert host.draw(given).empty.all()


# --- the training loop

SETTINGS = [
    "steps=8",
    "batch_size=8",
    "log_every=1",
    "save_every=4",
    "mixed_precision=no",
    "model.patch_size=4",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "bank.capacity=4",
    "objective.cfg_prob=0.3",
]


@pytest.fixture
def trainer():
    """Trainers on 24 random images of six classes, in a folder, with settings changed."""
    pytest.importorskip("accelerate")
    from stablevelocity.config import load_config
    from stablevelocity.data import ArrayData
    from stablevelocity.train import Trainer

    pixels = torch.randint(0, 256, (24, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def make(folder, *settings, labels=True):
        config = load_config(None, [*SETTINGS, "device=cpu", f"output={folder}", *settings])
        return Trainer(config, dataset=ArrayData(pixels, torch.arange(24) % 6 if labels else None), progress=False)

    return make


@pytest.mark.parametrize("settings", [(), ("objective.source=loader", "bank.prefill=false")], ids=["bank", "loader"])
def test_training_is_the_same_wherever_the_bank_is(tmp_path, trainer, settings):
    runs, results = {}, {}
    for place in ("device", "host"):
        runs[place] = trainer(tmp_path / place, f"bank.storage={place}", *settings)
        results[place] = runs[place].fit()
    assert isinstance(runs["host"].bank, sv.HostReferenceBank)
    assert results["host"].losses == results["device"].losses
    assert_same_state(runs["host"].bank, runs["device"].bank)
    fourth = results["host"].checkpoint.with_name("step-00000004")
    for place in ("device", "host"):  # a checkpoint moves from one to the other
        folder = tmp_path / f"on-{place}"
        shutil.copytree(fourth, folder / "checkpoints" / fourth.name)
        resumed = trainer(folder, f"bank.storage={place}", "resume=latest", *settings)
        assert resumed.fit().losses == results["device"].losses
        assert_same_state(resumed.bank, runs["device"].bank)


def test_training_says_where_the_bank_has_to_be(tmp_path, trainer):
    for i, (settings, labels, reason) in enumerate(
        (
            ((), False, "a data set without classes"),
            (("bank.null_label=all",), True, "bank.null_label = all"),
            (("compile=step",), True, "compile = step"),
        )
    ):
        with pytest.raises(ValueError, match=f"bank.storage: expected 'device' because of {reason}"):
            trainer(tmp_path / str(i), "bank.storage=host", *settings, labels=labels)
    with pytest.raises(ValueError, match=r"bank\.storage: expected one of device, host, sharded, got 'disk'"):
        trainer(tmp_path, "bank.storage=disk")


# --- on the GPU


def on_device(stream):
    for values, labels, index in stream:
        yield values.cuda(), labels, index.cuda()


class SlowCopies(SideStream):
    """A side stream that dawdles before every copy."""

    def copy(self, pairs):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(20_000_000)  # about ten milliseconds, several times what the host takes for a step
        return super().copy(pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("slow", ["neither", "steps", "copies"])
@pytest.mark.parametrize("order", ["ahead", "in turn"])
@pytest.mark.parametrize("source", ["bank", "loader"])
def test_equals_the_bank_on_the_device_on_cuda(source, order, slow, rng):
    """The host runs ahead of the device by many steps, over slow steps and slow copies, and nothing is overtaken."""
    plain, host = build("cuda", track_indices=True)
    assert host.refs.is_pinned()
    assert host.indices.is_pinned()
    if slow == "copies":
        host._side = SlowCopies(host.device)
        host._side.mark()
    stream = [(v.cuda(), y, i.cuda()) for v, y, i in batches(60, rng)]
    objectives = [sv.StableVMObjective(bank, cfg_prob=0.3, t_min=0.3, source=source) for bank in (plain, host)]
    kept = []
    for step, (values, labels, index) in enumerate(
        host.ahead(stream) if order == "ahead" else in_turn(host, stream, "cuda")
    ):
        draws = []
        for objective in objectives:
            torch.manual_seed(step)
            draws.append(objective.sample(values, labels, indices=index))
        if slow == "steps":
            torch.cuda._sleep(20_000_000)
        kept.append(draws)
    for draws in kept:  # compared at the end: a comparison would wait for the device
        assert_same_draw(*draws, exact=False)
    assert_same_state(host, plain)


@pytest.mark.gpu
def test_a_prefetched_step_never_waits_for_the_device(rng):
    host = build("cuda")[1]
    objective = sv.StableVMObjective(host, t_min=0.0)
    steps = host.ahead(on_device(batches(14, rng)))
    for values, labels, _ in (next(steps) for _ in range(3)):
        objective.sample(values, labels)  # loads the kernels
    stream = [(values.cuda(), labels) for values, labels, _ in batches(6, rng)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="labels: not a tensor")
            for values, labels in host.ahead(stream):
                draw = objective.sample(values, labels)
                target = host.target(draw.x_t, draw.t, draw.labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert target.isfinite().all()


@pytest.mark.gpu
def test_the_host_runs_ahead_and_copies_run_beside_the_step(rng):
    """While the device sleeps through a step, the host is done asking, and the next batch's rings have arrived."""
    host = sv.HostReferenceBank((1 << 16,), 16, 32, max_classes=4, device="cuda")  # 4 MiB a ring
    host.prefill([(torch.randn(64, 1 << 16, generator=rng), torch.arange(64) % 16) for _ in range(8)])
    values = torch.randn(4, 1 << 16, device="cuda")
    first = host.prefetch(torch.arange(4))
    host.push(values, first)
    host.target(values, torch.full((4,), 0.5, device="cuda"), first)
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    asleep.record()
    host.prefetch(torch.arange(4, 8))
    arrived = host._batches[-1].ready
    assert not asleep.query(), "the host waited"
    arrived.synchronize()
    assert not asleep.query(), "the copies waited for the step"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_labels_not_prefetched_are_read_back_with_one_warning(rng):
    plain, host = build("cuda")
    objective = sv.StableVMObjective(host)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for values, labels, _ in batches(5, rng):
            objective.sample(values.cuda(), labels.cuda())
            plain.push(values.cuda(), labels.cuda())
    ours = "labels: not a tensor that HostReferenceBank.prefetch returned"
    assert sum(str(warning.message).startswith(ours) for warning in caught) == 1
    assert_same_state(host, plain)


@pytest.mark.gpu
def test_a_label_that_is_not_staged_is_nan(rng):
    host = build("cuda")[1]
    host.prefill(batches(20, rng))
    given = host.prefetch(torch.tensor([0, 1]))
    host.use(given)
    x_t, t = torch.randn(4, *SHAPE, device="cuda"), torch.full((4,), 0.5, device="cuda")
    out = host.target(x_t, t, torch.tensor([0, 5, CLASSES, 99], device="cuda"))
    assert out.flatten(1).isnan().all(1).tolist() == [False, True, False, True]


@pytest.mark.gpu
def test_memory_is_unpinned_when_the_bank_goes():
    host = sv.HostReferenceBank((1 << 16,), 4, 8, device="cuda")
    refs = host.refs
    del host
    assert not refs.is_pinned()


@pytest.mark.gpu
def test_a_training_step_over_a_host_bank_never_waits(tmp_path, trainer):
    run = trainer(tmp_path, "device=cuda", "mixed_precision=bf16", "bank.storage=host")
    images = torch.randn(8, 1, 8, 8, device="cuda")
    steps = run._ahead([(images, torch.arange(8) % 6, torch.arange(8))] * 8)
    for _ in range(3):
        run._train_step(next(steps))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in steps:
            run._train_step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_training_on_a_gpu_over_a_host_bank(tmp_path, trainer):
    result = trainer(tmp_path, "device=cuda", "bank.storage=host").fit()
    assert all(math.isfinite(line["loss"]) for line in result.losses)
    assert trainer(tmp_path, "device=cuda", "bank.storage=host", "resume=latest", "steps=10").fit().steps == 10

"""The bank in parts against one bank that holds everything, on 1, 2 and 4 processes; and what a lost process does."""

import functools
import math
import os
import signal
import time
from pathlib import Path

import pytest
import stablevelocity as sv
import torch
import torch.distributed as dist
from distributed import finish_processes, run_processes, start_processes

from stablevelocity_kernels.testing import TOLERANCE, assert_close, make_references

SHAPE, CLASSES = (2, 3), 4
WORLDS = (1, 2, 4)


class Shifted(sv.Cosine):
    """A user's own path: the cosine under another name."""

    name = None

    def coefficients(self, t):
        return sv.Cosine().coefficients(t)


def build(capacity, null="ring", **options):
    """One bank that holds everything, and a part of the same bank."""
    options = {"null": null, "track_indices": True} | options
    num_classes, group = options.pop("num_classes", CLASSES), options.pop("group", None)
    return (
        sv.ReferenceBank(SHAPE, num_classes, capacity, **options),
        sv.ShardedReferenceBank(SHAPE, num_classes, capacity, group=group, **options),
    )


def global_batches(count, rows, world, seed=0, classes=CLASSES):
    """Batches of rows * world, the same on every process: (values, labels, indices)."""
    rng = torch.Generator().manual_seed(seed)
    for b in range(count):
        n = rows * world
        yield (
            torch.randn(n, *SHAPE, generator=rng),
            torch.randint(classes, (n,), generator=rng),
            torch.arange(b * n, (b + 1) * n),
        )


def own(part, rank, world):
    return part[rank * len(part) // world : (rank + 1) * len(part) // world]


def push_both(plain, sharded, batches, rank, world, labelled=True):
    for values, labels, index in batches:
        labels = labels if labelled else None
        plain.push(values, labels, index)
        mine = [None if part is None else own(part, rank, world) for part in (values, labels, index)]
        sharded.push(*mine)


def assert_same_rings(plain, sharded, rank, world):
    """Counts are those of the whole; slot s of ring y is with process (s + y) mod P, as its slot s div P."""
    assert torch.equal(plain.counts, sharded.counts)
    assert torch.equal(plain.heads, sharded.heads)
    held = 0
    for y, count in enumerate(plain.counts.tolist()):
        slots = [s for s in range(count) if (s + y) % world == rank]
        assert sharded.local_counts[y] == len(slots)
        assert [s // world for s in slots] == list(range(len(slots)))
        assert torch.equal(sharded.refs[y, : len(slots)], plain.refs[y, slots])
        assert torch.equal(sharded.indices[y, : len(slots)], plain.indices[y, slots])
        held += len(slots)
    assert abs(held - plain.counts.sum() / world) < len(plain.counts)


def equal(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def generator(seed, rank):
    return torch.Generator().manual_seed(100 * seed + rank)


# --- what runs on every process


def check_rings_and_draws(rank, world, folder):
    for null in ("ring", "all"):
        for capacity in (1, 5, 8):  # fewer slots than processes; uneven parts; even ones
            for dtype in (torch.float16, torch.bfloat16, torch.float64):
                plain, sharded = build(capacity, null, dtype=dtype)
                labels = torch.arange(CLASSES + 1).repeat(4)
                assert sharded.draw(labels).empty.all()
                for step, batch in enumerate(global_batches(5, 3, world, classes=3)):  # class 3 stays empty
                    push_both(plain, sharded, [batch], rank, world)
                    assert_same_rings(plain, sharded, rank, world)
                    ours = sharded.draw(labels, generator=generator(step, rank))
                    whole = plain.draw(labels, generator=generator(step, rank))
                    assert equal(ours.x0, whole.x0)
                    assert torch.equal(ours.empty, whole.empty)
                    assert torch.equal(ours.index, whole.index)
                assert ours.x0.dtype == whole.x0.dtype
                assert sharded.filled() == plain.filled()
    plain, sharded = build(3)
    push_both(plain, sharded, global_batches(1, 40, world, classes=2), rank, world)  # more rows than a ring holds
    assert_same_rings(plain, sharded, rank, world)
    plain, sharded = build(7, num_classes=0)
    push_both(plain, sharded, global_batches(4, 3, world), rank, world, labelled=False)
    assert_same_rings(plain, sharded, rank, world)
    assert equal(sharded.draw(n=9, generator=generator(0, rank)).x0, plain.draw(n=9, generator=generator(0, rank)).x0)


def check_targets(rank, world, folder):
    labels = torch.arange(CLASSES + 1).repeat(4)
    n = len(labels)
    own_rng = generator(7, rank)
    t = torch.rand(n, generator=own_rng)
    t[3] = math.nan
    sources = {"none": None, "float32": torch.randn(n, *SHAPE, generator=own_rng)}
    for capacity, dtype, work in (
        (1, torch.float32, torch.float32),
        (6, torch.float16, torch.float32),
        (5, torch.float64, torch.float64),
    ):
        for null in ("ring", "all"):
            plain, sharded = build(capacity, null, dtype=dtype)
            for round_ in range(3):  # empty, in part, full but for one class
                x = torch.randn(n, *SHAPE, generator=own_rng).to(work)
                x[1, 0, 0] = math.nan
                for path in ("linear", "cosine", Shifted()):
                    for prediction in ("velocity", "x0"):
                        for source in sources.values():
                            source = None if source is None else source.to(work)
                            options = {"interpolant": path, "prediction": prediction}
                            ours = sharded.target(x, t, labels, source, **options)
                            whole = plain.target(x, t, labels, source, **options)
                            assert ours.dtype == whole.dtype
                            assert torch.equal(ours.isnan(), whole.isnan()), (capacity, null, round_, source is None)
                            assert_close(ours.nan_to_num(), whole.nan_to_num())
                push_both(plain, sharded, global_batches(1, 2 + 9 * round_, world, seed=round_, classes=3), rank, world)
    for nobody in (sharded.target(x[:0], t[:0], labels[:0]), sharded.draw(labels[:0]).x0):
        assert nobody.shape == (0, *SHAPE)
    fast = sharded.target(x, t, labels, precision="fast")
    assert_close(fast.nan_to_num(), plain.target(x, t, labels, precision="fast").nan_to_num(), "fast")
    plain, sharded = build(9, num_classes=0)
    push_both(plain, sharded, global_batches(2, 6, world), rank, world, labelled=False)
    x = torch.randn(n, *SHAPE, generator=own_rng)
    assert_close(sharded.target(x, t).nan_to_num(), plain.target(x, t).nan_to_num())


def check_contract(rank, world, folder):
    """On hard data, against float64, for the mean itself, in portions too; then with one reference in each part."""
    rng = torch.Generator().manual_seed(0)
    for geometry in ("gaussian", "manifold", "shifted"):
        refs = make_references(41, 3000, geometry, rng)
        for portions in (1, 3):
            bank = sv.ShardedReferenceBank((3000,), capacity=50, dtype=torch.float32, portions=portions)
            assert bank.prefill(refs) == 41 / 50
            for time_ in (0.05, 0.5, 0.999):
                t = torch.full((5,), time_)
                x = (1 - time_) * refs[5 * rank : 5 * rank + 5] + time_ * torch.randn(5, 3000, generator=rng)
                mean = bank.target(x, t, prediction="x0")
                wide = sv.Linear().target(x.double(), refs, t.double(), prediction="x0")
                assert_close(mean, wide)
    refs = make_references(world, 20_000, "gaussian", rng)
    bank = sv.ShardedReferenceBank((20_000,), capacity=world, dtype=torch.float32)
    bank.prefill(refs)
    assert bank.local_counts.tolist() == [1]
    t = torch.full((4,), 0.998)
    x = 0.002 * refs[:1] + 0.998 * torch.randn(4, 20_000, generator=rng)
    assert_close(bank.target(x, t, prediction="x0"), sv.Linear().target(x.double(), refs, t.double(), prediction="x0"))


def check_objective(rank, world, folder):
    """Both sources over many steps: the same draws, and targets within the contract."""
    for source in ("bank", "loader"):
        for null in ("ring", "all"):
            for interpolant in ("linear", Shifted()):
                plain, sharded = build(6, null)
                options = {"source": source, "cfg_prob": 0.3, "t_min": 0.3, "update_bank": False}
                objectives = [sv.StableVMObjective(bank, interpolant, **options) for bank in (plain, sharded)]
                for step, batch in enumerate(global_batches(8, 5, world)):
                    if source == "bank":
                        push_both(plain, sharded, [batch], rank, world)
                    mine = [own(part, rank, world) for part in batch]
                    draws = [o.sample(*mine[:2], generator=generator(step, rank)) for o in objectives]
                    for name in ("x_t", "t", "labels", "x0", "noise"):
                        assert torch.equal(*(getattr(draw, name) for draw in draws)), name
                    assert_close(draws[1].target, draws[0].target)
                    if source == "loader":
                        push_both(plain, sharded, [batch], rank, world)
                assert_same_rings(plain, sharded, rank, world)


def check_prefill(rank, world, folder):
    torch.manual_seed(rank)  # the global streams differ, as in training
    x = torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % CLASSES
    sharded = build(6)[1]
    assert sharded.prefill((x, y), batch_size=7) == 1.0
    seen = torch.cat([sharded.indices[c, : sharded.local_counts[c]] for c in range(CLASSES)])
    everything = [torch.empty(0)] * world
    dist.all_gather_object(everything, seen.tolist())
    flat = sorted(i for part in everything for i in part)
    assert len(flat) == len(set(flat)) == 6 * CLASSES, "a reference is missing or twice there"
    assert equal(sharded.refs[0, : sharded.local_counts[0]], x[sharded.indices[0, : sharded.local_counts[0]]].half())


def check_compiled(rank, world, folder):
    def step(bank, x0, labels, index, t, u_x):
        bank.push(x0, labels, index)
        drawn = bank.draw(labels)
        mixed = bank.mixture(t, u_x, labels, x0)
        return drawn.x0, mixed.x_t, bank.target(mixed.x_t, mixed.t_set, labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    _, eager_bank = build(5, "all")
    _, fast_bank = build(5, "all")
    for i, batch in enumerate(global_batches(3, 4, world)):
        mine = [own(part, rank, world) for part in batch]
        rest = torch.rand(4, generator=generator(i, rank)), torch.randn(4, *SHAPE, generator=generator(i, rank))
        results = []
        for run, bank in ((step, eager_bank), (compiled, fast_bank)):
            torch.manual_seed(100 * i + rank)
            results.append(run(bank, *mine, *rest))
        for one, other in zip(*results, strict=True):
            assert equal(one, other)
    for name, value in eager_bank.state_dict().items():
        assert torch.equal(value, fast_bank.state_dict()[name]), name


def check_errors(rank, world, folder):
    _, bank = build(5)
    x, y, i = (own(part, rank, world) for part in next(iter(global_batches(1, 4, world))))
    for call, message in (
        (lambda: bank.push(x, None, i), "labels: expected a"),
        (lambda: bank.push(x, y), "indices: expected a"),
        (lambda: bank.push(x[:, :1], y, i), r"values: expected shape \(N, \*S\) with S = \(2, 3\), got \(4, 1, 3\)"),
        (lambda: bank.push(x, y.int(), i), r"labels: expected int64 \(N,\) = \(4,\), got int32 \(4,\)"),
        (lambda: bank.push(x, y[:2], i), r"labels: expected int64 \(N,\) = \(4,\), got int64 \(2,\)"),
        (lambda: bank.target(x[:, :1], torch.rand(4), y), r"x_t: expected shape \(N, \*S\)"),
        (lambda: sv.ShardedReferenceBank(SHAPE, portions=0), "portions: expected at least 1, got 0"),
        (lambda: sv.ShardedReferenceBank(SHAPE, group="all"), "group: expected a process group"),
        (lambda: sv.ShardedReferenceBank(SHAPE, null="none"), "null: expected one of"),
        (lambda: bank.load(f"{folder}/nothing"), "folder: expected a bank that was saved whole"),
        (lambda: sv.variance_curve(bank, [0.5]), f"got part {rank} of {world}" if world > 1 else "got an empty one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # A label that only one process has wrong stops all of them: none is left waiting.
    wrong = torch.where(torch.tensor(rank == world - 1), CLASSES, y)
    with pytest.raises(RuntimeError, match=r"labels: expected values in \[0, 4\)"):
        bank.push(x, wrong, i)
    with pytest.raises(RuntimeError, match=r"labels: expected values in \[-1, 5\)"):
        bank.draw(wrong + 1)
    with pytest.raises(RuntimeError, match=r"labels: expected values in \[-1, 5\)"):
        bank.target(x, torch.rand(4), wrong + 1)
    assert bank.counts.sum() == 0
    bank.push(x, y, i)
    assert bank.counts[:CLASSES].sum() > 0
    # Rows that are not as many everywhere, or not of one dtype: all processes raise, and go on.
    n = 3 - (rank == 1)
    for call, message in (
        (lambda: bank.push(x[:n], y[:n], i[:n]), "push: 3 rows of float16, process 1 push: 2 rows of float16"),
        (lambda: bank.draw(y[:n]), "draw: 3 rows of float64, process 1 draw: 2 rows of float64"),
        (lambda: bank.target(x[:n], torch.rand(n), y[:n]), "target: 3 rows of float32, process 1 target: 2 rows of"),
        (
            lambda: bank.target((x.half() if rank else x)[:3], torch.rand(3), y[:3]),
            "process 1 target: 3 rows of float16",
        ),
    ):
        if world > 1:
            with pytest.raises(
                ValueError, match=f"rows: expected as many on every process, .* got process 0 .*{message}"
            ):
                call()
    bank.push(x[:2], y[:2], i[:2])  # fewer on all of them
    assert bank.heads[-1] == 6 * world % 5


def check_mesh(rank, world, folder):
    """Two replicas of a bank in two parts, each replica fed by its own processes."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "part"))
    with pytest.raises(ValueError, match="group: expected a DeviceMesh of one dimension, got 2"):
        sv.ShardedReferenceBank(SHAPE, group=mesh)
    plain = build(5)[0]
    bank = sv.ShardedReferenceBank(SHAPE, CLASSES, 5, track_indices=True, group=mesh["part"])
    assert (bank.parts, bank.part) == (2, rank % 2)
    push_both(plain, bank, global_batches(3, 4, 2, seed=rank // 2), rank % 2, 2)
    assert_same_rings(plain, bank, rank % 2, 2)
    labels, x, t = torch.arange(CLASSES), torch.randn(4, *SHAPE), torch.rand(4)
    assert_close(bank.target(x, t, labels), plain.target(x, t, labels))


def check_checkpoints(rank, world, folder):
    """What one number of processes saves, every other loads, and goes on in the same order."""
    groups = {n: dist.new_group(list(range(n))) for n in (1, 2, 3, 4)}
    for null in ("ring", "all"):
        for n in (1, 2, 4):
            if rank < n:
                bank = build(7, null, group=groups[n])[1]
                for batch in global_batches(3, 12 // n, n, classes=3):
                    bank.push(*(own(part, rank, n) for part in batch))
                bank.save(f"{folder}/{null}-{n}")
                with pytest.raises(ValueError, match="folder: expected one that does not exist"):
                    bank.save(f"{folder}/{null}-{n}")
        dist.barrier()
        for n, saved in ((1, 4), (2, 1), (2, 4), (3, 2), (3, 4), (4, 1), (4, 2), (4, 4)):
            if rank < n:
                plain, bank = build(7, null, group=groups[n])
                bank.push(*(own(part, rank, n) for part in next(iter(global_batches(1, 3, n, seed=5)))))
                for batch in global_batches(3, 12, 1, classes=3):
                    plain.push(*batch)
                bank.load(f"{folder}/{null}-{saved}")
                assert_same_rings(plain, bank, rank, n)
                push_both(plain, bank, global_batches(2, 3, n, seed=2), rank, n)
                assert_same_rings(plain, bank, rank, n)
                labels, x, t = torch.arange(CLASSES + 1), torch.randn(5, *SHAPE), torch.rand(5)
                assert_close(bank.target(x, t, labels).nan_to_num(), plain.target(x, t, labels).nan_to_num())
    for change, message in (
        ({"capacity": 8}, "capacity: expected 7 as in .*, got 8"),
        ({"capacity": 7, "dtype": torch.float32}, r"dtype: expected torch.float16 .*, got torch.float32"),
        ({"capacity": 7, "track_indices": False}, "track_indices: expected True"),
        ({"capacity": 7, "null": "all"}, "rings: expected 5 .*, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**change)[1].load(f"{folder}/ring-2")
    assert not list(Path(folder).glob(".writing*"))


def check_state_dict(rank, world, folder):
    """Interchangeable between banks of as many parts, inside a module too; dcp itself keeps every part."""
    import torch.distributed.checkpoint as dcp

    _, bank = build(5)
    for batch in global_batches(2, 6, world):
        bank.push(*(own(part, rank, world) for part in batch))
    model, copy = torch.nn.Module(), torch.nn.Module()
    model.bank, copy.bank = bank, build(5)[1]
    dcp.save(model.state_dict(), checkpoint_id=f"{folder}/whole")
    state = copy.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/whole")
    copy.load_state_dict(state)
    assert torch.equal(copy.bank.refs, bank.refs)
    assert torch.equal(copy.bank.indices, bank.indices)
    assert torch.equal(copy.bank.local_counts, bank.local_counts)
    other = {key.replace(f"{rank}of{world}", f"{rank}of{world + 1}"): value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*refs"):
        copy.load_state_dict(other)


# --- the tests


@pytest.mark.parametrize("world", WORLDS)
def test_equals_one_bank(tmp_path, world):
    run_processes(check_everything, world, tmp_path)


def check_everything(rank, world, folder):
    check_rings_and_draws(rank, world, folder)
    check_targets(rank, world, folder)
    check_contract(rank, world, folder)
    check_objective(rank, world, folder)
    check_prefill(rank, world, folder)
    check_errors(rank, world, folder)
    check_state_dict(rank, world, folder)
    if world == 2:
        check_compiled(rank, world, folder)
    if world == 4:
        check_mesh(rank, world, folder)


def test_a_checkpoint_loads_on_any_number_of_processes(tmp_path):
    run_processes(check_checkpoints, 4, tmp_path)


def test_without_a_process_group_it_is_one_part(tmp_path):
    plain, bank = build(5)
    push_both(plain, bank, global_batches(3, 4, 1), 0, 1)
    assert_same_rings(plain, bank, 0, 1)
    bank.save(tmp_path / "bank")
    other = build(5)[1]
    other.load(tmp_path / "bank")
    assert_same_rings(plain, other, 0, 1)
    assert "part=0, parts=1" in repr(bank)


# --- processes that end


def save_for_ever(rank, world, folder):
    bank = sv.ShardedReferenceBank((64, 1024), 4, 16)
    bank.prefill([(torch.randn(64, 64, 1024), torch.arange(64) % 4)])
    for step in range(10_000):
        bank.save(Path(folder) / f"step-{step}")
        print("saved", step, flush=True)


def step_for_ever(rank, world, folder):
    bank = sv.ShardedReferenceBank((8,), 4, 16)
    for step in range(100_000):
        bank.push(torch.randn(4, 8), torch.arange(4))
        bank.target(torch.randn(4, 8), torch.rand(4), torch.arange(4))
        if step == 20:
            print("running", flush=True)


def step_with_other_rows(rank, world, folder):
    bank = sv.ShardedReferenceBank((8,), 4, 16)
    bank.push(torch.randn(4, 8), torch.arange(4))
    print("running", flush=True)
    n = 4 - rank
    bank.push(torch.randn(n, 8), torch.arange(n))


def load_all(rank, world, folder):
    bank = sv.ShardedReferenceBank((64, 1024), 4, 16)
    for path in Path(folder).parent.glob("killed/step-*"):
        bank.load(path)
        assert bank.counts.tolist() == [16, 16, 16, 16, 16]
        assert (bank.refs.float().flatten(2).norm(dim=2) > 0).all()


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_kill_while_saving_costs_nothing_that_was_saved(tmp_path, doomed):
    workers = start_processes(save_for_ever, 2, tmp_path / "killed", timeout=8)
    workers[doomed].wait_for("saved 2")
    end = time.monotonic() + 20
    while not list((tmp_path / "killed").glob(".writing-*/*.distcp")) and time.monotonic() < end:
        pass
    workers[doomed].process.kill()
    began = time.monotonic()
    code, out = finish_processes(workers, deadline=30)[1 - doomed]
    assert time.monotonic() - began < 20
    assert code == 1
    assert "expected all 2 processes of the group to take part in saving" in out, out[-2000:]
    assert len(list((tmp_path / "killed").glob("step-*"))) >= 3
    run_processes(load_all, 1, tmp_path / "after")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_process_ends_the_others_with_an_error(tmp_path, how):
    workers = start_processes(step_for_ever, 2, tmp_path, timeout=4)
    for worker in workers:
        worker.wait_for("running")
    os.kill(workers[1].process.pid, how)
    began = time.monotonic()
    workers[0].process.join(30)
    assert time.monotonic() - began < 20
    (code, out), _ = finish_processes(workers, deadline=1)
    assert code == 1
    assert "expected all 2 processes of the group to take part in a step; process 0 waited" in out, out[-2000:]


def test_one_process_with_other_rows_ends_with_an_error(tmp_path):
    """The others see nothing new in theirs, and wait for it in the collective."""
    results = finish_processes(start_processes(step_with_other_rows, 2, tmp_path, timeout=4), deadline=30)
    assert [code for code, _ in results] == [1, 1]
    assert "or whose rows are as before; here push: 3 rows of float16" in results[1][1], results[1][1][-2000:]
    assert "expected all 2 processes of the group to take part in a step" in results[0][1], results[0][1][-2000:]


# --- on GPUs


def two_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


def on_gpu(seed, rank):
    return torch.Generator("cuda").manual_seed(100 * seed + rank)


def check_on_gpus(peer_memory, rank, world, folder):
    """Equal to one bank, with no wait for the device; then the step in a CUDA graph, and compiled."""
    d, n = 1024, 24
    plain = sv.ReferenceBank((d,), CLASSES, 9, track_indices=True, device="cuda")
    options = {"track_indices": True, "peer_memory": peer_memory, "device": "cuda"}
    sharded, replayed, compiled = (sv.ShardedReferenceBank((d,), CLASSES, 9, **options) for _ in range(3))
    assert (sharded.link is not None) == peer_memory
    rng = torch.Generator("cuda").manual_seed(0)

    def batch(step):
        x = torch.randn(n * world, d, device="cuda", generator=rng)
        y = torch.randint(CLASSES, (n * world,), device="cuda", generator=rng)
        return x, y, torch.arange(n * world, device="cuda") + step * n * world

    def share(parts):
        return [own(part, rank, world) for part in parts]

    objectives = {bank: sv.StableVMObjective(bank, cfg_prob=0.3, t_min=0.3) for bank in (sharded, replayed, compiled)}
    whole = sv.StableVMObjective(plain, cfg_prob=0.3, t_min=0.3, update_bank=False)
    static = share(batch(0))
    for bank in (sharded, replayed):  # loads kernels and communicators
        objectives[bank].sample(*static[:2], indices=static[2])
        bank.take_counts(torch.zeros_like(bank.counts), torch.zeros_like(bank.heads))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = objectives[replayed].sample(*static[:2], indices=static[2])
    fast = torch.compile(objectives[compiled].sample, fullgraph=True, dynamic=False)
    for step in range(4):
        given = batch(step)
        mine = share(given)
        plain.push(*given)
        torch.manual_seed(10 * step + rank)
        expected = whole.sample(*mine[:2])
        torch.manual_seed(10 * step + rank)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        draw = objectives[sharded].sample(*mine[:2], indices=mine[2])
        torch.cuda.set_sync_debug_mode("default")
        for name in ("x_t", "t", "labels", "x0", "noise"):
            assert torch.equal(getattr(draw, name), getattr(expected, name)), name
        assert_close(draw.target, expected.target)
        drawn, wanted = (bank.draw(mine[1], generator=on_gpu(step, rank)) for bank in (sharded, plain))
        assert equal(drawn.x0, wanted.x0)
        assert torch.equal(drawn.index, wanted.index)
        for target, source in zip(static, mine, strict=True):
            target.copy_(source)
        graph.replay()
        again = fast(*mine[:2], indices=mine[2])
        for bank, made in ((replayed, kept), (compiled, again)):
            assert_same_rings(plain, bank, rank, world)
            over = made.t >= 0.3
            wanted = plain.target(made.x_t, made.t, made.labels)
            assert over.any()
            assert_close(made.target[over], wanted[over])
    assert_same_rings(plain, sharded, rank, world)
    sharded.save(f"{folder}/saved")
    other = sv.ShardedReferenceBank((d,), CLASSES, 9, **options)
    other.load(f"{folder}/saved")
    assert_same_rings(plain, other, rank, world)
    del graph


@pytest.mark.gpu
@pytest.mark.timeout(300)  # the inductor compiles the whole step: about 15 s
@pytest.mark.parametrize("peer_memory", [True, False])
def test_two_gpus(tmp_path, peer_memory):
    two_gpus()
    run_processes(functools.partial(check_on_gpus, peer_memory), 2, tmp_path, backend="nccl")


def check_peers_as_collectives(rank, world, folder):
    """Rings, draws and targets of both ways: odd sizes, float64, a source, empty and partly filled rings, no rows."""
    for shape, capacity, null, dtype, work in (
        ((3, 5), 5, "ring", torch.float16, torch.float32),
        ((257,), 1, "all", torch.float64, torch.float64),
        ((2050,), 6, "all", torch.bfloat16, torch.float16),
        ((4096,), 7, "all", torch.float16, torch.float32),
        ((1000,), 6, "ring", torch.bfloat16, torch.float16),
        ((20_000,), 3, "ring", torch.float32, torch.float32),
    ):
        options = {"null": null, "dtype": dtype, "track_indices": True, "device": "cuda"}
        banks = [sv.ShardedReferenceBank(shape, CLASSES, capacity, peer_memory=way, **options) for way in (True, False)]
        rng = on_gpu(3, rank)
        labels = torch.arange(CLASSES + 1, device="cuda").repeat(3)
        n = len(labels)
        for step in range(4):
            x, noise = (torch.randn(n, *shape, device="cuda", generator=rng).to(work) for _ in range(2))
            x[1, 0] = math.nan
            t = torch.rand(n, device="cuda", generator=rng)
            t[3] = math.nan
            results = []
            for bank in banks:
                drawn = bank.draw(labels, generator=on_gpu(step, rank))
                mixed = bank.mixture(t, noise, labels, x, generator=on_gpu(step, rank))
                alone = x[:0], t[:0], labels[:0]
                nobody = bank.target(*alone), bank.draw(labels[:0]).x0
                given = [{}, {"source": noise}, {"prediction": "x0"}, {"interpolant": "cosine", "prediction": "noise"}]
                given += [{"interpolant": Shifted()}, {"interpolant": Shifted(), "source": noise}]
                targets = [bank.target(x, t, labels, **options) for options in given]
                wide = bank.target(x.double(), t.double(), labels)
                mean = bank.posterior_mean(x, 1 - t, t, bank.groups(labels))
                results.append((drawn.x0, drawn.index, *mixed, *nobody, *targets, wide, mean))
            for i, (one, other) in enumerate(zip(*results, strict=True)):
                assert (one.dtype, one.shape) == (other.dtype, other.shape)
                assert torch.equal(one.isnan(), other.isnan()), (shape, i, step)
                if i < 7:
                    assert equal(one, other), (shape, i, step)
                else:
                    assert_close(one.nan_to_num(), other.nan_to_num())
            pushed = torch.randint(-1, CLASSES, (5 + step,), device="cuda", generator=rng)  # class -1 is nobody's
            values = torch.randn(5 + step, *shape, device="cuda", generator=rng)
            index = torch.arange(5 + step, device="cuda") + 100 * rank + 1000 * step
            for bank in banks:
                bank.push(values, pushed, index)
            for name in ("counts", "heads", "local_counts", "refs", "indices"):
                assert torch.equal(*(getattr(bank, name) for bank in banks)), (name, step)
    data = torch.randn(30, 20_000), torch.arange(30) % CLASSES
    for bank in banks:
        assert bank.prefill(data, generator=torch.Generator().manual_seed(1)) == 1.0
    assert torch.equal(banks[0].refs, banks[1].refs)
    moved = banks[0].cpu().cuda()
    assert moved.link is None
    assert_close(moved.target(x[5:], t[5:], labels[5:]), banks[1].target(x[5:], t[5:], labels[5:]))
    with pytest.raises(ValueError, match="portions: expected 1"):
        sv.ShardedReferenceBank((4,), portions=2, peer_memory=True, device="cuda")


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_peer_memory_equals_collectives(tmp_path):
    two_gpus()
    run_processes(check_peers_as_collectives, 2, tmp_path, backend="nccl")


def check_many_steps(rank, world, folder):
    """Steps without a wait between them, each against one bank: nothing is written that another still reads."""
    d, small, large = 4096, 6, 40
    rng, ours = torch.Generator("cuda").manual_seed(0), torch.Generator().manual_seed(rank)
    plain = sv.ReferenceBank((d,), CLASSES, 5, null="all", device="cuda")
    bank = sv.ShardedReferenceBank((d,), CLASSES, 5, null="all", peer_memory=True, device="cuda")

    def step(n, given, send):
        values, labels, u, t, noise = given
        mine = slice(rank * n, (rank + 1) * n)
        plain.push(values, labels)
        (bank.push_ahead if send else bank.push)(values[mine], labels[mine])
        group = bank.groups(labels[mine].masked_fill(u[mine] < 0.2, CLASSES))
        given = group, u[mine], values[mine], noise[mine], t[mine]
        draws = [b._take(*given, send="exact" if send else "", pushed=send) for b in (plain, bank)]
        bad = sum((one != other).sum() for one, other in zip(draws[0][:4], draws[1][:4], strict=True))
        wanted, target = (
            b._target(sv.Linear(), draws[0][2], t[mine], group, None, "x0", "exact", send) for b in (plain, bank)
        )
        error = (target - wanted).norm() / wanted.norm()
        return bad, error.nan_to_num(nan=torch.inf)

    def batch(n):
        values, noise = (torch.randn(n * world, d, device="cuda", generator=rng) for _ in range(2))
        labels = torch.randint(-1, CLASSES, (n * world,), device="cuda", generator=rng)
        u = torch.rand(n * world, dtype=torch.float64, device="cuda", generator=rng)
        return values, labels, u, 0.5 + 0.4 * torch.rand(n * world, device="cuda", generator=rng), noise

    static = batch(large)
    for n in (small, large):  # makes room for the exchanges, and fills all rings
        step(n, [part[: n * world] for part in static], True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        replayed = step(large, static, True)
    found = []
    for i in range(400):
        if torch.rand((), generator=ours) < 0.3:
            torch.cuda._sleep(int(torch.randint(300_000, (), generator=ours)))  # one process falls behind
        if i % 3 == 0:
            for to, given in zip(static, batch(large), strict=True):
                to.copy_(given)
            graph.replay()
            found.append([part.clone() for part in replayed])
        else:
            n = large if i % 3 == 1 else small
            found.append(step(n, batch(n), i % 2 == 0))
    bad, error = (torch.stack(list(part)) for part in zip(*found, strict=True))
    assert not bad.any(), bad.nonzero()
    assert error.max() < 1e-6, error.max()
    held = bank.local_counts.tolist()
    for y, count in enumerate(plain.counts.tolist()):
        slots = [s for s in range(count) if (s + y) % world == rank]
        assert held[y] == len(slots)
        assert torch.equal(bank.refs[y, : len(slots)], plain.refs[y, slots])


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_many_steps_through_memory(tmp_path):
    two_gpus()
    run_processes(check_many_steps, 2, tmp_path, backend="nccl")


def check_large_pool(rank, world, folder):
    """A pool for which a part has the kernel for large ones: rows near one reference, and between two of the parts."""
    d, m = 4096, 10_000
    torch.manual_seed(0)
    plain = sv.ReferenceBank((d,), capacity=m, device="cuda")
    plain.refs.normal_()
    plain.counts.fill_(m)
    banks = [sv.ShardedReferenceBank((d,), capacity=m, peer_memory=way, device="cuda") for way in (True, False)]
    for bank in banks:
        bank.refs[0] = plain.refs[0, rank::world]
        bank.take_counts(plain.counts, plain.heads)
    rng = on_gpu(5, rank)
    t = torch.tensor([0.05, 0.2, 0.5, 0.8, 0.9, 0.97, 0.99, 0.999], device="cuda").repeat(2)
    picked = plain.refs[0, torch.randint(m, (len(t),), device="cuda", generator=rng)].double()
    noise = torch.randn(len(t), d, device="cuda", generator=rng).double()
    one, other = plain.refs[0, :16].double().view(8, 2, d).unbind(1)
    picked[:8] = (one + other) / 2
    gap = one - other
    noise[:8] -= (noise[:8] * gap).sum(1, keepdim=True) / gap.square().sum(1, keepdim=True) * gap
    x = ((1 - t[:, None]) * picked + t[:, None] * noise).float()
    for prediction in ("velocity", "x0"):
        wide = sv.Linear().target(x.double(), plain.refs[0], t.double(), prediction=prediction)
        for bank in banks:
            out = bank.target(x, t, prediction=prediction)
            for rows in torch.arange(len(t), device="cuda").view(2, 8).T:  # of one time
                assert_close(out[rows], wide[rows])
    t[2] = math.nan
    whole, part = (bank.target(x, t) for bank in (plain, banks[0]))
    assert torch.equal(whole.isnan(), part.isnan())


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_a_large_pool_on_two_gpus(tmp_path):
    two_gpus()
    run_processes(check_large_pool, 2, tmp_path, backend="nccl")


def check_large_classes(rank, world, folder):
    """Rows of which a block has hundreds of references or all: those of others go home from its registers."""
    for d, classes, capacity, n, dtype in (
        (512, 150, 700, 400, torch.float16),
        (4096, 120, 700, 200, torch.float16),
        (4096, 120, 700, 200, torch.bfloat16),
        (8200, 60, 600, 120, torch.float16),
    ):
        torch.manual_seed(0)
        plain = sv.ReferenceBank((d,), classes, capacity, dtype=dtype, device="cuda")
        for ring in plain.refs:
            ring.normal_()
        plain.counts.fill_(capacity)
        bank = sv.ShardedReferenceBank((d,), classes, capacity, dtype=dtype, peer_memory=True, device="cuda")
        for y, ring in enumerate(plain.refs):
            own = ring[(rank - y) % world :: world]
            bank.refs[y, : len(own)] = own
        bank.take_counts(plain.counts, plain.heads)
        rng = on_gpu(6, rank)
        labels = torch.randint(classes + 1, (n,), device="cuda", generator=rng)
        t = 0.3 + 0.6 * torch.rand(n, device="cuda", generator=rng)
        t[::4] = 0.99  # their weight is with many
        noise = torch.randn(n, d, device="cuda", generator=rng)
        x = (1 - t[:, None]) * plain.draw(labels, generator=rng).x0.float() + t[:, None] * noise
        for prediction in ("velocity", "x0"):
            wanted, out = (b.target(x, t, labels, prediction=prediction) for b in (plain, bank))
            error = (out - wanted).norm(dim=1) / wanted.norm(dim=1)
            assert error.max() <= TOLERANCE[torch.float32, "exact"], (d, dtype, prediction, error.max())


@pytest.mark.gpu
@pytest.mark.timeout(300)
def test_large_classes_through_memory(tmp_path):
    two_gpus()
    run_processes(check_large_classes, 2, tmp_path, backend="nccl")


def step_for_ever_on_gpus(peer_memory, rank, world, folder):
    bank = sv.ShardedReferenceBank((8,), 4, 16, peer_memory=peer_memory, device="cuda")
    for step in range(1_000_000):
        bank.push(torch.randn(4, 8, device="cuda"), torch.arange(4, device="cuda"))
        bank.target(torch.randn(4, 8, device="cuda"), torch.rand(4, device="cuda"), torch.arange(4, device="cuda"))
        torch.cuda.synchronize()
        if step == 20:
            print("running", flush=True)


@pytest.mark.gpu
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("peer_memory", [True, False], ids=["memory", "collectives"])
def test_a_lost_process_ends_the_others_on_gpus(tmp_path, peer_memory, how):
    """Within the group's timeout, with an error: of the bank's kernels, or of NCCL's watchdog."""
    two_gpus()
    work = functools.partial(step_for_ever_on_gpus, peer_memory)
    workers = start_processes(work, 2, tmp_path, timeout=6, backend="nccl")
    for worker in workers:
        worker.wait_for("running")
    os.kill(workers[1].process.pid, how)
    began = time.monotonic()
    workers[0].process.join(30)
    took = time.monotonic() - began
    (code, out), _ = finish_processes(workers, deadline=1)
    assert took < 20, out[-2000:]
    assert code
    if peer_memory:
        said = "expected all 2 processes of the group to take part in a step; process 0 waited for process 1"
    else:
        said = "Watchdog caught collective operation timeout"
    assert said in out, out[-2000:]


def contract_on_gpus(rank, world, folder):
    """The contract across the sizes that the kernels cut differently, for a pool and for classes."""
    rng = torch.Generator().manual_seed(0)
    for d in (300, 4096, 65_536):
        refs = make_references(40, d, "shifted", rng).half()
        for classes in (0, 4):
            bank = sv.ShardedReferenceBank((d,), classes, 40, null="all", device="cuda")
            labels = torch.arange(40) % 4
            bank.prefill([(refs.float(), labels)])
            t = torch.tensor([0.05, 0.5, 0.9, 0.999])
            x = (1 - t[:, None]) * refs[:4].float() + t[:, None] * torch.randn(4, d, generator=rng)
            asked = torch.tensor([0, 1, 2, 4])
            out = bank.target(x.cuda(), t.cuda(), asked.cuda() if classes else None, prediction="x0").cpu()
            for i in range(4):
                members = refs if not classes or asked[i] == 4 else refs[labels == asked[i]]
                row = slice(i, i + 1)
                exact = sv.Linear().target(x[row].double(), members, t[row].double(), prediction="x0")
                assert_close(out[row], exact)


@pytest.mark.gpu
def test_contract_on_two_gpus(tmp_path):
    two_gpus()
    run_processes(contract_on_gpus, 2, tmp_path, backend="nccl")

"""The bank in parts on the GPUs of one host: weak and strong scaling, and the bytes that travel beside their floor.

torchrun --standalone --nproc-per-node 2 benchmarks/multi_gpu.py --output multi_gpu.json

Every figure follows a check against float64 on a few rows. Times are medians of CUDA events around graph replays with a
cold L2, the slower GPU's; before each the GPUs meet, outside of the timed span. One GPU and several are measured in the
same run, on the same GPUs, by turns. `benchmarks/scaling.py --fit multi_gpu.json` fits its model to the file.

--device cpu tries the script itself, on gloo and with small sizes; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import stablevelocity as sv
import torch
import torch.distributed as dist
from stablevelocity import peer_memory
from stablevelocity.sharded_bank import compare
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from scaling import exchanged, floor_exchanged, through_memory

from stablevelocity_kernels import backends
from stablevelocity_kernels.testing import TOLERANCE, relative_error

LIMIT = TOLERANCE[torch.float32, "exact"]
T_LOW = 0.5


@dataclass(frozen=True)
class Sizes:
    """Of the class bank (anchors A) and of the pool."""

    rows: int = 256  # of each GPU
    classes: int = 1000  # and the null ring
    capacity: int = 256
    d: int = 4096
    pool_rows: int = 26  # of all GPUs together
    pool: int = 1_280_000
    repeats: int = 40
    work_side: int = 8192  # of the products that stand for a model


SMALL = Sizes(rows=8, classes=20, capacity=16, d=64, pool_rows=4, pool=512, repeats=3, work_side=64)


class Bench:
    """What every measurement needs: this process's device and its place among the others."""

    def __init__(self, cpu: bool, compiled: bool):
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda, self.compiled = not cpu, compiled
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            dist.init_process_group("nccl", device_id=self.device)
        else:
            dist.init_process_group("gloo")
        self.sizes = SMALL if cpu else Sizes()
        # As long to fill as the host takes to start what follows: nothing that is timed waits for it.
        self.flush = torch.empty(1 << (30 if self.cuda else 10), dtype=torch.int8, device=self.device)
        self.meeting = torch.zeros(1, device=self.device)
        self.began = time.perf_counter()

    def say(self, text: str = "") -> None:
        if self.rank == 0:
            print(text, flush=True)

    def slowest(self, value: float) -> float:
        """The largest of all processes."""
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return float(shared)

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph replay, by all processes at once."""
        if not self.cuda:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own thread asks for events meanwhile
            kept = call()

        def replay(kept=kept) -> None:  # the graph's outputs stay in place as long as this does
            graph.replay()

        return replay

    def times(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Median seconds of a call that is ready to be timed."""
        repeats, samples = repeats or self.sizes.repeats, []
        for i in range(repeats + 3):
            self.flush.zero_()
            dist.all_reduce(self.meeting)
            if not self.cuda:
                begin = time.perf_counter()
                call()
                samples.append(time.perf_counter() - begin)
                continue
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= 3:
                samples.append(begin.elapsed_time(end) / 1e3)
        return self.slowest(statistics.median(samples))

    def link_bytes(self, call: Callable[[], object], repeats: int = 100) -> float | None:
        """What a GPU sends over its links in a call, by the driver's counters; None where there are none."""
        ready, counts = self.capture(call), []
        for repeat in (0, repeats):
            for _ in range(repeat):
                ready()
            if self.cuda:
                torch.cuda.synchronize()
            dist.barrier()
            counts.append(_link_counter(self.device))
            dist.barrier()
        sent = -1.0 if None in counts else (counts[1] - counts[0]) / repeats
        most = self.slowest(sent)
        return None if most <= 0 else most

    def measure(self, calls: dict[str, Callable[[], object]], repeats: int | None = None) -> dict[str, float]:
        """Seconds of each call, the median of three rounds over all of them."""
        ready = {name: self.capture(call) for name, call in calls.items()}
        rounds = [{name: self.times(call, repeats) for name, call in ready.items()} for _ in range(3)]
        return {name: statistics.median(r[name] for r in rounds) for name in calls}


def _link_counter(device: torch.device) -> int | None:
    """Bytes that a GPU has sent over NVLink so far."""
    if device.type != "cuda":
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", "nvlink", "-gt", "d", "-i", f"GPU-{uuid}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.findall(r"Tx: (\d+) KiB", said)
    return 1024 * sum(map(int, found)) if found else None


def times_above(low: float) -> Callable[[int, torch.device, torch.Generator | None], Tensor]:
    return lambda n, device, generator: low + (1 - low) * torch.rand(n, device=device, generator=generator)


def cut(plain: sv.ReferenceBank, sharded: sv.ShardedReferenceBank) -> None:
    """Give each process its part of a bank that all of them have, without a second copy of it."""
    for y in range(len(plain.counts)):
        own = plain.refs[y, (sharded.part - y) % sharded.parts :: sharded.parts]
        sharded.refs[y, : len(own)] = own
    sharded.take_counts(plain.counts, plain.heads)


def exact(x: Tensor, t: Tensor, refs: Tensor) -> Tensor:
    """The velocity target of rows x (n, D) over refs (M, D), on the linear path, in float64, chunk by chunk."""
    x, t = x.double(), t.double()[:, None]
    centre = refs[: min(len(refs), 4096)].double().mean(0)
    y = x - (1 - t) * centre
    mean, lse = torch.zeros_like(x), torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for chunk in refs.split(16_384):
        d = chunk.double() - centre
        logits = ((1 - t) / t**2) * (y @ d.T - 0.5 * (1 - t) * d.square().sum(1))
        both = torch.logaddexp(lse, logits.logsumexp(1))
        mean = torch.exp(lse - both)[:, None] * mean + torch.exp(logits - both[:, None]) @ d
        lse = both
    return (x - centre - mean) / t


def check(bench: Bench, name: str, target: Tensor, expected: Tensor) -> float:
    error = bench.slowest(relative_error(target, expected))
    if not error <= LIMIT:
        raise SystemExit(f"{name}: relative error {error:.2e} is above {LIMIT:.0e}; not timed")
    return error


def class_bank(bench: Bench) -> dict:
    """Weak scaling: every GPU brings as many rows as one GPU alone has, over the same references."""
    s = bench.sizes
    torch.manual_seed(0)  # the same bank everywhere
    plain = sv.ReferenceBank((s.d,), s.classes, s.capacity, device=bench.device)
    for ring in plain.refs:
        ring.normal_()
    plain.counts.fill_(s.capacity)
    banks, several = {"one GPU": plain}, f"{bench.world} GPUs"
    for name, options in ((several, {}), (f"{several}, collectives", {"peer_memory": False})):
        banks[name] = sv.ShardedReferenceBank((s.d,), s.classes, s.capacity, device=bench.device, **options)
        cut(plain, banks[name])

    torch.manual_seed(1 + bench.rank)
    x0 = torch.randn(s.rows, s.d, device=bench.device)
    labels = torch.randint(s.classes, (s.rows,), device=bench.device)
    given = labels.masked_fill(torch.rand(s.rows, device=bench.device) < 0.1, s.classes)
    t = T_LOW + (1 - T_LOW) * torch.rand(s.rows, device=bench.device)
    picked = plain.draw(given).x0
    x_t = (1 - t[:, None]) * picked + t[:, None] * torch.randn_like(picked)
    few = torch.cat([(given == s.classes).nonzero()[:2, 0], torch.arange(4, device=bench.device)])
    expected = torch.cat([exact(x_t[i : i + 1], t[i : i + 1], plain.refs[given[i]]) for i in few.tolist()])
    targets = {name: bank.target for name, bank in banks.items()}
    steps = {
        name: sv.StableVMObjective(bank, times=times_above(T_LOW), t_min=T_LOW).sample for name, bank in banks.items()
    }
    if bench.compiled:
        for name in ("one GPU", several):
            steps[f"{name}, compiled"] = torch.compile(steps[name], fullgraph=True, dynamic=False)
    errors = {
        name: check(bench, f"class bank, {name}", target(x_t, t, given)[few], expected)
        for name, target in targets.items()
    }
    target = bench.measure({name: (lambda call=call: call(x_t, t, given)) for name, call in targets.items()})
    step = bench.measure({name: (lambda call=call: call(x0, labels)) for name, call in steps.items()})
    distinct = len(torch.unique(given))
    return {
        "rows": s.rows,
        "classes": s.classes + 1,
        "capacity": s.capacity,
        "d": s.d,
        "distinct_classes": distinct,
        "bytes_read_by_one": distinct * s.capacity * s.d * 2,
        "errors": errors,
        "target_seconds": target,
        "step_seconds": step,
        "beside_a_model": beside_a_model(bench, plain, x0, labels),
        "bytes_target": {
            "sent": through_memory(bench.world, s.rows, s.d)["target"],
            "counted": bench.link_bytes(lambda: targets[several](x_t, t, given)),
            "sent_by_collectives": exchanged(bench.world, s.rows, s.d)["target"],
            "floor": floor_exchanged(bench.world, s.rows, s.d),
        },
        "bytes_step": {
            "sent": sum(through_memory(bench.world, s.rows, s.d).values()),
            "counted": bench.link_bytes(lambda: steps[several](x0, labels)),
            "sent_by_collectives": sum(exchanged(bench.world, s.rows, s.d).values()),
        },
    }


def beside_a_model(bench: Bench, plain: sv.ReferenceBank, x0: Tensor, labels: Tensor) -> dict[str, float]:
    """Seconds of a whole step, in which products stand for a model of about 20 ms, on the host's clock."""
    s = bench.sizes
    group = dist.new_group()  # the draw's own, as beside a model that communicates too
    sharded = sv.ShardedReferenceBank((s.d,), s.classes, s.capacity, group=group, device=bench.device)
    cut(plain, sharded)
    a, b = (torch.randn(s.work_side, s.work_side, device=bench.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    steps = 20 if bench.cuda else 2

    def run(draws) -> float:
        bench.meeting.zero_()
        dist.all_reduce(bench.meeting)
        if bench.cuda:
            torch.cuda.synchronize()
        for i, _ in enumerate(draws):
            if i == 3:
                if bench.cuda:
                    torch.cuda.synchronize()
                begin = time.perf_counter()
            if i == steps + 3:  # as many draws were made meanwhile, also where they are made ahead
                break
            for _ in range(12):
                torch.mm(a, b, out=out)
        if bench.cuda:
            torch.cuda.synchronize()
        return bench.slowest((time.perf_counter() - begin) / steps)

    batches = [(x0, labels)] * (steps + 5)
    objectives = {
        "one GPU": sv.StableVMObjective(plain, times=times_above(T_LOW), t_min=T_LOW),
        f"{bench.world} GPUs": sv.StableVMObjective(sharded, times=times_above(T_LOW), t_min=T_LOW),
    }
    seconds = {"the model alone": run(batches)}
    for name, objective in objectives.items():
        seconds[f"{name}, in turn"] = run(objective.sample(*batch) for batch in batches)
        seconds[f"{name}, ahead"] = run(objective.ahead(batches))
    return seconds


def pool(bench: Bench) -> dict:
    """Strong scaling: the same rows over the same pool, by one GPU and by all."""
    s = bench.sizes
    torch.manual_seed(0)
    plain = sv.ReferenceBank((s.d,), capacity=s.pool, device=bench.device)
    for part in plain.refs[0].split(32_768):
        part.normal_()
    plain.counts.fill_(s.pool)
    sharded = sv.ShardedReferenceBank((s.d,), capacity=s.pool, device=bench.device)
    cut(plain, sharded)
    n = s.pool_rows // bench.world * bench.world
    t = T_LOW + (1 - T_LOW) * torch.rand(n, device=bench.device)
    t[0], t[-1] = 0.97, 0.99  # where the weights are spread over the whole pool
    picked = plain.refs[0, torch.randint(s.pool, (n,), device=bench.device)].float()
    x_t = (1 - t[:, None]) * picked + t[:, None] * torch.randn_like(picked)
    own = slice(bench.rank * n // bench.world, (bench.rank + 1) * n // bench.world)
    mine = x_t[own].contiguous(), t[own].contiguous()
    few = torch.tensor([0, 1, n - 1], device=bench.device)
    errors = {
        "one GPU": check(bench, "pool, one GPU", plain.target(x_t, t)[few], exact(x_t[few], t[few], plain.refs[0]))
    }
    ends = torch.tensor([0, -1], device=bench.device)
    errors[f"{bench.world} GPUs"] = check(
        bench,
        f"pool, {bench.world} GPUs",
        sharded.target(*mine)[ends],
        exact(mine[0][ends], mine[1][ends], plain.refs[0]),
    )
    seconds = bench.measure(
        {"one GPU": lambda: plain.target(x_t, t), f"{bench.world} GPUs": lambda: sharded.target(*mine)}, repeats=7
    )
    return {
        "rows": n,
        "references": s.pool,
        "d": s.d,
        "errors": errors,
        "seconds": seconds,
        "bytes": {
            "sent": through_memory(bench.world, n // bench.world, s.d)["target"],
            "sent_by_collectives": exchanged(bench.world, n // bench.world, s.d)["target"],
            "floor": floor_exchanged(bench.world, n // bench.world, s.d),
        },
    }


def link(bench: Bench) -> list[dict[str, float]]:
    """Seconds of an all-gather and an all-to-all by the bytes that a process sends; and of a gather through memory."""
    found = []
    peers = peer_memory.connect(dist.group.WORLD, bench.device, compare)
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 27):
        own = torch.zeros(size // 4, device=bench.device)
        whole, back = (torch.empty(size // 4 * bench.world, device=bench.device) for _ in range(2))
        calls = {
            "all_gather": lambda own=own, whole=whole: dist.all_gather_into_tensor(whole, own),
            "all_to_all": lambda whole=whole, back=back: dist.all_to_all_single(back, whole),
        }
        if peers is not None:
            box = peers.mailbox("link", (tuple(whole.shape), whole.dtype))
            calls["peer_memory"] = lambda own=own, box=box: peers.gather(box, own)
        found.append({"bytes": size * (bench.world - 1)} | bench.measure(calls))
        if not bench.cuda and size >= 1 << 16:
            break
    return found


def read_rate(bench: Bench) -> float:
    """Bytes per second of a read-only reduction."""
    source = torch.randn((1 << 29) if bench.cuda else (1 << 12), device=bench.device)
    return 4 * source.numel() / bench.measure({"sum": lambda: source.sum()}, repeats=10)["sum"]


def report(bench: Bench, found: dict) -> None:
    several = f"{bench.world} GPUs"
    bank, big = found["class_bank"], found["pool"]
    ms = 1e3

    def share(seconds: dict[str, float], name: str) -> str:
        one = "one GPU, compiled" if name.endswith(", compiled") else "one GPU"
        return f"{100 * seconds[one] / seconds[name]:.0f} %"

    bench.say(f"\n{found['device']} · torch {found['torch']} · backends {found['backends']}\n")
    bench.say(f"| class bank, {bank['rows']} rows a GPU | target | efficiency | push, draw, target | efficiency |")
    bench.say("| --- | --- | --- | --- | --- |")
    for name in bank["step_seconds"]:
        cells = []
        for key in ("target_seconds", "step_seconds"):
            known = name in bank[key]  # a target alone is not compiled: it is one operator
            cells += [f"{ms * bank[key][name]:.3f} ms", share(bank[key], name)] if known else ["", ""]
        bench.say(f"| {name} | {' | '.join(cells)} |")
    bench.say("\n| beside a model | a step | efficiency |\n| --- | --- | --- |")
    for name, value in bank["beside_a_model"].items():
        base = bank["beside_a_model"]["one GPU, in turn"]
        bench.say(f"| {name} | {ms * value:.3f} ms | {100 * base / value:.1f} % |")
    seconds = big["seconds"]
    bench.say(
        f"\n| pool, {big['rows']} x {big['references']:,} x {big['d']} float16 | time | speed-up |\n| --- | --- | --- |"
    )
    for name, value in seconds.items():
        bench.say(f"| {name} | {ms * value:.3f} ms | {seconds['one GPU'] / value:.2f} |")
    bench.say("\n| a GPU sends | bytes | floor | ratio |\n| --- | --- | --- | --- |")
    for name, sent in (("class bank, target", bank["bytes_target"]), ("pool", big["bytes"])):
        for how in ("sent", "sent_by_collectives", "counted"):
            if sent.get(how):
                ratio = sent[how] / max(1, sent["floor"])
                bench.say(f"| {name}, {how.replace('_', ' ')} | {sent[how]:,.0f} | {sent['floor']:,} | {ratio:.3f} |")
    ways = [key for key in found["link"][0] if key != "bytes"]
    bench.say(f"\n| bytes sent | {' | '.join(ways)} |\n| --- |{' --- |' * len(ways)}")
    for row in found["link"]:
        bench.say(f"| {row['bytes']:,} | {' | '.join(f'{1e6 * row[way]:.1f} µs' for way in ways)} |")
    errors = [*bank["errors"].values(), *big["errors"].values()]
    bench.say(f"\nrelative error at most {max(errors):.1e} ({several}: {big['errors'][several]:.1e} over the pool)")
    bench.say(f"{time.perf_counter() - bench.began:.0f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave the rows under torch.compile out")
    args = parser.parse_args()
    bench = Bench(args.device == "cpu", not args.no_compile)
    found = {
        "device": torch.cuda.get_device_name() if bench.cuda else "cpu",
        "world": bench.world,
        "torch": torch.__version__,
        "backends": backends(),
    }
    for name, part in (("read_bytes_per_s", read_rate), ("link", link), ("pool", pool), ("class_bank", class_bank)):
        with torch.no_grad():
            found[name] = part(bench)
        if bench.rank == 0 and args.output is not None:  # what there is, should a later part fail
            args.output.write_text(json.dumps(found, indent=2) + "\n")
        bench.say(f"{name}: done after {time.perf_counter() - bench.began:.0f} s")
    report(bench, found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

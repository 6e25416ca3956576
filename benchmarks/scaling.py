"""What a step over a bank in parts costs, on paper: bytes, operations, collectives and latency on any number of GPUs.

python benchmarks/scaling.py                                   # the tables of docs/scaling.md
python benchmarks/scaling.py --fit benchmarks/multi_gpu.json   # with constants from measurements, and how well they fit
python benchmarks/scaling.py --fit ... --update docs/scaling.md

Every constant is a field of `Machine`; docs/scaling.md says what the terms mean.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

BEGIN, END = "<!-- tables: benchmarks/scaling.py -->", "<!-- end of tables -->"


@dataclass(frozen=True)
class Machine:
    """Constants of the model. Times in seconds, rates in bytes or pairs of values per second."""

    name: str = "H100 80 GB, before the fit"
    memory: float = 72e9  # bytes of a GPU that may hold references
    call: float = 40e-6  # of a target besides what follows: small kernels, merge
    read: float = 2.4e12  # references of a class bank
    pairs: float = 2.5e12  # (value of a row) x (value of a reference), each two multiply-adds, of a pool in float32
    link: float = 300e9  # bytes a GPU sends within a host
    link_latency: float = 15e-6  # of an exchange within a host
    exchanges: int = 3  # within a host, that wait for one another: 2 through memory, 3 collectives
    collective_latency: float = 20e-6  # of each of the 3 between hosts, without its hops
    host: int = 8  # GPUs of a host
    # Between hosts: assumed, since this needs more than one to measure.
    network: float = 40e9  # bytes a GPU sends between hosts: 400 Gb/s at 80 %
    network_latency: float = 5e-6  # of a hop from host to host, hosts - 1 of them in a ring


@dataclass(frozen=True)
class Work:
    """A step's target on every GPU."""

    gpus: int
    references: float  # in all
    d: int
    rows: int = 256  # of each GPU
    null_rows: int = 26  # of these, over every reference where null = "all"
    classes: int = 1000
    stored: int = 2  # bytes of a stored value


@dataclass(frozen=True)
class Cost:
    """Seconds of a target by what they are spent on."""

    read: float
    arithmetic: float
    link: float
    network: float
    latency: float

    @property
    def compute(self) -> float:
        return max(self.read, self.arithmetic)

    @property
    def communication(self) -> float:
        return max(self.link, self.network) + self.latency

    @property
    def total(self) -> float:
        return self.compute + self.communication

    @property
    def bound(self) -> str:
        parts = {
            "reading": self.read,
            "arithmetic": self.arithmetic,
            "link": self.link,
            "network": self.network,
            "latency": self.latency,
        }
        return max(parts, key=parts.get)


def exchanged(gpus: int, rows: int, d: int, stored: int = 2) -> dict[str, int]:
    """Bytes that a GPU sends in the collectives of a step, by method: each is (P - 1) N times what a row has."""
    return {
        "push": (gpus - 1) * rows * (stored * d + 8),  # values and labels gathered
        "draw": (gpus - 1) * rows * (stored * d + 16),  # random numbers and rings gathered, references fetched
        "target": (gpus - 1) * rows * (8 * d + 32),  # x_t and 24 bytes gathered, means and lse handed back
    }


def through_memory(gpus: int, rows: int, d: int, stored: int = 2) -> dict[str, int]:
    """The same through the memory of GPUs of one host: what a GPU writes to others, or they read from it.

    The least: the kernel of class banks reads an x_t anew in every block that has a part of the row.
    """
    others = gpus - 1
    return {
        # labels to all; a row to its slot in its own ring and in the last one, of which 1 / P are here
        "push": others * rows * 8 + 2 * others * rows * stored * d // gpus,
        "draw": others * rows * stored * d // gpus,
        "target": others * rows * (8 * d + 88),  # x_t, words of time and ring; means, words that tell of four pieces
    }


def floor_exchanged(gpus: int, rows: int, d: int) -> int:
    """Bytes of a target without which no part could see a float32 row and give back its float32 mean."""
    return (gpus - 1) * rows * 8 * d


def cost(machine: Machine, work: Work, *, over_everything: bool) -> Cost:
    """Of a target: each row over its class, or its null rows over every reference."""
    rows = work.null_rows if over_everything else work.rows
    gathered, part = work.gpus * rows, work.references / work.gpus
    if over_everything:
        read, pairs = part * work.d * work.stored, gathered * part * work.d
    else:
        ring = part / work.classes  # references of a class that a GPU holds
        touched = work.classes * (1 - (1 - 1 / work.classes) ** gathered)
        read, pairs = touched * ring * work.d * work.stored, gathered * ring * work.d
    hosts = -(-work.gpus // machine.host)
    sent = exchanged(work.gpus, rows, work.d)["target"]
    outside = max(0, work.gpus - machine.host) / max(1, work.gpus - 1)
    if hosts > 1:
        latency = 3 * (machine.collective_latency + (hosts - 1) * machine.network_latency)
    else:
        latency = 0 if work.gpus == 1 else machine.exchanges * machine.link_latency
    return Cost(
        read=machine.call + read / machine.read,
        arithmetic=machine.call + pairs / machine.pairs,
        link=(1 - outside) * sent / machine.link,
        network=outside * sent / machine.network,
        latency=latency,
    )


# -- the fit


def fit(found: dict) -> Machine:
    """The constants that benchmarks/multi_gpu.py measured; those between hosts stay as they are."""
    bank, pool, machine = found["class_bank"], found["pool"], Machine()
    collectives = [(row["bytes"], max(row["all_gather"], row["all_to_all"])) for row in found["link"]]
    memory = [(row["bytes"], row["peer_memory"]) for row in found["link"] if "peer_memory" in row]
    times = memory or collectives
    latency, (most, longest) = times[0][1], times[-1]
    return replace(
        machine,
        name=f"{found['device']}, fitted to {found['world']} of them",
        read=bank["bytes_read_by_one"] / max(1e-9, bank["target_seconds"]["one GPU"] - machine.call),
        pairs=pool["rows"] * pool["references"] * pool["d"] / pool["seconds"]["one GPU"],
        link=most / max(1e-9, longest - latency),
        link_latency=latency,
        exchanges=2 if memory else 3,
        collective_latency=collectives[0][1],
    )


def fitted(machine: Machine, found: dict) -> Iterator[str]:
    """The model beside what was measured, where it was not fitted to it: on several GPUs."""
    world, bank, pool = found["world"], found["class_bank"], found["pool"]
    several = f"{world} GPUs"
    classes = bank["classes"]
    weak = Work(world, classes * bank["capacity"], bank["d"], bank["rows"], classes=classes)
    strong = Work(world, pool["references"], pool["d"], null_rows=pool["rows"] // world)
    yield f"| on {several} | model | measured | model / measured |"
    yield "| --- | --- | --- | --- |"
    for name, model, measured in (
        ("class bank, target", cost(machine, weak, over_everything=False).total, bank["target_seconds"][several]),
        ("pool", cost(machine, strong, over_everything=True).total, pool["seconds"][several]),
    ):
        yield f"| {name} | {seconds(model)} | {seconds(measured)} | {model / measured:.2f} |"


# -- the tables


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{1e6 * value:.0f} µs"


def size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


GPUS, REFERENCES, SIZES = (8, 64, 512), (10**6, 10**8, 10**9), (4_096, 65_536)


def constants(machine: Machine) -> Iterator[str]:
    yield f"Constants: {machine.name}.\n"
    yield (
        "| references read | pairs | link | an exchange within a host | a collective | network (assumed) | "
        "network hop (assumed) | a call |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    yield (
        f"| {machine.read / 1e12:.2f} TB/s | {machine.pairs / 1e12:.2f}e12 /s | {machine.link / 1e9:.0f} GB/s | "
        f"{seconds(machine.link_latency)} | {seconds(machine.collective_latency)} | "
        f"{machine.network / 1e9:.0f} GB/s | {seconds(machine.network_latency)} | "
        f"{seconds(machine.call)} |"
    )


def scaling_table(machine: Machine, d: int) -> Iterator[str]:
    yield f"{d:,} values a reference, 256 rows on each GPU, 1,000 classes:\n"
    yield "| references | GPUs | each holds | class bank: compute | exchange | bound by | null over all | bound by |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for references in REFERENCES:
        for gpus in GPUS:
            work = Work(gpus, references, d)
            held = references * d * work.stored / gpus
            lead = f"| {references:,} | {gpus} | {size(held)} |"
            if held > machine.memory:
                least = -(-references * d * work.stored // int(machine.memory))
                yield f"{lead} does not fit: {least:,} GPUs would hold it | | | | |"
                continue
            own, everything = (cost(machine, work, over_everything=e) for e in (False, True))
            yield (
                f"{lead} {seconds(own.compute)} | {seconds(own.communication)} | {own.bound} | "
                f"{seconds(everything.total)} | {everything.bound} |"
            )


def exchange_table(machine: Machine) -> Iterator[str]:
    yield "| GPUs | D | push | draw | target | of that, between hosts | the same over 8 GPUs of one host |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for gpus in GPUS:
        for d in SIZES:
            sent, within = exchanged(gpus, 256, d), sum(exchanged(min(gpus, machine.host), 256, d).values())
            outside = max(0, gpus - machine.host) / (gpus - 1)
            yield (
                f"| {gpus} | {d:,} | {size(sent['push'])} | {size(sent['draw'])} | {size(sent['target'])} | "
                f"{100 * outside:.0f} % | {size(within)} in all |"
            )


def subsampling_table(machine: Machine, d: int) -> Iterator[str]:
    yield f"| references of a row, M | variance, of CFM's | 26 rows over them on one GPU, D = {d:,} |"
    yield "| --- | --- | --- |"
    for m in (2, 16, 256, 4_096, 65_536, 10**6):
        alone = cost(machine, Work(1, m, d), over_everything=True)
        share = 1 / (m - 1)
        yield f"| {m:,} | {100 * share:.3g} % | {seconds(alone.total)} |"


def tables(machine: Machine, found: dict | None) -> str:
    lines = list(constants(machine))
    if found is not None:
        lines += ["", "### The model against the measurements", "", *fitted(machine, found)]
    lines += ["", "### A target", ""]
    for d in SIZES:
        lines += [*scaling_table(machine, d), ""]
    lines += ["### What a GPU sends in a step", "", *exchange_table(machine), ""]
    lines += ["### Fewer references instead", "", *subsampling_table(machine, SIZES[0])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", type=Path, help="what benchmarks/multi_gpu.py wrote")
    parser.add_argument("--update", type=Path, help="a page whose tables to replace")
    args = parser.parse_args()
    found = None if args.fit is None else json.loads(args.fit.read_text())
    text = tables(Machine() if found is None else fit(found), found)
    if args.update is None:
        print(text)
        return
    page = args.update.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        sys.exit(f"--update: expected {BEGIN} and {END} once each in {args.update}")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    args.update.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()

"""HostReferenceBank: how much of the copies from the host a training step hides, beside work that stands for the model.

Every step's classes are absent from the device, as from a bank much larger than the GPU. Times are whole steps on the
host's clock, the device waited for at the end of many. "copies alone" is the time of these bytes at the bandwidth of
one plain pinned copy, measured in the same run; "hidden" is the share of it that the step does not grow by.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import stablevelocity as sv
import torch

from stablevelocity_kernels.testing import assert_close

# classes, references per class, D, rows; classes / rows batches visit every class once, and only two fit the device
CASES = {"cuda": (256, 256, 16_384, 64), "cpu": (32, 16, 1_024, 8)}
STEPS, WARM = {"cuda": 24, "cpu": 4}, 4
HALF = {"cuda": torch.bfloat16, "cpu": torch.float32}  # of the products that stand for the model
SIDE = {"cuda": 8192, "cpu": 256}


def batches(device: torch.device, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(x0 on the device, labels on the host): block after block of classes, so that none is still there from before."""
    classes, _, d, rows = CASES[device.type]
    x0 = torch.randn(rows, d, device=device)
    for i in range(count):
        yield x0, (torch.arange(rows) + i * rows) % classes


def seconds(device: torch.device, call: Callable[[], object], repeats: int) -> float:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def work_of(device: torch.device, milliseconds: float) -> Callable[[], None]:
    """Products that take about so long."""
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=HALF[device.type]) for _ in range(2))
    out = torch.empty_like(a)
    once = seconds(device, lambda: torch.mm(a, b, out=out), 10)
    count = max(1, round(milliseconds / 1e3 / once))

    def work() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    return work


def step_seconds(bank: sv.ReferenceBank, device: torch.device, ahead: bool, work: Callable[[], None]) -> float:
    """Seconds a step takes: push, draw and target, then the work. As many batches are copied as steps are timed."""
    objective, count = sv.StableVMObjective(bank, t_min=0.0), STEPS[device.type]
    stream = batches(device, WARM + count + (2 if ahead else 1))
    stream = bank.ahead(stream) if ahead else ((x0, labels.to(device, non_blocking=True)) for x0, labels in stream)
    for step, (x0, labels) in enumerate(stream):
        if step == WARM:
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
        if step == WARM + count:
            break
        objective.sample(x0, labels)
        work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


@pytest.mark.parametrize("milliseconds", [5, 30])
def test_host_bank(benchmark, device, capsys, milliseconds):
    classes, capacity, d, rows = CASES[device.type]
    plain = sv.ReferenceBank((d,), classes, capacity, device=device)
    plain.refs.normal_()
    plain.counts.fill_(capacity)
    host = sv.HostReferenceBank((d,), classes, capacity, max_classes=rows, device=device)
    host.load_state_dict(plain.state_dict())
    x0, labels = next(batches(device, 1))
    draws = []
    for bank, given in ((plain, labels.to(device)), (host, host.prefetch(labels))):
        torch.manual_seed(0)
        draws.append(sv.StableVMObjective(bank, t_min=0.0).sample(x0, given))
    assert torch.equal(draws[0].x_t, draws[1].x_t)
    assert_close(draws[1].target, draws[0].target)  # no speed is printed for a wrong result
    host.prefetch(torch.arange(classes - rows, classes))  # the first batch's classes must not be there in the beginning
    host.prefetch(torch.arange(classes - 2 * rows, classes - rows))

    ring = host.refs[0].nbytes
    source = torch.empty(rows * ring, dtype=torch.int8, pin_memory=device.type == "cuda")
    target = torch.empty_like(source, device=device)
    alone = seconds(device, lambda: target.copy_(source, non_blocking=True), 5)
    work = work_of(device, milliseconds if device.type == "cuda" else milliseconds / 5)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the labels were not prefetched
        before = host.copied
        on_device = step_seconds(plain, device, False, work)
        waiting = step_seconds(host, device, False, work)
        middle = host.copied
        hidden = step_seconds(host, device, True, work)
    steps = WARM + STEPS[device.type]
    per_step = (host.copied - middle) / (steps + 2)
    assert per_step == (middle - before) / steps == rows * ring, "a class was on the device already"

    bare = benchmark.pedantic(lambda: seconds(device, work, 3), rounds=1)
    rows_out = [
        ("the work alone", bare),
        ("bank on the device", on_device),
        ("bank on the host, not prefetched", waiting),
        ("bank on the host, prefetched", hidden),
    ]
    share = 1 - (hidden - on_device) / alone
    figures = {
        "bytes_per_step": per_step,
        "copies_alone": alone,
        "gbytes_per_s": per_step / alone / 1e9,
        "hidden": share,
        "bound": max(on_device, alone),
    } | dict(rows_out)
    benchmark.extra_info.update(figures)
    with capsys.disabled():
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, without streams: nothing can be hidden"
        print(f"\n\n{classes}×{capacity}×{d} float16, {rows} rows, {rows} new classes a step · {name}")
        print(
            f"copied {per_step / 1e6:.0f} MB a step; copies alone {1e3 * alone:.2f} ms "
            f"at {per_step / alone / 1e9:.1f} GB/s (one pinned copy)\n"
        )
        print("| step | time | over the bank on the device |\n| --- | --- | --- |")
        for label, value in rows_out:
            print(f"| {label} | {1e3 * value:.2f} ms | {1e3 * (value - on_device):+.2f} ms |")
        if device.type == "cuda":
            print(
                f"\nhidden: {100 * share:.0f} % of the copies; no step can be shorter than "
                f"{1e3 * figures['bound']:.2f} ms, the longer of the step and its copies"
            )

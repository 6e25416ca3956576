"""How a call is timed: median of repeats; on CUDA with events around graph replays where the call captures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WAKING = 0.1  # seconds of work before the first sample: clocks of a GPU that has idled take time to rise


def time_call(call: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Median seconds of one call, after a warm-up. Spends about `budget` seconds, three calls at least."""
    return time_cuda(call, budget) if device.type == "cuda" else time_cpu(call, budget)


def time_cpu(call: Callable[[], object], budget: float) -> float:
    call()
    samples: list[float] = []
    while len(samples) < 3 or (sum(samples) < budget and len(samples) < 500):
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def capture(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph replay, or the call itself where it cannot be captured (it synchronises)."""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return call
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_cuda(call: Callable[[], object], budget: float) -> float:
    """Every call starts with cold inputs, as in a training step: the L2 was filled by reading something else.

    Filled by writing, it would hold lines that the call has to write back for somebody else before it can load its
    own: 5 of 19 µs for a step of 38 MB on an H100, none of them its bytes.
    """
    replay = capture(call)
    flush = torch.zeros(1 << 26, device="cuda")  # several times the L2
    samples: list[float] = []
    wake = time.perf_counter()
    while time.perf_counter() - wake < WAKING:
        flush.sum()
        replay()
        torch.cuda.synchronize()
    begin_all = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - begin_all < budget and len(samples) < 200):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()
        begin.record()
        replay()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def host_time(call: Callable[[], object], device: torch.device, calls: int = 200) -> float:
    """Seconds of the calling thread for one call: the least mean of 30 runs of `calls`, which the device can queue."""
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - begin) / calls)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return best

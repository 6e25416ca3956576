"""The `measure` fixture: checks an op against float64, times it and its peers, adds a row to the table printed last.

pytest benchmarks                              # on the GPU if there is one, else on the CPU
pytest benchmarks --svel-device cpu -k class_bank
pytest benchmarks --benchmark-json out.json    # every row's figures under extra_info
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ceilings import Ceilings, measure_ceilings
from timing import capture, time_call

import stablevelocity_kernels as svel
from stablevelocity_kernels.testing import relative_error

_ROWS: list[dict] = []
_CEILINGS: dict[str, Ceilings] = {}


def pytest_addoption(parser):
    parser.addoption("--svel-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.addoption("--svel-compile", action="store_true", help="also time every peer under torch.compile")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.getoption("--svel-device"))


@pytest.fixture(scope="session")
def ceilings(device) -> Ceilings:
    if device.type not in _CEILINGS:
        _CEILINGS[device.type] = measure_ceilings(device)
    return _CEILINGS[device.type]


@pytest.fixture
def measure(request, benchmark, device, ceilings):
    def run(
        name: str,
        call: Callable[[], object],
        *,
        check: tuple[Callable[[], torch.Tensor], torch.Tensor, float] | None,
        peers: dict[str, Callable[[], object]],
        bytes_read: float,
        bytes_written: float = 0.0,
        flops: float = 0.0,
        rate: str = "float32",
    ) -> None:
        error = float("nan")
        if check is not None:  # no speed is printed for a wrong result
            output, expected, limit = check
            error = relative_error(output().to("cpu"), expected)
            assert error <= limit, f"{name}: relative error {error:.2e} is above {limit:.0e}; not timed"
        seconds = time_call(call, device)
        timed = capture(call) if device.type == "cuda" else call

        def once() -> None:
            timed()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=5, warmup_rounds=1)
        times = {}
        for peer, peer_call in peers.items():
            times[peer] = time_call(peer_call, device)
            if request.config.getoption("--svel-compile") and not peer.startswith("loop"):  # loops read the labels back
                times[f"compiled {peer}"] = time_call(torch.compile(peer_call), device)
        best = min(times, key=times.get)
        floor = ceilings.floor(bytes_read, bytes_written, flops, rate)
        row = {
            "case": name,
            "seconds": seconds,
            "gbytes_per_s": (bytes_read + bytes_written) / seconds / 1e9,
            "gflop_per_s": flops / seconds / 1e9,
            "share_of_floor": floor / seconds,
            "best_peer": best,
            "best_peer_seconds": times[best],
            "ratio": times[best] / seconds,
            "error": error,
        }
        benchmark.extra_info.update(row | {"peers": times})
        _ROWS.append(row)

    return run


def _commit() -> str:
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return git.stdout.strip() or "unknown"


def pytest_terminal_summary(terminalreporter, config):
    if not _ROWS:
        return
    write = terminalreporter.write_line
    device = config.getoption("--svel-device")
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    top = _CEILINGS[device]
    write("")
    write(f"{name} · torch {torch.__version__} · commit {_commit()} · backends {svel.backends()}")
    write(
        f"ceilings: read {top.read / 1e9:.0f} GB/s, copy {top.copy / 1e9:.0f} GB/s, "
        f"float32 {top.float32 / 1e12:.2f} TFLOP/s, float16 {top.float16 / 1e12:.2f} TFLOP/s"
    )
    write("")
    write("| case | time | GB/s | GFLOP/s | share of floor | best plain torch | its time | ratio | rel. error |")
    write("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in _ROWS:
        write(
            f"| {row['case']} | {_time(row['seconds'])} | {row['gbytes_per_s']:.1f} | {row['gflop_per_s']:.0f} "
            f"| {100 * row['share_of_floor']:.0f} % | {row['best_peer']} | {_time(row['best_peer_seconds'])} "
            f"| {row['ratio']:.2f} | {row['error']:.1e} |"
        )


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3f} ms"

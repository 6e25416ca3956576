"""How tests run a function on several processes, all with one deadline: gloo, or NCCL with a GPU for each.

`run_processes(f, world, folder)` calls f(rank, world, folder) on every process of a group. A process that fails, or
outlives the deadline, fails the test with its output. Processes are forked from a server that has imported torch.
`run_svel(arguments, world, folder)` has them run a command as under torchrun, which would import torch in each.
"""

from __future__ import annotations

import datetime
import faulthandler
import functools
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "stablevelocity", "accelerate"])

Work = Callable[[int, int, str], None]


@dataclass
class Worker:
    """A process under way."""

    process: multiprocessing.process.BaseProcess
    log: Path  # what it prints

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, deadline: float = 60.0) -> None:
        """Until it has printed this."""
        end = time.monotonic() + deadline
        while text not in self.output():
            assert time.monotonic() < end, self.output()
            assert self.process.is_alive(), self.output()
            time.sleep(0.01)


def _main(work: Work, rank: int, world: int, folder: str, log: str, timeout: float, backend: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable()
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "250"  # its watchdog waits four times that
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
        )
        work(rank, world, folder)
        if dist.is_initialized():  # the trainer ends the group itself
            dist.barrier()  # nobody takes the group down while another still uses it
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start_processes(work: Work, world: int, folder: Path, timeout: float = 60.0, backend: str = "gloo") -> list[Worker]:
    """Start a group; timeout: seconds of its collectives."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rendezvous").unlink(missing_ok=True)
    workers = []
    for rank in range(world):
        log = folder / f"log-{rank}"
        args = (work, rank, world, str(folder), str(log), timeout, backend)
        workers.append(Worker(CONTEXT.Process(target=_main, args=args, daemon=True), log))
        workers[-1].process.start()
    return workers


def finish_processes(workers: list[Worker], deadline: float, grace: float = math.inf) -> list[tuple[int, str]]:
    """(return code, output) of each; killed is what still runs after `deadline` seconds, or `grace` after a failure."""
    end = time.monotonic() + deadline
    while any(worker.process.is_alive() for worker in workers) and time.monotonic() < end:
        time.sleep(0.02)
        if any(worker.process.exitcode for worker in workers):
            end = min(end, time.monotonic() + grace)
    for worker in workers:
        worker.process.kill()
        worker.process.join()
    return [(worker.process.exitcode, worker.output()) for worker in workers]


def run_processes(work: Work, world: int, folder: Path, deadline: float = 240.0, backend: str = "gloo") -> list[str]:
    """The output of a function that succeeds on every process."""
    results = finish_processes(start_processes(work, world, folder, backend=backend), deadline, grace=5)
    failed = [f"process {rank}: {code}\n{out[-3000:]}" for rank, (code, out) in enumerate(results) if code]
    assert not failed, "\n".join(failed)
    return [out for _, out in results]


def run_svel(arguments: list[str], world: int, folder: Path) -> list[str]:
    """The output of every process of a `svel` command."""
    return run_processes(functools.partial(_svel, arguments), world, folder)


def draw_as_processes(trainer, world: int) -> None:
    """Have a trainer of one process draw each share of a batch from the random stream of the process that would."""
    from stablevelocity.objectives import TrainingSample

    streams, draw = [], trainer._draw
    for rank in range(world):
        trainer._seed(trainer.config.seed + 1 + rank)
        streams.append(torch.get_rng_state())

    def shares(x0: torch.Tensor, labels: torch.Tensor) -> TrainingSample:
        drawn = []
        for rank, rows in enumerate(zip(x0.chunk(world), labels.chunk(world), strict=True)):
            torch.set_rng_state(streams[rank])
            drawn.append(vars(draw(*rows)))
            streams[rank] = torch.get_rng_state()
        return TrainingSample(**{name: torch.cat([share[name] for share in drawn]) for name in drawn[0]})

    trainer._draw = shares


def _svel(arguments: list[str], rank: int, world: int, folder: str) -> None:
    from stablevelocity import cli

    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(place) for name, place in places.items()}, CUDA_VISIBLE_DEVICES="")
    assert cli.main(arguments) == 0

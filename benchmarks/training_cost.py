"""What StableVM and VA-REPA add to a training step of SiT-XL/2, and that nothing in the step waits for the GPU.

    python benchmarks/training_cost.py --output training_cost.json

The step: draw (bank update, references, times, noise, target), SiT under bfloat16 autocast, both losses, backward,
AdamW, moving average of the weights. Parts are timed alone, each as a share of the whole step. One step after another
runs with torch's synchronisation check set to "error", and under the profiler, whose calls that wait are counted.
Beside it the same draw by a Python loop over the labels present, as the official code works (peers.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import peers
import torch
from stablevelocity import CFMObjective, HiddenState, ReferenceBank, StableVMObjective, VAREPALoss, projector
from stablevelocity.ema import EMA
from stablevelocity.models import SiT
from stablevelocity.models.sit import SIZES
from torch import Tensor, nn

CLASSES, REFERENCES, SHAPE, TOKENS, CHANNELS, CFG_PROB = 1000, 256, (4, 32, 32), 256, 768, 0.1
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def milliseconds(f: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, the GPU waited for after each: also what a call that waits itself costs a step."""
    found = []
    for _ in range(repeats + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        f()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found[2:])


def on_gpu(f: Callable[[], object], repeats: int) -> float:
    """Milliseconds of the GPU a call takes when it is one of many queued: calls back to back between two events."""
    for _ in range(3):
        f()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # the GPU waits while the host runs ahead
    start.record()
    for _ in range(repeats):
        f()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


class Step:
    """A training step of SiT with VA-REPA, as the trainer does it."""

    def __init__(self, size: str, batch: int, compiled: bool):
        device = torch.device("cuda")
        with device:
            self.model = SiT(32, 2, 4, **SIZES[size], num_classes=CLASSES)
            self.project = projector("mlp", SIZES[size]["hidden_size"], CHANNELS)
        self.ema = EMA(self.model, 0.9999)
        self.hidden = HiddenState(self.model, "blocks.7")
        if compiled:
            for block in self.model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        self.bank = ReferenceBank(SHAPE, CLASSES, REFERENCES, device=device)
        for ring in self.bank.refs:
            ring.normal_()
        self.bank.counts.fill_(REFERENCES)
        self.objectives = {
            "cfm": CFMObjective(num_classes=CLASSES, cfg_prob=CFG_PROB),
            "stablevm": StableVMObjective(self.bank, cfg_prob=CFG_PROB, source="loader"),
        }
        self.align = VAREPALoss()
        self.parameters = [p for p in (*self.model.parameters(), *self.project.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.x0 = torch.randn(batch, *SHAPE, device=device)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.features = torch.randn(batch, TOKENS, CHANNELS, device=device, dtype=torch.bfloat16)
        self.loss = torch.zeros((), device=device)  # read when it is logged

    def __call__(self, objective: str = "stablevm", align: bool = True) -> None:
        draw = self.objectives[objective].sample(self.x0, self.labels)
        with torch.autocast("cuda", torch.bfloat16):
            with self.hidden.watch():
                output = self.model(draw.x_t, draw.t, draw.labels)
            projected = self.project(self.hidden.tokens()) if align else None
        loss = self.objectives[objective].loss(output, draw)
        if align:
            loss = loss + 0.5 * self.align(projected, self.features, draw.t, self.align.weights(draw.t).sum())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        self.loss += loss.detach()


def waiting_calls(step: Step, steps: int) -> dict[str, int]:
    """How often steps called something that waits for the GPU, by the profiler; they may not, by torch's own check."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(steps):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        names = Counter()
        with torch.profiler.record_function("end of the steps"):
            torch.cuda.synchronize()
    end = max(event.time_range.start for event in profile.events() if event.name == "end of the steps")
    for event in profile.events():
        for name in WAITS:
            if event.name.startswith(name) and event.time_range.start < end:
                names[name] += 1
    return {name: names[name] for name in WAITS}


def alignment(loss: Callable[[Tensor, Tensor], Tensor], projected: Tensor, teacher: Tensor) -> None:
    projected.grad = None
    loss(projected, teacher).backward()


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    step, n = Step(args.size, args.batch, args.compile), args.batch
    for _ in range(3):
        step()
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "size": args.size,
        "batch": n,
        "compiled blocks": args.compile,
        "parameters": sum(p.numel() for p in step.model.parameters()),
    }
    steps = {
        "CFM": lambda: step("cfm", False),
        "StableVM": lambda: step("stablevm", False),
        "StableVM + VA-REPA": lambda: step("stablevm", True),
    }
    record["step_ms"] = {name: on_gpu(f, args.steps) for name, f in steps.items()}
    record["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    whole = record["step_ms"]["StableVM + VA-REPA"]
    projected = torch.randn(n, TOKENS, CHANNELS, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.rand(n, device="cuda")
    refs, counts, heads = step.bank.refs.flatten(2), step.bank.counts.clone(), step.bank.heads.clone()
    x0 = step.x0.flatten(1)

    def per_label() -> None:
        peers.training_step(refs, counts, heads, x0, step.labels, 0.0, CFG_PROB, peers.target_per_label)

    parts = {
        "CFM's draw": lambda: step.objectives["cfm"].sample(step.x0, step.labels),
        "StableVM: bank update, draw, target": lambda: step.objectives["stablevm"].sample(step.x0, step.labels),
        "VA-REPA's loss, forward and backward": lambda: alignment(
            lambda p, z: step.align(p, z, t, step.align.weights(t).sum()), projected, step.features
        ),
        "VA-REPA's loss in plain torch": lambda: alignment(
            lambda p, z: peers.va_repa(p, z, step.align.weights(t)), projected, step.features
        ),
    }
    record["parts_ms"] = {name: {"gpu": on_gpu(f, 50), "alone": milliseconds(f, 20)} for name, f in parts.items()}
    record["parts_ms"]["StableVM by a loop over labels"] = {"gpu": None, "alone": milliseconds(per_label, 5)}
    record["waiting_calls"] = {"steps": args.steps, **waiting_calls(step, args.steps)}
    if args.output:
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"SiT-{args.size}/2, batch {n}, {record['device']}: "
        + ", ".join(f"{k} {v:.1f} ms" for k, v in record["step_ms"].items())
    )
    print("| part | ms, queued | share of the step | ms, waited for |\n|---|---|---|---|")
    for name, ms in record["parts_ms"].items():
        share = (ms["gpu"] or ms["alone"]) / whole
        queued = "waits itself" if ms["gpu"] is None else f"{ms['gpu']:.3f}"
        print(f"| {name} | {queued} | {100 * share:.3f} % | {ms['alone']:.3f} |")
    print("calls that wait:", record["waiting_calls"])


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=list(SIZES), default="XL")
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--steps", type=int, default=8, help="timed, checked and profiled")
    p.add_argument("--compile", action="store_true", help="the blocks, by torch.compile")
    p.add_argument("--output", type=Path)
    main(p.parse_args())

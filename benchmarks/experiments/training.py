"""Experiment 3: a small network trained on a Gaussian mixture by CFM, STF and StableVM, against the exact field.

    python benchmarks/experiments/training.py

100 components in 10 dimensions, 20,000 updates of batch 256, 2,048 references, three seeds; on CUDA where it is there.
The distance to the exact field is E|v - u|^2 / E|u|^2 over x_t of the mixture at each time. All networks of a method
are trained side by side, one a seed, each on its own draws.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import pairwise

import stablevelocity as sv
import torch
from common import COLOURS, arguments, axes_of, device_of, new_figure, table, write
from torch import Tensor, nn
from tqdm.auto import tqdm

TIMES = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
ARMS = {  # name: (label, colour)
    "cfm": ("CFM", COLOURS["cfm"]),
    "stf": ("STF, a new set each update", COLOURS["stf"]),
    "stablevm": ("StableVM, a new set each update", COLOURS["stablevm"]),
    "bank": ("StableVM, bank of the last samples", COLOURS["bank"]),
}


class Fields(nn.Module):
    """One network a seed, side by side: x (S, N, D), t (S, N) -> (S, N, D)."""

    def __init__(self, seeds: int, dim: int, width: int, depth: int = 4):
        super().__init__()
        sizes = [dim + 9, *[width] * (depth - 1), dim]
        shapes = list(pairwise(sizes))
        self.weights = nn.ParameterList(torch.randn(seeds, i, o) * i**-0.5 for i, o in shapes)
        self.biases = nn.ParameterList(torch.zeros(seeds, 1, o) for _, o in shapes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[..., None] * (2 * torch.pi * torch.arange(1, 5, device=t.device))
        h = torch.cat([x, t[..., None], angle.sin(), angle.cos()], 2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, nn.functional.silu(h) if i else h, weight)
        return h


def draws(arm: str, mixture: sv.GaussianMixture, args: argparse.Namespace, device: torch.device) -> Iterator:
    """Endless training samples, the seeds' rows one after the other; new data from the mixture at each update."""
    seeds, batch, references = args.seeds, args.batch, args.references

    def fresh(n: int) -> Tensor:
        return mixture.sample(seeds * n).float()

    if arm == "cfm":
        objective = sv.CFMObjective()
        while True:
            yield objective.sample(fresh(batch))
    if arm == "stf":
        objective = sv.STFObjective(rows=batch)
        while True:
            parts = [objective.sample(one) for one in fresh(references).split(references)]
            yield sv.TrainingSample(
                *(torch.cat([getattr(p, name) for p in parts]) for name in ("x_t", "t")),
                None,
                *(torch.cat([getattr(p, name) for p in parts]) for name in ("target", "x0", "noise")),
            )
    # a bank with one ring a seed
    bank = sv.ReferenceBank((args.dim,), seeds, references, dtype=torch.float32, null="all", device=device)
    objective = sv.StableVMObjective(bank, cfg_prob=0.0, t_min=0.0, update_bank=False)
    of = torch.arange(seeds, device=device)
    rows, new = of.repeat_interleave(batch), references if arm == "stablevm" else batch
    bank.push(fresh(references), of.repeat_interleave(references))
    while True:
        x0 = fresh(new)
        bank.push(x0, of.repeat_interleave(new))
        yield objective.sample(x0.reshape(seeds, new, -1)[:, :batch].flatten(0, 1), rows)


class Truth:
    """Test points at each time and the exact velocity there."""

    def __init__(self, mixture: sv.GaussianMixture, n: int, device: torch.device):
        x0 = mixture.sample(n * len(TIMES)).reshape(len(TIMES), n, -1)
        noise = torch.randn(x0.shape, dtype=torch.float64, device=device)
        self.t = torch.tensor(TIMES, dtype=torch.float64, device=device)[:, None].expand(-1, n)  # (T, n)
        x = [sv.Linear().interpolate(*rows) for rows in zip(x0, noise, self.t, strict=True)]
        self.x = torch.stack(x)  # (T, n, D)
        self.velocity = torch.stack([mixture.velocity(a, b) for a, b in zip(self.x, self.t, strict=True)])

    @torch.no_grad()
    def distance(self, fields: Fields) -> Tensor:
        """(T, S): E|v - u|^2 / E|u|^2."""
        seeds = len(fields.weights[0])
        out = []
        for x, t, u in zip(self.x, self.t, self.velocity, strict=True):
            v = fields(x.float().expand(seeds, -1, -1), t.float().expand(seeds, -1)).double()
            out.append((v - u).square().sum(2).mean(1) / u.square().sum(1).mean())
        return torch.stack(out).cpu()


def train(
    arm: str, mixture: sv.GaussianMixture, truth: Truth, args: argparse.Namespace, device: torch.device
) -> dict[str, list]:
    """Distances as training goes on, of the weights and of their moving average."""
    torch.manual_seed(args.seed)
    fields, average = (Fields(args.seeds, args.dim, args.width).to(device) for _ in range(2))
    average.load_state_dict(fields.state_dict())
    parameters, averaged = list(fields.parameters()), list(average.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.lr, fused=True)
    found = {"updates": [], "weights": [], "average": []}
    samples = draws(arm, mixture, args, device)
    for update in tqdm(range(1, args.updates + 1), desc=arm, mininterval=5):
        draw = next(samples)
        v = fields(draw.x_t.reshape(args.seeds, args.batch, -1), draw.t.reshape(args.seeds, args.batch))
        loss = (v - draw.target.reshape(v.shape)).square().mean() * args.seeds
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1.0 - min(args.ema, (1 + update) / (10 + update)))
        if update % max(1, args.updates // 10) == 0:
            found["updates"].append(update)
            found["weights"].append(truth.distance(fields).tolist())
            found["average"].append(truth.distance(average).tolist())
    return found


def official_truth(x: Tensor, refs: Tensor, t: float) -> Tensor:
    """What the paper's toy script takes for the truth: weights below 1e-5 are set to 0, and the rest not rescaled.

    Written from its formula, sum_j w_j (x - r_j) / t over 100,000 references; x (n, D), float64.
    """
    parts = []
    for rows in x.split(64):
        weights = torch.softmax(-(torch.cdist(rows, (1 - t) * refs) ** 2) / (2 * t * t), 1)
        weights = torch.where(weights < 1e-5, 0.0, weights)
        parts.append((weights.sum(1, keepdim=True) * rows - weights @ refs) / t)
    return torch.cat(parts)


def truths(mixture: sv.GaussianMixture, n: int, references: int) -> dict[str, list[float]]:
    """Relative error, against the closed form, of sums over references with and without the small weights."""
    refs = mixture.sample(references)
    found = {"t": TIMES, "references": references, "without_small_weights": [], "all_weights": []}
    for t in TIMES:
        x0 = mixture.sample(n)
        x = (1 - t) * x0 + t * torch.randn_like(x0)
        time = torch.full((n,), t, dtype=torch.float64, device=x.device)
        exact = mixture.velocity(x, time)
        for name, other in (
            ("without_small_weights", official_truth(x, refs, t)),
            ("all_weights", sv.Linear().target(x, refs, time)),
        ):
            found[name].append(float((other - exact).norm() / exact.norm()))
    return found


def plot(results: dict, error: dict) -> tuple:
    figure, ((left, middle, right),) = new_figure(3, 12.6)
    axes_of(left, "After training", "t  (0: data, 1: noise)", "distance to the exact field, share")
    axes_of(middle, "As training goes on, mean over t", "updates", "")
    axes_of(right, "Two 'true' fields against the exact one", "t", "relative error")
    for arm in results:
        label, colour = ARMS[arm]
        for kind, style in (("weights", ":"), ("average", "-")):
            every = torch.tensor(results[arm][kind])  # (evaluations, T, S)
            last = every[-1]
            left.plot(TIMES, last.mean(1), style, color=colour, label=label if kind == "average" else None)
            if kind == "average":
                left.fill_between(TIMES, last.amin(1), last.amax(1), color=colour, alpha=0.2, linewidth=0)
            middle.plot(results[arm]["updates"], every.mean((1, 2)), style, color=colour)
    for axes in (left, middle, right):
        axes.set_yscale("log")
    left.legend(frameon=False, fontsize=8)
    middle.plot([], [], ":", color="0.4", label="weights")
    middle.plot([], [], "-", color="0.4", label="their moving average")
    middle.legend(frameon=False, fontsize=8)
    middle.locator_params(axis="x", nbins=4)
    right.plot(error["t"], error["without_small_weights"], color="0.3", label="weights < 1e-5 dropped")
    right.plot(error["t"], error["all_weights"], "--", color="0.3", label="all weights")
    right.legend(frameon=False, fontsize=8, title=f"{error['references']:,} references", title_fontsize=8)
    return figure


def main(args: argparse.Namespace) -> None:
    began, device = time.perf_counter(), device_of(args)
    torch.manual_seed(args.seed)
    mixture = sv.GaussianMixture.random(args.dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
    truth = Truth(mixture, args.test_points, device)
    error = truths(mixture, min(500, args.test_points), args.truth_references)
    results: dict[str, dict] = {}
    for arm in args.arms:
        results[arm] = train(arm, mixture, truth, args, device)
        report(results, error, args, time.perf_counter() - began)  # a run that is cut short leaves what it has


def report(results: dict, error: dict, args: argparse.Namespace, seconds: float) -> None:
    ends = {arm: torch.tensor(of["average"][-1]) for arm, of in results.items()}  # (T, S)

    def percent(v: Tensor) -> str:
        return f"{100 * float(v.mean()):.2f} ± {100 * float(v.std()):.2f}"

    rows = [[ARMS[arm][0], *(percent(at) for at in end), percent(end.mean(0))] for arm, end in ends.items()]
    head = [f"distance after {args.updates:,} updates, %", *(f"t = {t}" for t in TIMES), "mean"]
    wrong = [
        [label, *(f"{100 * value:.1f}" for value in error[key])]
        for key, label in (("without_small_weights", "weights below 1e-5 dropped"), ("all_weights", "all weights"))
    ]
    record = {"seconds": seconds, "times": TIMES, "distances": results, "truths": error}
    tables = {
        "training": table(head, rows),
        "truths": table([f"error over {error['references']:,} references, %", *(f"t = {t}" for t in TIMES)], wrong),
    }
    write("training", args, record, tables, plot(results, error))


if __name__ == "__main__":
    p = arguments(__doc__.splitlines()[0])
    for name, value in (("dim", 10), ("updates", 20_000), ("batch", 256), ("references", 2048), ("seeds", 3)):
        p.add_argument(f"--{name}", type=int, default=value, help=" ")
    p.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help=" ")
    p.add_argument("--width", type=int, default=128, help="of the network, three hidden layers")
    p.add_argument("--lr", type=float, default=1e-3, help="of Adam, constant")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the weights' moving average")
    p.add_argument("--test-points", type=int, default=4096, help="at each time")
    p.add_argument("--truth-references", type=int, default=100_000, help="of the paper's script")
    p.add_argument("--threads", type=int, help="of the CPU")
    args = p.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    main(args)

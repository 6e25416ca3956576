"""Experiment 2: variance and bias of the targets against the number of references.

    python benchmarks/experiments/target.py

CFM, StableVM (source of x_t drawn from the set), STF (source first in the set) and a set without the source, on the
paper's mixture with D = 10, whose marginal velocity u is known in closed form; sets of 2 to 4,096 drawn independently
from the mixture. Every figure has a standard error over independent sets.

* variance: E|target - u|^2 over that of CFM;
* pull: E[(target - u) . g] / E|g|^2 along g = u - u_0, where u_0 takes the data's mean for E[x_0 | x_t]. 0 without
  bias, -1 for a target that knows nothing of x_t. Other directions: x_t, u, sin 2 x_t, x_t |x_t|, and a constant.
"""

from __future__ import annotations

import argparse
import time

import stablevelocity as sv
import torch
from common import COLOURS, arguments, axes_of, device_of, new_figure, table, write
from torch import Tensor
from tqdm.auto import tqdm

TIMES = (0.5, 0.7, 0.9)
KINDS = {  # name: (label, colour)
    "cfm": ("CFM", COLOURS["cfm"]),
    "stablevm": ("StableVM", COLOURS["stablevm"]),
    "stf": ("STF", COLOURS["stf"]),
    "without": ("set without the source", COLOURS["without"]),
}
ROWS = 16  # noisy samples that share a set


def at_time(t: float):
    return lambda n, device, generator: torch.full((n,), t, device=device)


def draw(kind: str, mixture: sv.GaussianMixture, m: int, t: float, sets: int) -> tuple[Tensor, Tensor]:
    """x_t and target, each (sets, rows, D) float64."""
    refs, rows = mixture.sample(sets * m).float(), min(ROWS, m)
    if kind in ("cfm", "stf"):
        cfm, stf = sv.CFMObjective(times=at_time(t)), sv.STFObjective(times=at_time(t), rows=rows)
        parts = [refs] if kind == "cfm" else refs.split(m)
        drawn = [(cfm if kind == "cfm" else stf).sample(part) for part in parts]
        x_t, target = (torch.cat([getattr(one, name) for one in drawn]) for name in ("x_t", "target"))
        x_t, target = (value.reshape(sets, -1, value.shape[-1])[:, :rows] for value in (x_t, target))
        return x_t.double(), target.double()
    bank = sv.ReferenceBank(refs.shape[1:], sets, m, dtype=torch.float32, null="all", device=refs.device)
    labels = torch.arange(sets, device=refs.device)
    bank.push(refs, labels.repeat_interleave(m))
    labels = labels.repeat_interleave(rows)
    objective = sv.StableVMObjective(bank, times=at_time(t), cfg_prob=0.0, t_min=0.0, update_bank=False)
    if kind == "stablevm":
        s = objective.sample(refs[: len(labels)], labels)
        x_t, target = s.x_t, s.target
    else:
        s = sv.CFMObjective(times=at_time(t)).sample(mixture.sample(len(labels)).float())
        x_t, target = s.x_t, bank.target(s.x_t, s.t, labels)
    return (value.reshape(sets, rows, -1).double() for value in (x_t, target))


def measure(kind: str, mixture: sv.GaussianMixture, m: int, t: float, sets: int) -> dict:
    """Variance, pull and the largest |z| of six projections of the bias."""
    mean = mixture.weights @ mixture.means
    per_set = {"variance": [], "pull": [], "scale": [], "tests": []}
    most = max(1, min(sets, (1 << 20) // m))
    for first in range(0, sets, most):
        x_t, target = draw(kind, mixture, m, t, min(most, sets - first))
        flat = x_t.flatten(0, 1)
        time = torch.full((len(flat),), t, dtype=torch.float64, device=x_t.device)
        u = mixture.velocity(flat, time).reshape(x_t.shape)
        off, g = target - u, u - sv.Linear().velocity_from_x0(flat, mean.expand_as(flat), time).reshape(x_t.shape)
        tests = [torch.ones_like(u), x_t, u, torch.sin(2 * x_t), x_t * x_t.norm(dim=-1, keepdim=True), g]
        per_set["variance"].append(off.square().sum(-1).mean(1))
        per_set["pull"].append((off * g).sum(-1).mean(1))
        per_set["scale"].append(g.square().sum(-1).mean(1))
        per_set["tests"].append(torch.stack([(off * other).sum(-1).mean(1) for other in tests], 1))
    values = {name: torch.cat(parts) for name, parts in per_set.items()}
    root, scale = len(values["pull"]) ** 0.5, values["scale"].mean()
    z = values["tests"].mean(0) / (values["tests"].std(0) / root)
    return {
        "variance": float(values["variance"].mean()),
        "variance_error": float(values["variance"].std() / root),
        "pull": float(values["pull"].mean() / scale),
        "pull_error": float(values["pull"].std() / root / scale),
        "z": [float(value) for value in z],
        "sets": len(values["pull"]),
    }


def plot(found: dict, sizes: list[int]) -> object:
    figure, ((left, middle, right),) = new_figure(3, 12.6)
    last, first = max(TIMES), min(TIMES)
    axes_of(left, f"Variance, t = {last}", "references M", "E|target - u|² / that of CFM")
    axes_of(middle, "StableVM's variance at other times", "references M", "")
    axes_of(right, f"Pull towards the data's mean, t = {first}", "references M", "share (0: unbiased)")
    for kind, (label, colour) in KINDS.items():
        for axes, t in ((left, last), (right, first)):
            of = [found[f"{kind} {m} {t}"] for m in sizes]
            cfm = [found[f"cfm {m} {t}"]["variance"] for m in sizes]
            if axes is left:
                ratio = [one["variance"] / base for one, base in zip(of, cfm, strict=True)]
                error = [one["variance_error"] / base for one, base in zip(of, cfm, strict=True)]
                style = {"stf": "--", "without": ":"}.get(kind, "-")
            else:
                ratio, error = [one["pull"] for one in of], [2 * one["pull_error"] for one in of]
                style = "-"
            axes.errorbar(sizes, ratio, error, fmt=style, color=colour, label=label, linewidth=1.3, capsize=2)
    left.plot(sizes, [1 / max(m - 1, 1) for m in sizes], color="0.3", linewidth=0.7, label="1 / (M - 1)")
    for k, t in enumerate(TIMES):
        ratio = [found[f"stablevm {m} {t}"]["variance"] / found[f"cfm {m} {t}"]["variance"] for m in sizes]
        middle.plot(sizes, ratio, color=str(0.7 - 0.3 * k), label=f"t = {t}")
    middle.plot(
        sizes, [1 / max(m - 1, 1) for m in sizes], color="0.3", linewidth=0.7, linestyle="--", label="1 / (M - 1)"
    )
    right.axhline(0, color="0.6", linewidth=0.6)
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.legend(frameon=False, fontsize=7)
    left.set_yscale("log")
    middle.set_yscale("log")
    return figure


def main(args: argparse.Namespace) -> None:
    began, device = time.perf_counter(), device_of(args)
    torch.manual_seed(args.seed)
    mixture = sv.GaussianMixture.random(10, generator=torch.Generator().manual_seed(args.seed)).to(device)
    sizes = [1 << k for k in range(1, args.largest.bit_length())]
    sets = args.sets or (4000 if device.type == "cuda" else 1000)
    found = {}
    for m, t in tqdm([(m, t) for m in sizes for t in TIMES], desc="references and times"):
        for kind in KINDS:
            found[f"{kind} {m} {t}"] = measure(kind, mixture, m, t, sets)
    report(found, sizes, args, time.perf_counter() - began)


def report(found: dict, sizes: list[int], args: argparse.Namespace, seconds: float) -> None:
    shown = [m for m in (2, 8, 32, 128, 512, 4096) if m in sizes]

    def cell(kind: str, m: int, t: float, what: str) -> str:
        one, base = found[f"{kind} {m} {t}"], found[f"cfm {m} {t}"]["variance"]
        if what == "pull":
            return f"{one[what]:.4f} ± {one['pull_error']:.4f}"
        return f"{one[what] / base:.3g} ± {one['variance_error'] / base:.1g}"

    variance = [
        [label, *(cell(kind, m, 0.9, "variance") for m in shown)] for kind, (label, _) in KINDS.items() if kind != "cfm"
    ]
    variance.append(["1 / M", *(f"{1 / m:.3g}" for m in shown)])
    variance.append(["1 / (M - 1)", *(f"{1 / (m - 1):.3g}" for m in shown)])
    bias = [
        [f"{label}, t = {t}", *(cell(kind, m, t, "pull") for m in shown)]
        for t in TIMES
        for kind, (label, _) in KINDS.items()
    ]
    largest = [
        [label, f"{max(abs(z) for m in sizes for t in TIMES for z in found[f'{kind} {m} {t}']['z']):.1f}"]
        for kind, (label, _) in KINDS.items()
    ]
    record = {"seconds": seconds, "times": TIMES, "references": sizes, "found": found}
    counts = len(sizes) * len(TIMES) * 6
    tables = {
        "variance": table(["variance over CFM's, t = 0.9", *(f"M = {m:,}" for m in shown)], variance),
        "bias": table(["pull towards the data's mean", *(f"M = {m:,}" for m in shown)], bias),
        "largest": table(["", f"largest of {counts} statistics, in standard errors"], largest),
    }
    write("target", args, record, tables, plot(found, sizes))


if __name__ == "__main__":
    p = arguments(__doc__.splitlines()[0])
    p.add_argument("--sets", type=int, help="independent sets behind each figure: 1,000, on CUDA 4,000")
    p.add_argument("--largest", type=int, default=4096, help="references, a power of two")
    main(p.parse_args())

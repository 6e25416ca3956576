"""Experiment 1: the variance of the conditional target over time, on Gaussian mixtures and real images.

    python benchmarks/experiments/curves.py

The paper's mixtures (100 components, D = 10, 100, 500, 10,000 samples); scikit-learn's 1,797 digits, 5,000 MNIST digits
and Fashion-MNIST (60,000 images, from Debian's package dataset-fashion-mnist or --fashion). For the mixtures also the
curve of the distribution itself, in closed form, which is what more and more samples lead to. On CUDA with twenty times
the rows; on the CPU sets of 50,000 and more get half of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import stablevelocity as sv
import torch
from common import arguments, axes_of, device_of, idx, new_figure, table, write
from stablevelocity.data import SETS, to_unit
from torch import Tensor
from tqdm.auto import tqdm

TIMES = [0.01, 0.02, 0.035, 0.05, 0.065, 0.08, *(i / 30 for i in range(3, 30)), 0.985, 0.995]
DIMS, SIZES = (10, 100, 500), (100, 1000, 10_000, 100_000)
COLOURS = {
    **{"10": "#cfa36b", "100": "#b5542a", "500": "#6b1d1d"},
    **{"digits": "#8fbcd4", "mnist": "#3f7ea6", "fashion": "#1b3a57"},
}


def fashion_mnist(path: Path) -> Tensor | None:
    """(60000, 784) in [-1, 1]; None where the file is not there."""
    if not path.is_file():
        return None
    return to_unit(idx(path)).flatten(1)


def exact_curve(mixture: sv.GaussianMixture, rows: int) -> Tensor:
    """(K,) V_CFM(t) / V_CFM(1) of the distribution, from its closed-form posterior variance."""
    x0 = mixture.sample(rows)
    noise = torch.randn_like(x0)
    values = []
    for t in TIMES:
        time = torch.full((rows,), t, dtype=torch.float64, device=x0.device)
        values.append(mixture.posterior((1 - t) * x0 + t * noise, time)[1].mean() / t**2)
    return torch.stack(values).cpu() / mixture.variance()


def measure(data: Tensor, args: argparse.Namespace, rows: int, references: int = 256) -> dict:
    """The curve of a data set, its splits, and the split of sets of `references`, which is what training measures."""
    with tqdm(total=1, desc=f"{len(data)} x {data.shape[1]}", leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        curve = sv.variance_curve(
            data,
            TIMES,
            samples=rows,
            references=min(references, len(data)),
            generator=torch.Generator().manual_seed(args.seed),
            callback=advance,
        )
    splits = {c: sv.split_point(curve, c) for c in ("variance", "own_mass")}
    online = sv.variance.crossing(curve.t, (curve.cfm - curve.stablevm) / curve.prior, 0.05)
    share = curve.cfm / curve.prior
    return {
        "samples": len(data),
        "dim": data.shape[1],
        "rows": rows,
        "share": share.tolist(),
        "error": (curve.cfm_error / curve.prior).tolist(),
        "quantiles": (curve.cfm_quantiles / curve.prior).tolist(),
        "stablevm_share": (curve.stablevm / curve.prior).tolist(),
        "references": curve.references,
        "entropy": curve.entropy.tolist(),
        "own_mass": curve.own_mass.tolist(),
        "split_of_references": float(online),
        **{f"split_{name}": [s.split, s.low, s.high] for name, s in splits.items()},
    }


def plot(found: dict, exact: dict, growing: dict) -> object:
    figure, ((left, middle, right),) = new_figure(3, 12.6)
    axes_of(left, "Finite sets: two regimes", "t  (0: data, 1: noise)", "V_CFM / variance of the prior")
    axes_of(middle, "A finite set and its distribution, D = 10", "t", "")
    axes_of(right, "In high dimension, D = 100", "t", "")
    names = {"digits": "digits, 64", "mnist": "MNIST, 784", "fashion": "Fashion-MNIST, 784"}
    for name, one in found.items():
        label = names.get(name, f"mixture, {name}")
        left.plot(TIMES, one["share"], color=COLOURS[name], label=label)
        if name in ("10", "fashion"):
            low, high = zip(*one["quantiles"], strict=True)
            left.fill_between(TIMES, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
        left.axvline(one["split_variance"][0], color=COLOURS[name], linewidth=0.8, linestyle=":")
    for axes, dim in ((middle, "10"), (right, "100")):
        for k, (n, one) in enumerate(growing[dim].items()):
            axes.plot(TIMES, one["share"], color=str(0.75 - 0.2 * k), label=f"{int(n):,} samples")
        axes.plot(TIMES, exact[dim], color="#b5542a", linestyle="--", label="the distribution, closed form")
    for axes in (left, middle, right):
        axes.axhline(0.05, color="0.6", linewidth=0.6)
        axes.set(yscale="log", xlim=(0, 1), ylim=(1e-4, 30))
        axes.legend(frameon=False, fontsize=7, loc="lower right" if axes is left else "best")
    return figure


def main(args: argparse.Namespace) -> None:
    began, device = time.perf_counter(), device_of(args)
    torch.manual_seed(args.seed)
    many = 20 if device.type == "cuda" else 1
    rows = args.rows or 500 * many
    found, exact, growing = {}, {}, {}
    for dim in DIMS:
        mixture = sv.GaussianMixture.random(dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
        largest = mixture.sample(max(*args.sizes, args.samples)).float()
        found[str(dim)] = measure(largest[: args.samples], args, rows)
        if dim < 500:
            exact[str(dim)] = exact_curve(mixture, min(rows, 2000)).tolist()
            growing[str(dim)] = {str(n): measure(largest[:n], args, affordable(rows, n, device)) for n in args.sizes}
    for name in ("digits", "mnist"):
        data = to_unit(SETS[name]()[0]).flatten(1).to(device)
        found[name] = measure(data, args, rows)
    data = fashion_mnist(args.fashion)
    if data is None:
        print(f"Fashion-MNIST left out: no {args.fashion} (apt install dataset-fashion-mnist, or --fashion)")
    else:
        found["fashion"] = measure(data.to(device), args, affordable(rows, len(data), device))
    report(found, exact, growing, args, time.perf_counter() - began)


def affordable(rows: int, samples: int, device: torch.device) -> int:
    return rows if device.type == "cuda" or samples < 50_000 else rows // 2


def report(found: dict, exact: dict, growing: dict, args: argparse.Namespace, seconds: float) -> None:
    names = {"digits": "digits", "mnist": "MNIST", "fashion": "Fashion-MNIST"}

    def line(label: str, one: dict) -> list:
        cells = [f"{s:.3f} [{low:.3f}, {high:.3f}]" for s, low, high in (one["split_variance"], one["split_own_mass"])]
        cells.append(f"{one['split_of_references']:.3f}")
        return [label, one["dim"], f"{one['samples']:,}", *cells, f"{one['rows']:,}"]

    head = ["data", "D", "samples", "split, variance", "split, own mass", "split of sets of 256", "rows"]
    lines = [line(names.get(name, "mixture"), one) for name, one in found.items()]
    grown = [line("mixture", one) for dim in growing for one in growing[dim].values()]
    record = {
        "seconds": seconds,
        "t": TIMES,
        "curves": found,
        "closed_form": exact,
        "by_number_of_samples": growing,
    }
    tables = {"splits": table(head, lines), "samples": table(head, grown)}
    write("curves", args, record, tables, plot(found, exact, growing))


if __name__ == "__main__":
    p = arguments(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, help="noisy samples at each time: 500, on CUDA 10,000")
    p.add_argument("--samples", type=int, default=10_000, help="of the mixtures")
    p.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="also so many, for D = 10 and 100")
    p.add_argument(
        "--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"), help=" "
    )
    main(p.parse_args())

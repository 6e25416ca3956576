"""Experiment 5: does StableVS help? Quality against model evaluations, four solvers with and without it.

    python benchmarks/experiments/sampling.py fashion-models/cfm --judge fashion-models/judge
    python benchmarks/experiments/sampling.py svel-demo                  # trains its judge
    python benchmarks/experiments/sampling.py --redraw A.json B.json     # figure and table of earlier runs

A run is a folder of `svel train` (or of fashion.py). All samplers start from the same noise, without guidance, on the
uniform grid of the linear path, and are judged twice:

* distance: root mean square difference from the solution of Heun's method with 250 steps for the same noise, over the
  standard deviation of that solution's pixels;
* Frechet distance to the training set on features of a classifier trained on it, as in fashion.py. Standard errors are
  those of a jackknife over 16 groups of samples, the same for all samplers.

A run with StableVS goes on from the state in which its solver passes the split, so it costs its low steps only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import DOCS, arguments, as_json, axes_of, device_of, idx, machine, new_figure, table, write
from fashion import Judge
from stablevelocity.config import TrainConfig
from stablevelocity.data import ArrayData, load_data, to_unit
from stablevelocity.encoder import load_encoder, train_encoder
from stablevelocity.generation import load_model
from stablevelocity.sampling import SOLVERS, StableVS, nfe, standard_normal, time_grid
from torch import Tensor
from tqdm.auto import tqdm

NAMES = {  # solver: (label, colour)
    "euler": ("Euler", "#b5542a"),
    "heun": ("Heun", "#6a994e"),
    "dpmpp_2m": ("DPM-Solver++ 2M", "#8d6a9f"),
    "unipc": ("UniPC", "#22577a"),
}
SPLITS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
LOW_STEPS = (1, 2, 3, 4, 5, 7, 9, 11, 13, 15)
PLAIN = (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 18, 20, 22, 25, 30, 40, 50)
SPLIT, BASE = 0.85, 30  # the paper's
HALF, PAPER = 13, 9  # of the 25 steps that start at or below that split; what the paper's code takes
TABLED = (BASE, 5 + HALF, 5 + PAPER, 12, 10)  # steps of runs in the table; Heun's 12 and 10 cost what its StableVS does
GROUPS = 16


class Study:
    """One model: its noise, its 250-step solution, and every sampler's distance from that and from the real images."""

    def __init__(
        self, velocity: Callable[..., Tensor], noise: Tensor, labels: Tensor, judge: Judge, args: argparse.Namespace
    ):
        self.velocity, self.noise, self.labels, self.judge, self.args = velocity, noise, labels, judge, args
        self.groups = torch.arange(len(noise), device=noise.device) % GROUPS
        self.bar = tqdm(desc="sampling", unit=" evaluations", mininterval=5)
        self.exact = self.states("heun", noise, time_grid(args.exact))[-1]
        self.spread = float((self.exact - self.exact.mean(0)).square().mean().sqrt())

    def states(self, solver: str, x: Tensor, times: Tensor, stable: StableVS | None = None) -> list[Tensor]:
        """The samples (n, *S) after each step of `times`."""
        parts = []
        for rows, y in zip(x.split(self.args.batch), self.labels.split(self.args.batch), strict=True):
            seen: list[Tensor] = []
            SOLVERS[solver](self.velocity, rows, times, stable=stable, callback=lambda *a, s=seen: s.append(a[3]), y=y)
            parts.append(seen)
        self.bar.update(nfe(times, solver, stable=stable))
        return [torch.cat(step) for step in zip(*parts, strict=True)]

    def run(self) -> list[dict]:
        """Every sampler: plain, with StableVS, and (for the table) on the grid of StableVS without its steps."""
        runs: list[dict] = []

        def note(kind: str, solver: str, times: Tensor, x: Tensor, stable: StableVS | None = None) -> None:
            split = stable.split if stable else SPLIT
            low = int((times[:-1] <= split).sum())
            settings = {"kind": kind, "solver": solver, "steps": len(times) - 1, "split": split, "low_steps": low}
            x = x.clamp(-1, 1)
            found: dict = {
                "nfe": nfe(times, solver, stable=stable),
                "distance": float((x - self.exact.clamp(-1, 1)).square().mean().sqrt()) / self.spread,
                "frechet": self.judge.distance(x),
            }
            if split == SPLIT and settings["steps"] in TABLED:
                found["without"] = [self.judge.distance(x[self.groups != group]) for group in range(GROUPS)]
            runs.append({**settings, **found})

        note("exact", "heun", time_grid(self.args.exact), self.exact)
        for solver in self.args.solvers:
            trajectories = {steps: self.states(solver, self.noise, time_grid(steps)) for steps in PLAIN}
            for steps, states in trajectories.items():
                note("plain", solver, time_grid(steps), states[-1])
            for split in self.args.splits:
                for low in LOW_STEPS:
                    stable = StableVS(split, low, grid="official")
                    times = stable.times(time_grid, BASE)
                    high = int((times > split).sum())
                    x = self.states(solver, trajectories[BASE][high - 1], times[high:], stable)[-1]
                    note("stable", solver, times, x, stable)
                    if split == SPLIT and solver != "euler":  # for Euler that is the same sampler
                        note("thinned", solver, times, self.states(solver, self.noise, times)[-1])
        self.bar.close()
        return runs


@torch.no_grad()
def measure(folder: Path, args: argparse.Namespace, device: torch.device) -> dict:
    """What was found on the model of a run."""
    began = time.perf_counter()
    model, config, about = load_model(folder, device=args.device)
    if config.objective.interpolant != "linear":
        raise ValueError(f"{folder}: expected a model of the linear path, got {config.objective.interpolant!r}")
    data = training_set(config)
    images = to_unit(data.x).to(device)
    if args.judge:
        net, accuracy = load_encoder(args.judge).to(device), None
    else:
        with torch.enable_grad():
            net, accuracy = train_encoder(data, epochs=args.epochs, seed=args.seed, width=128, device=device)
    judge = Judge(net, images)
    torch.set_float32_matmul_precision("high")
    velocity = torch.compile(model, dynamic=False) if args.compile and device.type == "cuda" else model
    noise = standard_normal(torch.empty(args.samples, *data.shape), args.seed).to(device)
    labels = torch.arange(args.samples, device=device) % data.num_classes
    study = Study(velocity, noise, labels, judge, args)
    runs = study.run()
    generator = torch.Generator().manual_seed(args.seed)
    some = torch.randperm(len(images), generator=generator)[: args.samples].to(device)
    return {
        "data": Path(config.data.source).name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained": about["step"],
        "judge_accuracy": accuracy,
        "samples": args.samples,
        "frechet_of_training_images": judge.distance(images[some]),
        "machine": machine(device),
        "seconds": time.perf_counter() - began,
        "runs": runs,
    }


def training_set(config: TrainConfig) -> ArrayData:
    """What a run was trained on; fashion.py names a folder of IDX files."""
    images, labels = (Path(config.data.source) / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    return ArrayData(idx(images), idx(labels)) if images.is_file() else load_data(config.data)


def packed(runs: list[dict]) -> dict:
    """Runs column by column, which is shorter as JSON; "without" is there for the runs of the table."""
    columns = {key: [run[key] for run in runs] for key in runs[0] if key != "without"}
    return {**columns, "without": {str(i): run["without"] for i, run in enumerate(runs) if "without" in run}}


def unpacked(columns: dict) -> list[dict]:
    """The inverse of `packed`."""
    without = {int(i): {"without": values} for i, values in columns["without"].items()}
    names = [key for key in columns if key != "without"]
    rows = zip(*(columns[key] for key in names), strict=True)
    return [{**dict(zip(names, row, strict=True)), **without.get(i, {})} for i, row in enumerate(rows)]


def solvers_of(models: dict[str, dict]) -> list[str]:
    """The solvers that were run, in the order of NAMES."""
    ran = {run["solver"] for model in models.values() for run in model["runs"] if run["kind"] == "stable"}
    return [solver for solver in NAMES if solver in ran]


def find(runs: list[dict], **settings: object) -> dict:
    """The first run with these settings."""
    return next(run for run in runs if all(run[key] == value for key, value in settings.items()))


def difference(run: dict, other: dict) -> str:
    """Frechet distance of a run less that of another, with its standard error."""
    without = torch.tensor(run["without"]) - torch.tensor(other["without"])
    error = float(((GROUPS - 1) / GROUPS * (without - without.mean()).square().sum()).sqrt())
    return f"{run['frechet'] - other['frechet']:+.3f} ± {error:.3f}"


def rows_of(models: dict[str, dict]) -> list[list[str]]:
    """The table: for every solver all steps, half and 9 of the low ones, and as many evaluations without StableVS."""
    rows = []
    for solver in solvers_of(models):
        label = NAMES[solver][0]

        def row(sampler: str, **settings: object) -> None:
            cells, evaluations = [], 0
            for model in models.values():
                run = find(model["runs"], solver=solver, **settings)  # noqa: B023 - called in this round of the loop
                full = find(model["runs"], solver=solver, kind="plain", steps=BASE)  # noqa: B023
                evaluations = run["nfe"]
                cells += [f"{100 * run['distance']:.1f} %", f"{run['frechet']:.3f}"]
                cells += ["" if run is full else difference(run, full)]
            rows.append([label, sampler, str(evaluations), *cells])  # noqa: B023

        row(f"{BASE} steps", kind="plain", steps=BASE)
        for low in (HALF, PAPER):
            stable = {"split": SPLIT, "low_steps": low}
            row(f"StableVS, {low} low steps", kind="stable", **stable)
            if solver != "euler":
                row("the same grid without StableVS", kind="thinned", **stable)
            nfe_of = find(next(iter(models.values()))["runs"], solver=solver, kind="stable", **stable)["nfe"]
            row("evenly spaced, as many evaluations", kind="plain", nfe=nfe_of)
    return rows


def plot(models: dict[str, dict]) -> object:
    figure, grid = new_figure(3, 12.6, 3.9 * len(models), rows=len(models))
    for (name, model), (left, middle, right) in zip(models.items(), grid, strict=True):
        titles = {"distance": "distance to the 250-step solution", "frechet": "Fréchet distance"}
        for axes, (key, title) in zip((left, middle), titles.items(), strict=True):
            axes_of(axes, f"{name}: {title}", "model evaluations a sample", "")
            for solver in solvers_of(models):
                label, colour = NAMES[solver]
                for kind, style in (("plain", "-"), ("stable", "--")):
                    runs = [r for r in model["runs"] if (r["kind"], r["solver"], r["split"]) == (kind, solver, SPLIT)]
                    points = sorted((r["nfe"], r[key]) for r in runs)
                    axes.plot(*zip(*points, strict=True), style, color=colour, label=label if kind == "plain" else None)
            axes.set(xscale="log", yscale="log")
            ticks = [5, 10, 20, 50, 100]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        exact = find(model["runs"], kind="exact")["frechet"]
        middle.axhline(exact, color="0.6", linewidth=0.8)
        axes_of(right, f"{name}: Fréchet distance, Euler", "low steps", "")
        euler = [r for r in model["runs"] if (r["kind"], r["solver"]) == ("stable", "euler")]
        for i, split in enumerate(sorted({run["split"] for run in euler})):
            runs = [r for r in euler if r["split"] == split]
            points = [(r["low_steps"], r["frechet"]) for r in runs]
            right.plot(*zip(*points, strict=True), color=str(0.8 - 0.15 * i), label=f"split {split}")
        full = find(model["runs"], kind="plain", solver="euler", steps=BASE)["frechet"]
        right.axhline(full, color="#b5542a", linewidth=0.8, label=f"all {BASE} steps", linestyle=":")
        right.set_yscale("log")
        right.legend(frameon=False, fontsize=7)
    grid[0][0].plot([], [], "-", color="0.4", label="evenly spaced")
    grid[0][0].plot([], [], "--", color="0.4", label=f"{BASE} steps, fewer below {SPLIT}")
    grid[0][0].legend(frameon=False, fontsize=7)
    return figure


def report(models: dict[str, dict], args: argparse.Namespace) -> None:
    """Figure, table and .json."""
    as_read = json.loads(as_json({name: {**model, "runs": packed(model["runs"])} for name, model in models.items()}))
    models = {name: {**model, "runs": unpacked(model["runs"])} for name, model in as_read.items()}
    head = ["solver", "sampler", "evaluations"]
    for name in models:
        head += [f"{name}: distance", "Fréchet", f"less that of {BASE} steps"]
    record = {
        "machine": "; ".join(f"{name}: {model['machine']}" for name, model in models.items()),
        "seconds": sum(model["seconds"] for model in models.values()),
        "models": as_read,
    }
    try:
        figure = plot(models)
    except ModuleNotFoundError as error:  # a machine to measure on may have no matplotlib
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "sampling.json").write_text(as_json(record))
        print(f"{args.output / 'sampling.json'}, for --redraw where there is matplotlib: {error}")
        return
    write("sampling", args, record, {"samplers": table(head, rows_of(models))}, figure)


def main(args: argparse.Namespace) -> None:
    models: dict[str, dict] = {}
    for path in args.redraw:
        for name, model in json.loads(path.read_text())["models"].items():
            models[name] = {**model, "runs": unpacked(model["runs"])}
    for folder in args.runs:
        found = measure(folder, args, device_of(args))
        models[NAMED.get(Path(found["data"]).stem, found["data"])] = found
    report(models, args)


NAMED = {"fashion-mnist": "Fashion-MNIST", "fashion": "Fashion-MNIST", "mnist": "MNIST", "digits": "digits"}

if __name__ == "__main__":
    p = arguments(__doc__.splitlines()[0])
    p.set_defaults(page=DOCS / "sampling.md")
    p.add_argument("runs", type=Path, nargs="*", help="folders of svel train or fashion.py")
    p.add_argument("--redraw", type=Path, nargs="+", default=[], help=".json files of earlier runs")
    p.add_argument("--judge", type=Path, help="folder of an encoder; trained here by default")
    p.add_argument("--epochs", type=int, default=6, help="of a judge trained here")
    p.add_argument("--samples", type=int, default=2048, help=" ")
    p.add_argument("--batch", type=int, default=2048, help="samples at once")
    p.add_argument("--solvers", nargs="+", choices=list(NAMES), default=list(NAMES), help=" ")
    p.add_argument("--splits", type=float, nargs="+", default=SPLITS, help=f"with {SPLIT}, that of the table")
    p.add_argument("--exact", type=int, default=250, help="Heun's steps to the solution all are compared with")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the model, on CUDA")
    main(p.parse_args())

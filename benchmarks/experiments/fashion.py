"""Experiment 4: does it help? A SiT on Fashion-MNIST by CFM, StableVM, StableVM + REPA and StableVM + VA-REPA.

    python benchmarks/experiments/fashion.py                 # on CUDA, minutes
    python benchmarks/experiments/fashion.py --redraw        # figure and table again from the .json

60,000 images of 28 x 28 (Debian's package dataset-fashion-mnist, or --data FOLDER), a SiT of 11 M parameters with 49
tokens, three seeds, all arms on the same samples, times and noise. The distance to the exact velocity is
E|v - u|^2 / E|u|^2, u the marginal velocity of the whole class in the training set, on noise never trained on. The
Frechet distance is between features of a classifier trained on this set ("judge"); the teacher is another one, of
another seed and width. A last arm, "exact", is trained on u itself: no target can have less variance.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import stablevelocity as sv
import torch
from common import COLOURS, arguments, axes_of, device_of, idx, machine, new_figure, table, write
from stablevelocity import checkpoint
from stablevelocity.alignment import Projectors, projector
from stablevelocity.config import ModelConfig, TrainConfig, to_dict
from stablevelocity.data import ArrayData, to_unit
from stablevelocity.ema import EMA
from stablevelocity.encoder import Encoder, about_encoder, load_encoder, save_encoder, train_encoder
from stablevelocity.generation import autocast, build_model, resolve_precision
from torch import Tensor, nn

TIMES = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the training, where it is measured
SPLIT, COEFFICIENT, LOW = 0.7, 0.5, 0.5  # the paper's split and coefficient; its t_min
FEWEST, RESET = 1000, 1.5  # steps that show anything; seconds to begin a run
ARMS = {  # name: (label, colour)
    "cfm": ("CFM", COLOURS["cfm"]),
    "stablevm": ("StableVM", COLOURS["stablevm"]),
    "repa": ("StableVM + REPA", COLOURS["without"]),
    "va_repa": ("StableVM + VA-REPA", COLOURS["stf"]),
    "exact": ("exact velocity as target", "0.45"),
}
PARTS = {"all times": (0.0, 1.0), "t <= 0.5": (0.0, 0.5), "0.5 < t <= 0.8": (0.5, 0.8), "t > 0.8": (0.8, 1.0)}


def every_time(t: Tensor, split: float, interpolant: sv.Interpolant) -> Tensor:
    """REPA's weight: 1."""
    return torch.ones_like(t)


class Truth:
    """Noisy training images at each time, and the marginal velocity of the training set there."""

    def __init__(self, x: Tensor, y: Tensor, refs: Tensor, rows: int):
        generator = torch.Generator().manual_seed(2**31)
        chosen = torch.randint(len(x), (len(TIMES), rows), generator=generator).to(x.device)
        noise = torch.randn((len(TIMES), rows, *x.shape[1:]), generator=generator).to(x.device)
        self.t = torch.tensor(TIMES, device=x.device)[:, None].repeat(1, rows)  # (T, n)
        self.y, path = y[chosen], sv.Linear()
        self.x = torch.stack([path.interpolate(x[i], e, t) for i, e, t in zip(chosen, noise, self.t, strict=True)])
        self.velocity = torch.stack(
            [path.target(a, refs, t, labels) for a, t, labels in zip(self.x, self.t, self.y, strict=True)]
        )

    def distance(self, net: nn.Module) -> list[float]:
        """E|v - u|^2 / E|u|^2 at each time."""
        out = []
        for x, t, y, u in zip(self.x, self.t, self.y, self.velocity, strict=True):
            out.append((net(x, t, y).float() - u).square().sum() / u.square().sum())
        return torch.stack(out).tolist()


class Judge:
    """Frechet distances to the training set on the features of a classifier, and what it takes samples for."""

    def __init__(self, net: nn.Module, x: Tensor):
        self.net = net
        self.mean, self.covariance = self.moments(x)
        value, vector = torch.linalg.eigh(self.covariance)
        self.root = vector * value.clamp_min(0).sqrt() @ vector.T

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance (float64) of the features."""
        features = torch.cat([self.net.embed(part) for part in x.split(1000)]).double()
        return features.mean(0), features.T.cov()

    def distance(self, x: Tensor) -> float:
        """|m - m'|^2 + tr(C + C' - 2 (C^1/2 C' C^1/2)^1/2)."""
        mean, covariance = self.moments(x)
        cross = torch.linalg.eigvalsh(self.root @ covariance @ self.root).clamp_min(0).sqrt().sum()
        gap = (mean - self.mean).square().sum()
        return float(gap + covariance.trace() + self.covariance.trace() - 2 * cross)

    def agrees(self, x: Tensor, y: Tensor) -> float:
        """Share of the samples that the classifier takes for what they were asked to be."""
        said = torch.cat([self.net(part).argmax(1) for part in x.split(1000)])
        return float((said == y).float().mean())


class Study:
    """One network, one optimizer and one moving average, trained by each arm from each seed's weights anew.

    On CUDA a step of an arm, from the choice of its images to the update of the weights, is one graph.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        images, labels = (idx(args.data / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
        self.data = ArrayData(images, labels)
        self.x, self.y = to_unit(self.data.x).to(device), self.data.y.to(device)
        test = to_unit(idx(args.data / "t10k-images-idx3-ubyte.gz")[:, None]).to(device)
        if args.images:
            self.data = ArrayData(images[: args.images], labels[: args.images])
            self.x, self.y = self.x[: args.images], self.y[: args.images]
        self.precision = resolve_precision("auto" if device.type == "cuda" else "no", device)
        self.seconds: dict[str, float] = {}
        began = time.perf_counter()

        self.teacher, self.teacher_accuracy = self.encoder("teacher", width=args.channels, seed=100)
        judge, self.judge_accuracy = self.encoder("judge", width=128, seed=101)
        self.tokens = torch.cat([self.teacher.tokens(part).to(torch.bfloat16) for part in self.x.split(1000)])
        self.judge = Judge(judge, self.x)
        self.floor = self.judge.distance(test)
        self.seconds["encoders"] = time.perf_counter() - began
        print(f"accuracy: teacher {self.teacher_accuracy:.4f}, judge {self.judge_accuracy:.4f}", flush=True)

        began = time.perf_counter()
        classes = self.data.num_classes
        most = int(torch.bincount(self.data.y).max())
        whole = sv.ReferenceBank(self.data.shape, classes, most, dtype=torch.float32, null="all", device=device)
        whole.push(self.x, self.y)
        if int(whole.counts.min()) < most:
            raise ValueError(f"data: expected as many images of each class, got {whole.counts.tolist()}")
        self.truth = Truth(self.x, self.y, whole.refs, args.rows)
        self.seconds["truth"] = time.perf_counter() - began

        self.config = TrainConfig(
            batch_size=args.batch,
            mixed_precision=self.precision,
            model=ModelConfig(patch_size=4, hidden_size=args.width, depth=args.depth, num_heads=args.width // 64),
        )
        self.config.data.source = str(args.data)
        self.model, self.project = self.fresh(0)
        self.hidden = sv.HiddenState(self.model, f"blocks.{args.depth // 3 - 1}")
        self.ema = EMA(self.model, args.ema)
        self.parameters = [p for p in (*self.model.parameters(), *self.project.parameters()) if p.requires_grad]
        lr = torch.tensor(args.lr, device=device) if device.type == "cuda" else args.lr
        on_cuda = {"fused": True, "capturable": True} if device.type == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, **on_cuda)
        self.bank = sv.ReferenceBank(self.data.shape, classes, args.references, device=device)
        mixture = partial(sv.StableVMObjective, t_min=LOW, source="loader")
        self.objectives = {
            "cfm": sv.CFMObjective(num_classes=classes),
            "stablevm": mixture(self.bank),
            "repa": mixture(self.bank),
            "va_repa": mixture(self.bank),
            "exact": sv.StableVMObjective(whole, t_min=0.0, update_bank=False),
        }
        self.align = {
            "repa": sv.VAREPALoss(schedule=every_time),
            "va_repa": sv.VAREPALoss(schedule="sigmoid", split=SPLIT),
        }
        self.window = torch.zeros(2, device=device)  # sums: loss to the target, alignment
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def encoder(self, name: str, **options: int) -> tuple[Encoder, float]:
        """An encoder of an earlier run, or one trained now and left for a later one; and its accuracy."""
        if self.args.encoders:
            folder = self.args.encoders / name
            return load_encoder(folder).to(self.device), float(about_encoder(folder)["accuracy"])
        options = {"epochs": self.args.epochs, "batch_size": 256, "patch_size": 4, **options}
        net, accuracy = train_encoder(self.data, device=self.device, **options)
        save_encoder(net, self.args.models / name, accuracy=accuracy)
        return net, accuracy

    def fresh(self, seed: int) -> tuple[nn.Module, Projectors]:
        """A model and a projector with the weights of a seed."""
        torch.manual_seed(seed)
        model = build_model(self.config.model, self.data.shape, self.data.num_classes)
        project = Projectors([projector("mlp", self.args.width, self.args.channels, width=2 * self.args.width)])
        return model.to(self.device), project.to(self.device)

    def compile(self) -> None:
        """Compile the blocks: one is compiled, all of them run it."""
        for block in (*self.model.blocks, *self.ema.module.blocks):
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)

    def plain(self) -> None:
        """Undo `compile`."""
        for block in (*self.model.blocks, *self.ema.module.blocks):
            block.__dict__.pop("forward", None)

    def reset(self, seed: int) -> None:
        """The weights, the average, the optimizer, the bank and the random stream as a run starts with them."""
        for own, new in zip((self.model, self.project), self.fresh(seed), strict=True):
            own.load_state_dict(new.state_dict())
        self.ema.module.load_state_dict(self.model.state_dict())
        self.ema.updates = 0
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.bank.counts.zero_()
        self.bank.heads.zero_()
        rows = torch.randint(len(self.x), (32 * self.args.references,), generator=torch.Generator().manual_seed(seed))
        self.bank.push(self.x[rows.to(self.device)], self.y[rows.to(self.device)])
        self.window.zero_()
        torch.manual_seed(seed + 1000)

    def step(self, arm: str) -> None:
        """One update of the weights."""
        rows = torch.randint(len(self.x), (self.args.batch,), device=self.device)
        objective, align = self.objectives[arm], self.align.get(arm)
        draw = objective.sample(self.x[rows], self.y[rows])
        with autocast(self.device, self.precision):
            with self.hidden.watch():
                v = self.model(draw.x_t, draw.t, draw.labels)
            projected = self.project(self.hidden.tokens()) if align else None
        loss = objective.loss(v, draw)
        self.window[0] += loss.detach()
        if align:
            alignment = align(projected, [self.tokens[rows]], draw.t)
            self.window[1] += alignment.detach()
            loss = loss + COEFFICIENT * alignment
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def capture(self, arm: str) -> None:
        """Make the step of an arm one CUDA graph."""
        if self.device.type != "cuda":
            self.step(arm)
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(arm)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(arm)
        self.graphs[arm] = graph

    def advance(self, arm: str) -> None:
        """One step with its learning rate, and the average of the weights."""
        lr = self.args.lr * min(1.0, (self.ema.updates + 1) / self.args.warmup)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if arm in self.graphs:
            self.graphs[arm].replay()
        else:
            self.step(arm)
        self.ema.update(self.model)

    @torch.no_grad()
    def measure(self) -> dict:
        """The errors of the averaged model, and how good its samples are."""
        net, args = self.ema.module, self.args
        generator, n = torch.Generator().manual_seed(7), args.rows
        with autocast(self.device, self.precision):
            found = {"distance": self.truth.distance(net)}
            samples = []
            labels = torch.arange(args.samples, device=self.device) % self.data.num_classes
            for y in labels.split(n):
                x = torch.randn((n, *self.data.shape), generator=generator).to(self.device)
                samples.append(sv.sample(net, x, solver="heun", steps=args.sampling_steps, y=y))
        x = torch.cat(samples).clamp(-1, 1).float()
        return {**found, "frechet": self.judge.distance(x), "agrees": self.judge.agrees(x, labels)}

    def run(self, arm: str, seed: int, steps: int) -> dict:
        """Train by an arm from the weights of a seed: what was measured on the way."""
        self.reset(seed)
        began, done = time.perf_counter(), 0
        found: dict = {"steps": [], "loss": [], "alignment": [], "distance": [], "frechet": [], "agrees": []}
        for share in SHARES:
            upto = max(1, round(share * steps))
            for _ in range(done, upto):
                self.advance(arm)
            loss, alignment = (self.window / max(1, upto - done)).tolist()
            self.window.zero_()
            found["steps"].append(upto)
            for key, value in {"loss": loss, "alignment": alignment, **self.measure()}.items():
                found[key].append(value)
            done = upto
        found["seconds"] = time.perf_counter() - began
        return found

    def save(self, arm: str, seed: int, steps: int) -> None:
        """The averaged model in float16 as a run's checkpoint, which `svel sample` takes."""
        config = to_dict(self.config)
        config.update(seed=seed, steps=steps, output=str(self.args.models / arm))
        config["objective"].update(name="cfm" if arm == "cfm" else "stablevm")
        data = {"shape": list(self.data.shape), "num_classes": self.data.num_classes, "kind": "image"}
        weights = {key: value.half() for key, value in self.ema.module.state_dict().items()}
        state = {"config": config, "data": {**data, "length": len(self.data)}}
        checkpoint.save(self.args.models / arm / "checkpoints", steps, {"ema": weights}, state, keep=1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(study: Study, arm: str, n: int) -> float:
    """Seconds a step of an arm takes."""
    synchronize(study.device)
    began = time.perf_counter()
    for _ in range(n):
        study.advance(arm)
    synchronize(study.device)
    return (time.perf_counter() - began) / n


def prepare(study: Study, args: argparse.Namespace) -> dict[str, float]:
    """Compile and capture; milliseconds of a step of each arm that can be trained."""
    began, took = time.perf_counter(), {}
    if args.compile:
        study.compile()
        try:
            study.reset(0)
            study.step(args.arms[0])
            study.measure()
        except Exception:
            traceback.print_exc()
            print("the blocks run as they are, not compiled", flush=True)
            study.plain()
    for arm in args.arms:
        try:
            study.reset(0)
            study.capture(arm)
            took[arm] = timed(study, arm, args.trial)
            print(f"{arm}: {1e3 * took[arm]:.3f} ms a step", flush=True)
        except Exception:
            traceback.print_exc()
    study.seconds["capture"] = time.perf_counter() - began
    return took


def train(args: argparse.Namespace) -> None:
    """All runs; what they found goes to fashion_runs.json as they end."""
    began, device = time.perf_counter(), device_of(args)
    torch.set_float32_matmul_precision("high")
    study = Study(args, device)
    took = prepare(study, args)
    study.measure()
    synchronize(device)
    once = time.perf_counter()
    study.measure()
    measuring = time.perf_counter() - once
    spent = time.perf_counter() - began
    left = 0.95 * (args.seconds - spent) / args.seeds - (len(SHARES) * measuring + RESET) * len(took)
    steps = args.steps or int(left / sum(took.values())) // 16 * 16
    print(f"{spent:.1f} s to prepare {study.seconds}, {measuring:.2f} s to measure, {steps} steps a run", flush=True)
    if not args.steps and steps < FEWEST:
        raise SystemExit(
            f"--seconds: expected time for {FEWEST} steps a run or more, got {args.seconds} s: for {steps}"
        )
    settings = {
        key: str(value)
        for key, value in vars(args).items()
        if key not in ("output", "page", "models", "data", "encoders")
    }
    record = {
        "settings": settings,
        "machine": machine(device),
        "torch": torch.__version__,
        "model_parameters": sum(p.numel() for p in study.model.parameters() if p.requires_grad),
        "times": TIMES,
        "steps": steps,
        "accuracy": {"teacher": study.teacher_accuracy, "judge": study.judge_accuracy},
        "frechet_of_test_images": study.floor,
        "step_ms": {arm: 1e3 * value for arm, value in took.items()},
        "runs": {arm: {} for arm in took},
    }
    best: dict[str, float] = {}
    for seed in range(args.seeds):
        for arm in took:
            try:
                found = study.run(arm, seed, steps)
            except Exception:
                traceback.print_exc()
                continue
            mean = sum(found["distance"][-1]) / len(TIMES)
            print(
                f"{arm} seed {seed}: distance {mean:.5f}, Frechet {found['frechet'][-1]:.4f}, agrees "
                f"{found['agrees'][-1]:.4f}, {found['seconds']:.1f} s",
                flush=True,
            )
            record["runs"][arm][str(seed)] = found
            record["seconds"] = time.perf_counter() - began
            if arm in args.keep and found["frechet"][-1] < best.get(arm, float("inf")):
                best[arm] = found["frechet"][-1]
                study.save(arm, seed, steps)
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "fashion_runs.json").write_text(json.dumps(record))  # a run cut short leaves what it has


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, their standard deviation."""
    v = torch.tensor(values, dtype=torch.float64)
    return f"{float(v.mean()):.{digits}f}" + (f" ± {float(v.std()):.{digits}f}" if len(v) > 1 else "")


def within(times: list[float], low: float, high: float) -> list[int]:
    """Which of the times are in (low, high]."""
    return [i for i, t in enumerate(times) if low < t <= high]


def against(runs: dict, arm: str, value: Callable[[dict], float]) -> str:
    """Change of a figure from CFM's with the same seed, in per cent of that: mean and extremes over the seeds."""
    common = [seed for seed in runs[arm] if seed in runs["cfm"]]
    changes = [100 * (value(runs[arm][seed]) / value(runs["cfm"][seed]) - 1) for seed in common]
    return f"{sum(changes) / len(changes):+.1f} [{min(changes):+.1f}, {max(changes):+.1f}]"


def report(record: dict, args: argparse.Namespace) -> None:
    """Figure, tables and .json of what was found, which CFM must be among."""
    runs = {arm: of for arm, of in record["runs"].items() if of}
    times, steps = record["times"], record["steps"]
    parts = {name: within(times, *limits) for name, limits in PARTS.items()}

    def distance(run: dict, rows: list[int]) -> float:
        return 100 * sum(run["distance"][-1][i] for i in rows) / len(rows)

    head = [f"after {steps:,} steps", *(f"distance, %, {name}" for name in parts), "Fréchet distance"]
    head += ["judge agrees, %", "ms a step", "seeds"]
    rows, changes = [], []
    for arm, of in runs.items():
        seeds = list(of.values())
        cells = [spread([distance(run, rows) for run in seeds], 3) for rows in parts.values()]
        cells += [spread([run["frechet"][-1] for run in seeds], 3)]
        cells += [spread([100 * run["agrees"][-1] for run in seeds], 2)]
        rows.append([ARMS[arm][0], *cells, f"{record['step_ms'][arm]:.2f}", len(seeds)])
        if arm != "cfm":
            values = [partial(distance, rows=of_part) for of_part in parts.values()]
            values.append(lambda run: run["frechet"][-1])
            changes.append([ARMS[arm][0], *(against(runs, arm, value) for value in values)])
    change_head = ["change from CFM, %", *parts, "Fréchet distance"]
    tables = {"fashion": table(head, rows), "fashion_changes": table(change_head, changes)}

    figure, ((left, middle, right),) = new_figure(3, 12.6)
    axes_of(left, f"Distance after {steps:,} steps", "t  (0: data, 1: noise)", "change from CFM with the same seed, %")
    axes_of(middle, "As training goes on, mean over t", "steps", "distance to the exact velocity, share")
    axes_of(right, "Samples as training goes on", "steps", "Fréchet distance (judge)")
    base = {seed: torch.tensor(run["distance"][-1]) for seed, run in runs["cfm"].items()}
    for arm, of in runs.items():
        label, colour = ARMS[arm]
        every = torch.tensor([run["distance"] for run in of.values()])  # (seeds, measured, T)
        frechet = torch.tensor([run["frechet"] for run in of.values()])  # (seeds, measured)
        at = next(iter(of.values()))["steps"]
        change = [100 * (every[i, -1] / base[seed] - 1) for i, seed in enumerate(of) if seed in base]
        for axes, x, lines in ((left, times, torch.stack(change)), (middle, at, every.mean(2)), (right, at, frechet)):
            axes.plot(x, lines.mean(0), color=colour, label=label, marker="o", markersize=2.5)
            axes.fill_between(x, lines.amin(0), lines.amax(0), color=colour, alpha=0.2, linewidth=0)
    for axes in (middle, right):
        axes.set(xscale="log", yscale="log")
    right.axhline(record["frechet_of_test_images"], color="0.4", linestyle=":", label="test images")
    right.legend(frameon=False, fontsize=8)
    write("fashion", args, record, tables, figure)


if __name__ == "__main__":
    p = arguments(__doc__.splitlines()[0])
    p.set_defaults(page=p.get_default("page").with_name("training.md"))
    p.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="folder of IDX files")
    p.add_argument("--models", type=Path, default=Path("fashion-models"), help="folder for the trained models")
    p.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help=" ")
    p.add_argument("--keep", nargs="*", choices=list(ARMS), default=["cfm", "va_repa"], help="whose model is saved")
    for name, value in (("width", 256), ("depth", 9), ("batch", 256), ("references", 256), ("seeds", 3)):
        p.add_argument(f"--{name}", type=int, default=value, help=" ")
    p.add_argument("--seconds", type=float, default=280, help="of all runs together, which says how many steps they do")
    p.add_argument("--steps", type=int, help="of a run, in place of what --seconds allows")
    p.add_argument("--encoders", type=Path, help="folder with teacher and judge of an earlier run, not trained again")
    p.add_argument("--channels", type=int, default=192, help="of the teacher's tokens")
    p.add_argument("--epochs", type=int, default=6, help="of the teacher and the judge")
    p.add_argument("--lr", type=float, default=5e-4, help="of AdamW, constant after the warm-up")
    p.add_argument("--warmup", type=int, default=200, help="steps")
    p.add_argument("--ema", type=float, default=0.999, help="decay of the weights' moving average")
    p.add_argument("--rows", type=int, default=1024, help="noisy images at each time, and samples made at once")
    p.add_argument("--samples", type=int, default=5120, help="a multiple of --rows")
    p.add_argument("--sampling-steps", type=int, default=16, help="of Heun, two evaluations each")
    p.add_argument("--images", type=int, help="of the training set, the first ones; all by default")
    p.add_argument("--trial", type=int, default=60, help="steps timed before the runs")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="the blocks")
    p.add_argument("--redraw", action="store_true", help="no training: figure and table of fashion_runs.json")
    p.add_argument("--draw", action=argparse.BooleanOptionalAction, default=True, help="figure and table at the end")
    args = p.parse_args()
    if not args.redraw:
        train(args)
    if args.redraw or args.draw:
        report(json.loads((args.output / "fashion_runs.json").read_text()), args)

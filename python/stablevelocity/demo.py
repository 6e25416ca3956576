"""`svel demo`: StableVM training and StableVS sampling on real digits, measured, in a few minutes on two CPU cores."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .config import TrainConfig, load_config
from .data import ArrayData, load_data, to_unit
from .generation import cpu_features, evaluations, generate, resolve_device, save_grid
from .report import markdown_table, plot_loss, plot_variance
from .train import Trainer, TrainResult
from .variance import VarianceCurve, variance_curve

CPU_BUDGET = 230.0  # seconds of training that a slow CPU gets; the default number of steps shrinks to fit
FEWEST_STEPS = 300
ON_CUDA = ["batch_size=96", "steps=1400"]  # there a step costs its launches, not its rows: fewer, larger ones


def demo_config(output: str | Path = "svel-demo", overrides: list[str] | None = None) -> TrainConfig:
    """The configuration of the demo, configs/demo.yaml, for an output folder."""
    path = files("stablevelocity") / "configs" / "demo.yaml"
    return load_config(str(path), [*(overrides or []), "overwrite=true", f"output={json.dumps(str(output))}"])


def run_demo(
    output: str | Path = "svel-demo",
    *,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    samples_per_class: int = 50,
    variance_samples: int = 768,
    classifier_epochs: int = 8,
    overrides: list[str] | None = None,
    progress: bool = True,
) -> dict:
    """Measure the variance of the targets, train, sample, judge the samples, and write a folder that shows all of it.

    Writes samples.png, variance.png, loss.png, metrics.json, report.md, config.yaml, log.jsonl and checkpoints/.

    Args:
        output: folder; what an earlier demo left there is replaced.
        steps: of training; None for as many as configs/demo.yaml says (1,400 of a double batch on a GPU) or, on a slow
            CPU, as fit into 230 s.
        samples_per_class: generated and judged.
        variance_samples: (x_0, noise) pairs behind the variance curve.
        overrides: "key=value" changes to configs/demo.yaml.

    Returns:
        What metrics.json holds.
    """
    began, seconds = time.perf_counter(), {}
    for_device = ON_CUDA if resolve_device(device).type == "cuda" else []
    config = demo_config(output, [*for_device, *(overrides or []), f"seed={seed}", f"device={device}"])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _timed(seconds, "data"):
        dataset = load_data(config.data)
    full_steps = config.steps
    if steps is None:
        with _timed(seconds, "calibration"):
            steps = affordable_steps(config, dataset)
    config.steps = steps
    trainer = Trainer(config, dataset=dataset, progress=progress)
    with _timed(seconds, "variance"):
        curve = measure_variance(config, dataset, trainer.device, variance_samples, progress)
        plot_variance(curve, folder / "variance.png", t_min=config.objective.t_min)
    with _timed(seconds, "training"):
        result = trainer.fit()
        plot_loss(result.losses, folder / "loss.png")
    config = dataclasses.replace(config, sampling=trainer.sampling())
    with _timed(seconds, "sampling"):
        labels = torch.arange(dataset.num_classes).repeat(samples_per_class)  # so that any first part has all classes
        with tqdm(desc="sample", disable=not progress) as bar:
            samples = generate(
                trainer.ema.module,
                config.sampling,
                dataset.shape,
                labels,
                interpolant=config.objective.interpolant,
                num_classes=dataset.num_classes,
                seed=seed,
                precision=trainer.precision,
                callback=lambda done, total: _advance(bar, done, total),
            )
        columns = min(12, samples_per_class)
        rows = [samples[labels == y][:columns] for y in range(dataset.num_classes)]
        save_grid(torch.cat(rows), folder / "samples.png", columns)
    with _timed(seconds, "classifier"):
        judge, held_out = train_classifier(dataset, classifier_epochs, seed, trainer.device, progress)
        with torch.no_grad():
            said = torch.cat([judge(part.to(trainer.device)).argmax(1).cpu() for part in samples.split(250)])
    seconds["total"] = time.perf_counter() - began
    metrics = _metrics(config, trainer, result, curve, seconds)
    metrics["full_steps"] = full_steps  # of the configuration, where time is no matter
    metrics["samples"] = {
        "count": len(samples),
        "model_evaluations_per_sample": evaluations(config.sampling),
        "steps": config.sampling.steps,
        "guidance": config.sampling.guidance,
        "small_cnn_accuracy_on_samples": float((said == labels).float().mean()),
        "small_cnn_accuracy_by_class": [float((said == y)[labels == y].float().mean()) for y in labels.unique()],
        "small_cnn_accuracy_on_held_out_real": held_out,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (folder / "report.md").write_text(_report(config, metrics))
    return metrics


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def affordable_steps(config: TrainConfig, dataset: ArrayData, *, budget: float = CPU_BUDGET) -> int:
    """config.steps, or on a CPU as many as some trial steps say will fit into `budget` seconds, at least 300."""
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return config.steps
    trial = Trainer(dataclasses.replace(config, overwrite=True), dataset=dataset, progress=False)
    step_seconds = trial.time_steps(8)
    return max(min(FEWEST_STEPS, config.steps), min(config.steps, int(budget / step_seconds)))


def measure_variance(
    config: TrainConfig, dataset: ArrayData, device: torch.device, samples: int, progress: bool
) -> VarianceCurve:
    """Target variances of CFM and of StableVM with the bank's capacity, given the class, on the training set itself."""
    x = to_unit(dataset.x).to(device)
    times = [*(i / 20 for i in range(1, 20)), 0.97, 0.99]
    smallest = int(torch.bincount(dataset.y).min())
    with tqdm(desc="variance", total=len(times), disable=not progress) as bar:
        return variance_curve(
            x,
            times,
            interpolant=config.objective.interpolant,
            references=min(config.bank.capacity, smallest),
            labels=dataset.y.to(device),
            samples=samples,
            generator=torch.Generator().manual_seed(config.seed),
            callback=lambda done, total: _advance(bar, done, total),
        )


def train_classifier(
    dataset: ArrayData, epochs: int, seed: int, device: torch.device, progress: bool
) -> tuple[nn.Module, float]:
    """A small CNN on nine tenths of the real images, to judge samples with; and its accuracy on the last tenth."""
    generator = torch.Generator().manual_seed(seed)
    x, y = to_unit(dataset.x).to(device), dataset.y.to(device)
    order = torch.randperm(len(x), generator=generator).to(device)
    held_out, train = order[: len(x) // 10], order[len(x) // 10 :]
    channels, height, width = dataset.shape
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 128),
            nn.ReLU(),
            nn.Linear(128, dataset.num_classes),
        ).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
        for _ in tqdm(range(epochs), desc="classifier", disable=not progress):
            for batch in train[torch.randperm(len(train), generator=generator).to(device)].split(100):
                loss = F.cross_entropy(net(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.eval()
    with torch.no_grad():
        return net, float((net(x[held_out]).argmax(1) == y[held_out]).float().mean())


def _metrics(
    config: TrainConfig, trainer: Trainer, result: TrainResult, curve: VarianceCurve, seconds: dict[str, float]
) -> dict:
    per_dimension = curve.per_dimension()
    tail = [line["loss"] for line in result.losses[-5:]]
    return {
        "data": {"source": config.data.source, "samples": len(trainer.dataset), "shape": list(trainer.dataset.shape)},
        "model_parameters": sum(p.numel() for p in trainer.parameters),
        "seed": config.seed,
        "steps": result.steps,
        "batch_size": config.batch_size,
        "final_loss": sum(tail) / len(tail),
        "device": _device_name(trainer.device),
        "threads": torch.get_num_threads(),
        "precision": trainer.precision,
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "steps_per_second": round(result.steps / result.seconds, 2),
        "variance": {
            "t": [round(t, 4) for t in curve.t.tolist()],
            "cfm": per_dimension.cfm.tolist(),
            "cfm_standard_error": per_dimension.cfm_error.tolist(),
            "stablevm": per_dimension.stablevm.tolist(),
            "stablevm_standard_error": per_dimension.stablevm_error.tolist(),
            "references": curve.references,
            "ratio_cfm_to_stablevm": {f"{t:.2f}": _ratio(curve, t) for t in (0.7, 0.8, 0.9, 0.95)},
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({cpu_features().get('cpu_name', 'unknown')}, {os.cpu_count()} logical cores)"


def _ratio(curve: VarianceCurve, t: float) -> float | None:
    """V_CFM / V_StableVM at t, one of the measured times; None where V_StableVM is zero."""
    i = int((curve.t - t).abs().argmin())
    return float(curve.cfm[i] / curve.stablevm[i]) if curve.stablevm[i] > 0 else None


def _report(config: TrainConfig, m: dict) -> str:
    s, v, sec = m["samples"], m["variance"], m["seconds"]
    ratios = ", ".join(f"{r:.1f} at t = {t}" for t, r in v["ratio_cfm_to_stablevm"].items() if r is not None)
    command = f"svel demo --steps {m['steps']} --seed {m['seed']} --output {config.output}"
    facts = markdown_table(
        [
            ("data", f"{m['data']['samples']} real images ({config.data.source}), {m['data']['shape']}"),
            ("model", f"SiT, {m['model_parameters'] / 1e6:.2f} M parameters, class-conditional"),
            ("training", f"{m['steps']} steps of {m['batch_size']}, StableVM, {m['steps_per_second']} steps/s"),
            ("final loss (mean of the last five log lines)", f"{m['final_loss']:.4f}"),
            ("model evaluations per sample", f"{s['model_evaluations_per_sample']} ({s['steps']} steps, guided)"),
            ("small CNN agrees with the label: samples", f"{s['small_cnn_accuracy_on_samples']:.1%} of {s['count']}"),
            ("small CNN on held-out real images", f"{s['small_cnn_accuracy_on_held_out_real']:.1%}"),
            ("machine", f"{m['device']}, {m['threads']} threads, precision {m['precision']}"),
            ("seconds", ", ".join(f"{phase} {value:.0f}" for phase, value in sec.items())),
        ]
    )
    return f"""# Stable Velocity on {m["data"]["samples"]} real digits

Trained from scratch with StableVM targets over a bank of {v["references"]} references a class; sampled with StableVS
(split {config.sampling.split}, {config.sampling.low_steps} low-variance steps) and guidance {s["guidance"]}.
One row per class:

![samples](samples.png)

{facts}

## Variance of the target

Measured on this training set, given the class: the mean square distance of either target from the exact marginal
velocity. CFM's variance over StableVM's: {ratios}.
Towards the data both vanish: there one image explains the noisy one by itself, so training takes the cheaper
conditional target below t = {config.objective.t_min}.

![variance](variance.png)

![loss](loss.png)

## What this does and does not show

* The samples are of a small model after minutes of training on {m["data"]["samples"]} images. The CNN's agreement says
  that classes are right and shapes legible; guidance raises it, and the settings of this demo were chosen with it in
  view. It says nothing about diversity, nor about copies of training images.
* A lower variance of the target is measured here. That it gives better samples than CFM at equal cost is not: this run
  trains no CFM model beside it (`svel train` with `--set objective.name=cfm` does).
* The loss of StableVM is lower than CFM's by construction, as the target is less noisy: compare samples, not losses.
* On the linear path without noise, StableVS is Euler on a grid thinned below the split: what it saves is model calls.

Reproduce with `{command}`. All figures are in metrics.json, the resolved configuration in
config.yaml, every logged step in log.jsonl, and the model in checkpoints/:
`svel sample {config.output} --output samples`.
"""

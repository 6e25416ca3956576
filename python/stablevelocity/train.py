"""The training loop: one process or many, resumable bit for bit, and nothing in a step waits for the device.

    trainer = Trainer(load_config("run.yaml", ["optim.lr=1e-3"]))
    result = trainer.fit()

Every random draw of training comes from the global random streams and from the data order, and checkpoints hold both.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from . import checkpoint
from .alignment import HiddenState, Projectors, VAREPALoss, projector, spatial_norm
from .bank import ReferenceBank
from .config import OptimConfig, SamplingConfig, TrainConfig, dump_yaml, to_dict
from .data import ArrayData, Batch, ImageFolder, ShuffledOrder, load_data, loader
from .ema import EMA
from .features import AlignedData
from .generation import build_model, generate, resolve_device, resolve_precision, sampling_split, save_grid
from .host_bank import HostReferenceBank
from .objectives import CFMObjective, StableVMObjective, STFObjective, TrainingSample
from .optional import require
from .sharded_bank import ShardedReferenceBank


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves."""

    folder: Path
    checkpoint: Path
    steps: int
    losses: list[dict[str, float]]  # the lines of log.jsonl: step, loss (mean since the line before), grad_norm, lr;
    # with fp16 also skipped, the steps since the line before whose gradients overflowed
    seconds: float  # of the training loop of this call, without set-up


def learning_rate(config: OptimConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of a step as a share of the configured one: linear warm-up, then constant or half a cosine."""

    def share(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / (config.warmup + 1)
        if config.schedule == "constant":
            return 1.0
        progress = (step - config.warmup) / max(1, steps - config.warmup)
        return config.final_lr + (1.0 - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))

    return share


def build_objective(config: TrainConfig, bank: ReferenceBank | None, num_classes: int) -> CFMObjective:
    """The objective of a configuration. The trainer itself pushes batches into the bank."""
    o = config.objective
    if o.name == "stf":
        return STFObjective(o.interpolant, times=o.times, precision=o.precision)
    if o.name == "cfm":
        return CFMObjective(o.interpolant, times=o.times, num_classes=num_classes, cfg_prob=o.cfg_prob)
    return StableVMObjective(
        bank,
        o.interpolant,
        times=o.times,
        cfg_prob=o.cfg_prob,
        t_min=o.t_min,
        source=o.source,
        precision=o.precision,
        update_bank=False,
        online="auto" in (config.align.split, config.sampling.split),
    )


class Trainer:
    """A training run.

    Args:
        config: see config.py.
        dataset: in place of the one that config.data names.
        progress: show a progress bar (on the main process).

    Raises:
        ValueError: naming the configuration key, what was expected and what came.
        ModuleNotFoundError: naming the extra to install.
    """

    def __init__(self, config: TrainConfig, *, dataset: ArrayData | ImageFolder | None = None, progress: bool = True):
        accelerate = require("accelerate", "train")
        if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
            raise ModuleNotFoundError(f"tracker: {config.tracker} is not installed: pip install {config.tracker}")
        for key, value in (("align.split", config.align.split), ("sampling.split", config.sampling.split)):
            if value == "auto" and config.objective.name != "stablevm":
                raise ValueError(
                    f"{key}: expected a number or the path of a variance.json with objective.name = "
                    f"{config.objective.name}, since StableVM's targets measure the variance; got 'auto'"
                )
        self.config, self.folder = config, Path(config.output)
        device = resolve_device(config.device)
        self.precision = resolve_precision(config.mixed_precision, device)
        if self.precision == "fp16" and device.type == "cpu":
            raise ValueError("mixed_precision: expected 'bf16' or 'no' on a CPU, got 'fp16'")
        _forget_last_run(accelerate.state.AcceleratorState)
        self.accelerator = accelerate.Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=self.precision,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(self.folder),
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.progress = progress and self.main
        share = config.batch_size // self.world
        if share % config.accumulate:
            raise ValueError(f"accumulate: expected a divisor of a process's {share} samples, got {config.accumulate}")
        self.resume_from = self._prepare_folder()

        self.dataset = load_data(config.data) if dataset is None else dataset
        self.num_classes = self.dataset.num_classes if config.objective.name != "stf" else 0
        self._seed(config.seed)  # the same weights everywhere
        self.model = build_model(config.model, self.dataset.shape, self.num_classes).to(self.device)
        self.ema = EMA(self.model, config.optim.ema)
        self.visited, self.projectors = self.dataset, Projectors()
        if config.align_at is not None:
            self._build_alignment()
        self.bank = self._build_bank()
        self.objective = build_objective(config, self.bank, self.num_classes)
        self.variance = getattr(self.objective, "variance", None)  # the online estimate, where a split is "auto"
        if self.variance is not None and self.world > 1:
            self.variance.reduce = partial(self.accelerator.reduce, reduction="sum")
        if config.align_at is not None:
            a = config.align
            variance = self.variance if a.split == "auto" else None
            self.align = VAREPALoss(config.objective.interpolant, a.schedule, a.split, variance=variance)
        o = config.optim
        trained = [*self.model.parameters(), *self.projectors.parameters()]
        self.parameters = [p for p in trained if p.requires_grad]
        adamw = torch.optim.AdamW(self.parameters, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
        self.scheduler = LambdaLR(adamw, learning_rate(o, config.steps))
        self.net, self.optimizer = self.accelerator.prepare(self.model, adamw)
        self.project = self.accelerator.prepare(self.projectors) if len(self.projectors) else self.projectors
        if config.compile == "model":
            self.net = torch.compile(self.net)
        self._draw, self._loss = self.objective.sample, self._model_and_loss
        if config.compile == "step":
            self._draw, self._loss = torch.compile(self._draw), torch.compile(self._loss)

        self.step, self.logs = 0, []
        # sums since the last log line: loss, gradient norms that are finite, how many of them
        self.window = torch.zeros(3, device=self.device)
        self.window_steps = 0
        self._seed(config.seed + 1 + self.rank)
        if self.resume_from is not None:
            self._restore(self.resume_from)
        elif self.bank is not None and config.bank.prefill:
            self._prefill()

    # -- set-up

    def _prepare_folder(self) -> Path | None:
        """Decide what to continue from, refuse to mix two runs in one folder, and write down the configuration."""
        config, root = self.config, self.folder / "checkpoints"
        found = None
        if config.resume == "latest":
            found = checkpoint.latest(root)
        elif config.resume is not None:
            found = checkpoint.find(config.resume)
        newest = checkpoint.latest(root)
        if newest is not None and newest != found and not config.overwrite:
            raise ValueError(
                f"output: {self.folder} holds a run ({newest.name}); continue it with --resume latest, start afresh "
                "with --overwrite, or take another --output"
            )
        self.accelerator.wait_for_everyone()
        if self.main:
            if config.overwrite and found is None:
                shutil.rmtree(root, ignore_errors=True)
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(dump_yaml(config))
        self.accelerator.wait_for_everyone()
        return found

    def _seed(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the global stream is what a data set's own code may use
        torch.manual_seed(seed)

    def _build_bank(self) -> ReferenceBank | None:
        if self.config.objective.name != "stablevm":
            return None
        b = self.config.bank
        options = {"dtype": getattr(torch, b.dtype), "null": b.null_label, "device": self.device}
        if b.storage == "device":
            return ReferenceBank(self.dataset.shape, self.num_classes, b.capacity, **options)
        if b.storage == "sharded":
            return ShardedReferenceBank(self.dataset.shape, self.num_classes, b.capacity, **options)
        for reason, holds in (
            ("a data set without classes", self.num_classes == 0),
            ("bank.null_label = all, which reads every class at every step", b.null_label == "all"),
            ("compile = step, since a host prepares each step", self.config.compile == "step"),
            (f"{self.world} processes, each of which would pin a whole bank", self.world > 1),
        ):
            if holds:
                raise ValueError(f"bank.storage: expected 'device' because of {reason}; got 'host'")
        most = min(self.config.batch_size, self.num_classes)
        return HostReferenceBank(self.dataset.shape, self.num_classes, b.capacity, max_classes=most, **options)

    def _build_alignment(self) -> None:
        """The hook on the model, a projector for each teacher, their features beside the data, and the loss."""
        config, a = self.config, self.config.align
        if not a.features:
            raise ValueError(
                "align.features: expected a folder that svel features wrote, since align_at is set; got none"
            )
        if config.objective.name == "stablevm" and config.objective.source != "loader":
            raise ValueError(
                "objective.source: expected 'loader' with align_at, since features are read for the loader's samples; "
                f"got {config.objective.source!r}"
            )
        self.hidden = HiddenState(self.model, config.align_at)
        self.visited = AlignedData(self.dataset, [folder.strip() for folder in a.features.split(",")])
        grid, hidden_size = self.model.grid, self.model.pos_embed.shape[2]
        for store in self.visited.features:
            tokens, channels = store.about.shape
            if tokens != grid[0] * grid[1]:
                raise ValueError(
                    f"align.features: expected {grid[0]} x {grid[1]} tokens as in the model, got {tokens} in "
                    f"{store.folder}"
                )
            self.projectors.append(projector(a.projector, hidden_size, channels, width=a.width, grid=grid))
        self.projectors.to(self.device)

    def _prefill(self) -> None:
        """Fill the bank with random samples of each class, the same on every process."""
        order = ShuffledOrder(len(self.dataset), min(256, len(self.dataset)), self.config.seed + 1)
        most = math.ceil(len(self.dataset) / order.batch_size)
        batches = zip(range(most), loader(self.dataset, order, workers=self.config.data.workers), strict=False)
        bar = tqdm(batches, desc="bank", total=most, disable=not self.progress, leave=False)
        self.bank.prefill(batch[:2] for _, batch in bar)

    # -- one step

    def _model_and_loss(self, draw: TrainingSample, features: Sequence[Tensor], total: Tensor | None) -> Tensor:
        if not features:
            return self.objective.loss(self.net(draw.x_t, draw.t, draw.labels), draw)
        with self.hidden.watch():
            output = self.net(draw.x_t, draw.t, draw.labels)
        projected = self.project(self.hidden.tokens())
        if self.config.align.spatial_norm:
            features = [spatial_norm(z) for z in features]
        alignment = self.align(projected, features, draw.t, total)
        return self.objective.loss(output, draw) + self.config.align.coefficient * alignment

    def _train_step(self, batch: Batch) -> None:
        x0, labels = batch[0].to(self.device, non_blocking=True), None
        if self.num_classes:
            labels = batch[1].to(self.device, non_blocking=True)
        features = [z.to(self.device, non_blocking=True) for z in batch[3]] if len(self.projectors) else []
        if self.bank is not None and self.objective.source == "bank":
            self._push(x0, labels)
        draw = self._draw(x0, labels)
        if self.bank is not None and self.objective.source == "loader":
            self._push(x0, labels)
        loss = self._backward(draw, features)
        clip = self.config.optim.clip or math.inf
        norm = self.accelerator.clip_grad_norm_(self.parameters, clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        taken = norm.isfinite()  # else the scaler of fp16 has skipped the step
        self.window += torch.stack([loss, torch.where(taken, norm, 0.0), taken.to(loss.dtype)])
        self.window_steps += 1
        self.step += 1

    def _backward(self, draw: TrainingSample, features: list[Tensor]) -> Tensor:
        """The gradients of the whole batch from its parts, and its loss. Processes exchange them in the last part."""
        parts, losses, total = self.config.accumulate, [], None
        self.accelerator.gradient_accumulation_steps = parts  # which all accelerators of a process share
        if features:
            total = self.accelerator.reduce(self.align.weights(draw.t).sum() / parts, "mean")
        chunks = zip(*(z.chunk(parts) for z in features), strict=True) if features else [()] * parts
        for rows, teachers in zip(draw.split(parts), chunks, strict=True):
            with self.accelerator.accumulate(self.net, self.project):
                loss = self._loss(rows, teachers, total)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def _push(self, x0: Tensor, labels: Tensor | None) -> None:
        """Every bank stores the whole global batch, so that all are the same; one in parts gathers it itself."""
        if self.world > 1 and not isinstance(self.bank, ShardedReferenceBank):
            x0 = self.accelerator.gather(x0)
            labels = None if labels is None else self.accelerator.gather(labels)
        self.bank.push(x0, labels)

    # -- the loop

    def _ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; a bank on the host is told the labels of each while the one before it trains."""
        return self.bank.ahead(batches) if isinstance(self.bank, HostReferenceBank) else iter(batches)

    def fit(self) -> TrainResult:
        """Train up to config.steps, and save the last step.

        Raises:
            RuntimeError: when the loss or the gradient is no longer finite, found when it is next logged.
        """
        config = self.config
        start, began, saved = self.step, time.perf_counter(), None
        order = ShuffledOrder(
            len(self.visited),
            config.batch_size,
            config.seed,
            rank=self.rank,
            world=self.world,
            position=self.step * config.batch_size,
        )
        batches = self._ahead(loader(self.visited, order, workers=config.data.workers, pin=self.device.type == "cuda"))
        self._start_tracker()
        self._trim_log()
        bar = tqdm(desc="train", total=config.steps, initial=start, disable=not self.progress, dynamic_ncols=True)
        self.net.train()
        try:
            while self.step < config.steps:
                self._train_step(next(batches))
                bar.update()
                last = self.step == config.steps
                if last or self.step % config.log_every == 0:
                    self._log(bar)
                if config.sample_every and (last or self.step % config.sample_every == 0):
                    self._sample_grid()
                if last or (config.save_every and self.step % config.save_every == 0):
                    saved = self.save()
        finally:
            bar.close()
        seconds = time.perf_counter() - began
        self.accelerator.wait_for_everyone()  # no process takes the group down while another still uses it
        self.accelerator.end_training()
        return TrainResult(self.folder, saved or self.resume_from, self.step, self.logs, seconds)

    def time_steps(self, n: int) -> float:
        """Seconds a step takes here, from n steps after two to warm up; the trainer is of no use after that."""
        order = ShuffledOrder(len(self.dataset), self.config.batch_size, self.config.seed)
        batches = self._ahead(loader(self.visited, order))
        times = []
        for _ in range(n + 2):
            start = time.perf_counter()
            self._train_step(next(batches))
            times.append(time.perf_counter() - start)
        return sum(times[2:]) / n

    def _start_tracker(self) -> None:
        if self.config.tracker == "none":
            return
        flat = {}
        for key, value in to_dict(self.config).items():
            items = value.items() if isinstance(value, dict) else [(None, value)]
            flat.update({key if name is None else f"{key}.{name}": str(v) for name, v in items})
        self.accelerator.init_trackers("stablevelocity", config=flat)

    def _log(self, bar: tqdm) -> None:
        """The only read of the device in training, apart from samples and checkpoints."""
        mean = self.accelerator.reduce(self.window / max(1, self.window_steps), "mean")
        loss, norm, taken = mean.tolist()
        norm = norm / taken if taken else 0.0
        line = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": self.scheduler.get_last_lr()[0]}
        if self.accelerator.scaler is not None:
            line["skipped"] = round((1.0 - taken) * self.window_steps)
        if self.variance is not None:
            line["split"] = sampling_split(self.variance)
        self.window.zero_()
        self.window_steps = 0
        self.logs.append(line)
        bar.set_postfix(loss=f"{loss:.4f}", grad=f"{norm:.2f}", refresh=False)
        if self.main:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({key: value for key, value in line.items() if key != "step"}, step=self.step)
        if not math.isfinite(loss) or (taken < 1.0 and self.accelerator.scaler is None):
            raise RuntimeError(
                f"the loss is {loss} at step {self.step}, and {1.0 - taken:.0%} of the gradients since the line of the "
                "log before are not finite: try a lower optim.lr"
            )

    def _trim_log(self) -> None:
        """Drop the lines that a killed run wrote after the checkpoint that we continue from."""
        if self.main:
            lines = "".join(json.dumps(line) + "\n" for line in self.logs)
            (self.folder / "log.jsonl").write_text(lines)

    def sampling(self) -> SamplingConfig:
        """How to sample now: config.sampling, with a number in place of split = auto. Waits for the device."""
        if self.config.sampling.split != "auto":
            return self.config.sampling
        return replace(self.config.sampling, split=sampling_split(self.variance))

    def _sample_grid(self) -> None:
        """A grid of samples of the averaged model, a row for each of up to ten classes; the same noise each time."""
        if not self.main:
            return
        classes = min(10, self.num_classes) or 8
        labels = torch.arange(classes).repeat_interleave(8) if self.num_classes else None
        samples = generate(
            self.ema.module,
            self.sampling(),
            self.dataset.shape,
            labels,
            classes * 8,
            interpolant=self.config.objective.interpolant,
            num_classes=self.num_classes,
            seed=self.config.seed,
            precision=self.precision,
        )
        (self.folder / "samples").mkdir(exist_ok=True)
        save_grid(samples, self.folder / "samples" / f"step-{self.step:08d}.png", 8)

    # -- checkpoints

    def save(self) -> Path | None:
        """Write a checkpoint now; the folder, on the main process. Called by all processes."""
        streams = [_random_state(self.device)]
        if self.world > 1:
            from accelerate.utils import gather_object

            streams = gather_object(streams)
        root, writing, folder = self.folder / "checkpoints", None, None
        if self.main:
            writing = checkpoint.begin(root, self.step)
        if isinstance(self.bank, ShardedReferenceBank):
            self.bank.save(self._same_everywhere(writing) / "bank")
        if self.main:
            modules = {"model": self.model.state_dict(), "ema": self.ema.module.state_dict()}
            if self.bank is not None and not isinstance(self.bank, ShardedReferenceBank):
                modules["bank"] = self.bank.state_dict()
            if self.variance is not None:
                modules["variance"] = self.variance.state_dict()
            if len(self.projectors):
                modules["projectors"] = self.projectors.state_dict()
            scaler = self.accelerator.scaler
            state = {
                "config": to_dict(self.config),
                "data": {
                    "shape": list(self.dataset.shape),
                    "num_classes": self.num_classes,
                    "kind": self.dataset.kind,
                    "length": len(self.dataset),
                    "position": self.step * self.config.batch_size,
                },
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "ema_updates": self.ema.updates,
                "random": streams,
                "window": self.window,
                "window_steps": self.window_steps,
                "logs": self.logs,
            }
            folder = checkpoint.finish(writing, self.step, modules, state, keep=self.config.keep)
        self.accelerator.wait_for_everyone()
        return folder

    def _same_everywhere(self, value: Any) -> Any:
        """What the main process has."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def _restore(self, folder: Path) -> None:
        """Take up a run where a checkpoint left it.

        Raises:
            ValueError: when the checkpoint is of another model, bank, data set or batch size.
        """
        self.step, state = checkpoint.load(folder)
        now = {
            "data.shape": (list(self.dataset.shape), state["data"]["shape"]),
            "data.num_classes": (self.num_classes, state["data"]["num_classes"]),
            "number of samples": (len(self.dataset), state["data"]["length"]),
            "batch_size": (self.config.batch_size, state["config"]["batch_size"]),
            "align_at": (self.config.align_at, state["config"].get("align_at")),
            "objective.name": (self.config.objective.name, state["config"]["objective"]["name"]),
        }
        for name, (ours, theirs) in now.items():
            if ours != theirs:
                raise ValueError(f"{name}: expected {theirs} as in the checkpoint {folder}, got {ours}")
        try:
            self.model.load_state_dict(checkpoint.load_module(folder, "model"))
            self.ema.module.load_state_dict(checkpoint.load_module(folder, "ema"))
            if len(self.projectors):
                self.projectors.load_state_dict(checkpoint.load_module(folder, "projectors"))
        except RuntimeError as error:
            raise ValueError(
                f"model: expected the model of the checkpoint {folder}; {str(error).splitlines()[1].strip()}"
            ) from error
        self.ema.updates = state["ema_updates"]
        if self.bank is not None:
            self._restore_bank(folder)
        if self.variance is not None and (folder / "variance.safetensors").is_file():  # else no split was auto there
            self.variance.load_state_dict(checkpoint.load_module(folder, "variance"))
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.window.copy_(state["window"])
        self.window_steps, self.logs = state["window_steps"], state["logs"]
        if self.rank < len(state["random"]):  # a process more than before keeps a stream of its own
            _set_random_state(state["random"][self.rank], self.device)
        else:
            self._seed(self.config.seed + 1 + self.rank + self.step * self.world)

    def _restore_bank(self, folder: Path) -> None:
        """The bank of a checkpoint, wherever that run had it and however many processes it was of."""
        if isinstance(self.bank, ShardedReferenceBank):
            if (folder / "bank").is_dir():
                self.bank.load(folder / "bank")
            else:
                self.bank.load_whole(checkpoint.load_module(folder, "bank"))
        else:
            self.bank.load_state_dict(checkpoint.load_bank(folder))


def _forget_last_run(state: type) -> None:
    """accelerate keeps one state a process and refuses a second run in it with another precision or device."""
    if state._shared_state and state().num_processes == 1:
        state._reset_state(reset_partial_state=True)


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),  # noqa: NPY002
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)

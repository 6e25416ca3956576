"""Samples from a trained model: the configured sampler run in batches, and images of what comes out."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoint
from .config import ModelConfig, SamplingConfig, TrainConfig, from_dict
from .data import to_uint8
from .models import SiT
from .models.sit import SIZES
from .online import OnlineVariance
from .optional import require
from .sampling import Guidance, StableVS, nfe, sample, shifted_grid, standard_normal, time_grid


def resolve_device(name: str) -> torch.device:
    """A device from "auto", "cpu" or "cuda"."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a CUDA device that torch can use, got none")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(name: str, device: torch.device) -> str:
    """ "no", "bf16" or "fp16" from what was asked; "auto" is bf16 where the hardware multiplies it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    features = cpu_features()
    return "bf16" if features.get("avx512_bf16") or features.get("amx_bf16") else "no"


def cpu_features() -> dict:
    """What torch knows of the CPU; nothing where this torch cannot say."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context in which the model runs."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def build_model(config: ModelConfig, shape: Sequence[int], num_classes: int) -> SiT:
    """The model of a configuration for samples of `shape` (C, H, W)."""
    channels, *size = shape
    width = SIZES[config.size] if config.size else vars(config)
    names = ("hidden_size", "depth", "num_heads")
    return SiT(
        tuple(size),
        config.patch_size,
        channels,
        **{name: width[name] for name in names},
        mlp_ratio=config.mlp_ratio,
        num_classes=num_classes,
        qk_norm=config.qk_norm,
        checkpointing=config.checkpointing,
    )


def sampling_split(variance: OnlineVariance) -> float:
    """What training measured so far, as the split of sampling; the paper's 0.85 before it has seen enough."""
    return float(variance.split(before=0.85))


def settle_split(config: TrainConfig, folder: str | Path) -> TrainConfig:
    """The configuration with what the training run in a checkpoint folder measured in place of sampling.split = auto.

    Raises:
        ValueError: when the run measured nothing, since no split in its configuration was auto.
    """
    if config.sampling.split != "auto":
        return config
    if not (Path(folder) / "variance.safetensors").is_file():
        raise ValueError(
            "sampling.split: expected a number or the path of a variance.json, since this run was trained without a "
            "split of 'auto' and did not measure it; got 'auto'"
        )
    state = checkpoint.load_module(folder, "variance")
    variance = OnlineVariance(state["mean"].shape, config.objective.interpolant, bins=len(state["rows"]))
    variance.load_state_dict(state)
    return replace(config, sampling=replace(config.sampling, split=sampling_split(variance)))


def load_model(path: str | Path, *, device: str = "auto", ema: bool = True) -> tuple[SiT, TrainConfig, dict]:
    """The model of a run or checkpoint folder, ready to sample.

    Returns:
        The model in evaluation mode; the configuration it was trained with; and {"shape", "num_classes", "kind",
        "step", "checkpoint"}.
    """
    folder = checkpoint.find(path)
    step, state = checkpoint.load(folder)
    config, about = settle_split(from_dict(state["config"]), folder), state["data"]
    model = build_model(config.model, about["shape"], about["num_classes"])
    model.load_state_dict(checkpoint.load_module(folder, "ema" if ema else "model"))
    about = {**about, "step": step, "checkpoint": str(folder)}
    return model.to(resolve_device(device)).eval().requires_grad_(False), config, about


def stable_vs(config: SamplingConfig) -> StableVS | None:
    """The low-variance region of a configuration, None when it is off."""
    if not config.low_steps:
        return None
    return StableVS(config.split, config.low_steps, config.noise_factor, config.grid)


def schedule(config: SamplingConfig) -> str | Callable[[int], Tensor]:
    """The time grid of a configuration, as `time_grid` takes it."""
    return partial(shifted_grid, shift=config.shift) if config.schedule == "shifted" else config.schedule


def evaluations(config: SamplingConfig, interpolant: str = "linear") -> int:
    """Model evaluations for each sample; one with guidance counts two."""
    stable = stable_vs(config)
    guidance = Guidance(config.guidance, config.guidance_low, config.guidance_high)
    times = time_grid(config.steps, schedule(config), stable, interpolant)
    return nfe(times, config.solver, stable=stable, guidance=guidance)


@dataclass(frozen=True)
class Processes:
    """The processes of a launch by accelerate or torchrun; one alone without a launcher."""

    rank: int = 0
    world: int = 1

    @classmethod
    def launched(cls, device: str) -> Processes:
        """Join the others, each with a GPU of its own unless `device` (as for `resolve_device`) is the CPU."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = require("accelerate", "train").PartialState(cpu=resolve_device(device).type == "cpu")
        return cls(state.process_index, state.num_processes)

    def rows(self, n: int, batch_size: int, rank: int | None = None) -> list[range]:
        """The batches, of n samples cut into batches of batch_size, that a process (this one) makes: every world-th.

        Batches do not depend on the number of processes, so that what is in them cannot either.
        """
        batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
        return batches[self.rank if rank is None else rank :: self.world]

    def gather(self, part: np.ndarray, n: int, batch_size: int, folder: Path) -> np.ndarray | None:
        """All n samples in order on the first process, None on the others, from each one's own; through files."""
        if self.world == 1:
            return part
        files = [folder / f"part-{rank}.npy" for rank in range(self.world)]
        np.save(files[self.rank], part)
        torch.distributed.barrier()
        if self.rank:
            return None
        whole = np.empty((n, *part.shape[1:]), part.dtype)
        for rank, file in enumerate(files):
            own = [i for batch in self.rows(n, batch_size, rank) for i in batch]
            whole[own] = np.load(file)
            file.unlink()
        return whole


@torch.no_grad()
def generate(
    model: nn.Module,
    config: SamplingConfig,
    shape: Sequence[int],
    labels: Tensor | None = None,
    n: int | None = None,
    *,
    interpolant: str = "linear",
    num_classes: int = 0,
    seed: int = 0,
    batch_size: int = 250,
    precision: str = "no",
    processes: Processes | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Samples (n, *shape) float32 on the CPU; every sample has noise of its own, the same for a seed on every device.

    Args:
        model: model(x, t, y) -> velocity; run on the device of its parameters.
        labels: (n,) int64 classes; None for a model without labels, with `n` then.
        num_classes: of the model; also its null label.
        precision: "no", "bf16" or "fp16" for the model.
        processes: with several, only the samples of this one's batches are made and returned.
        callback: callback(done, total) after each step of each batch.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if (labels is None) == (num_classes > 0):
        raise ValueError(
            f"labels: expected {'class labels' if num_classes else 'none'}, since num_classes = {num_classes}"
        )
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        raise ValueError(f"labels: expected 0 to {num_classes} (the null label), got {labels.tolist()}")
    if config.guidance != 1.0 and not num_classes:
        raise ValueError(f"guidance: expected 1, since the model has no labels, got {config.guidance}")
    n = n if labels is None else len(labels)
    device = next(model.parameters()).device
    stable, done, parts = stable_vs(config), 0, []
    batches = (processes or Processes()).rows(n, batch_size)
    total = len(batches) * (len(time_grid(config.steps, schedule(config), stable, interpolant)) - 1)

    def step_done(*_) -> None:
        nonlocal done
        done += 1
        if callback:
            callback(done, total)

    for rows in batches:
        generators = [torch.Generator().manual_seed(sample_seed(seed, i)) for i in rows]
        x = standard_normal(torch.empty(len(rows), *shape), generators).to(device)
        conditioning, guidance = {}, None
        if labels is not None:
            y = labels[rows.start : rows.stop].to(device)
            conditioning = {"y": y}
            uncond = {"y": torch.full_like(y, num_classes)}
            guidance = Guidance(config.guidance, config.guidance_low, config.guidance_high, uncond)
        with autocast(device, precision):
            x = sample(
                model,
                x,
                solver=config.solver,
                steps=config.steps,
                grid=schedule(config),
                interpolant=interpolant,
                stable=stable,
                guidance=guidance,
                generator=generators,
                callback=step_done,
                **conditioning,
            )
        parts.append(x.float().cpu())
    return torch.cat(parts) if parts else torch.empty(0, *shape)


def sample_seed(seed: int, i: int) -> int:
    """The seed of sample i of a run: another for every i below 2^32, all that torch's CPU generator reads of a seed."""
    return (seed * 0x9E3779B1 + i) % 2**32


def grid_image(samples: Tensor, columns: int) -> Tensor:
    """Samples (n, C, H, W), images in [-1, 1] -> one uint8 image (H', W', 3), `columns` a row, two pixels apart.

    One channel becomes grey; of more than three the first three are shown, scaled to their range.
    """
    n, channels, height, width = samples.shape
    if channels > 3:
        samples = samples[:, :3]
        low, high = samples.amin((0, 2, 3), keepdim=True), samples.amax((0, 2, 3), keepdim=True)
        samples = 2 * (samples - low) / (high - low).clamp_min(1e-6) - 1
    pixels = to_uint8(samples)
    pixels = (pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)).permute(0, 2, 3, 1)
    rows = math.ceil(n / columns)
    canvas = torch.zeros(rows * (height + 2), columns * (width + 2), 3, dtype=torch.uint8)
    for i, tile in enumerate(pixels):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        canvas[top : top + height, left : left + width] = tile
    return canvas[:-2, :-2]


def save_grid(samples: Tensor, path: str | Path, columns: int) -> None:
    """Write `grid_image` as a PNG; small images are enlarged by whole factors."""
    image = require("PIL.Image", "train")
    canvas = grid_image(samples, columns)
    factor = max(1, 800 // max(canvas.shape[:2]))
    big = canvas.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    image.fromarray(big.numpy()).save(path)

"""Image folders as the latents of an autoencoder: `svel latents`, and the data set that training reads.

Stored are mean and standard deviation of the posterior of every image and of its mirror image, not scaled; every visit
draws a latent from them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .data import ArrayData, Batch, ImageFolder, loader
from .shards import About, Shards, write_shards


@torch.no_grad()
def posterior(autoencoder: Any, images: Tensor) -> Tensor:
    """Mean and standard deviation (N, 2, c, h, w) float32 of the latents of images (N, 3, H, W) in [-1, 1].

    Args:
        autoencoder: diffusers' AutoencoderKL, or any module whose `encode` gives an object with `mean` and `std`
            (or one that has it as `latent_dist`), a pair of them, or a latent alone (standard deviation 0).
    """
    out = autoencoder.encode(images)
    out = getattr(out, "latent_dist", out)
    if isinstance(out, Tensor):
        out = out, torch.zeros_like(out)
    mean, std = out if isinstance(out, tuple) else (out.mean, out.std)
    return torch.stack([mean, std], dim=1).float()


def write_arrays(
    images: ImageFolder | ArrayData,
    folder: str | Path,
    encode: Callable[[Tensor], Tensor],
    kind: str,
    made: dict[str, Any],
    *,
    flip: bool = True,
    dtype: str = "float16",
    shard_size: int = 4096,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> About:
    """Write `encode` of every image, and of its mirror image, to shards; continues what was begun.

    Processes of a launch by torchrun share out the shards by RANK and WORLD_SIZE.

    Args:
        encode: images (N, 3, H, W) float32 in [-1, 1] on `device` -> (N, *shape).
        kind, made: what `about.json` says of it.
        dtype: "float16" or "float32", stored.

    Raises:
        ValueError: when the folder holds something else, naming what differs.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def arrays(batches: Iterable[Sequence[int]]) -> Iterable[Tensor]:
        for x, _, _ in loader(images, batches, workers=workers, pin=torch.device(device).type == "cuda"):
            x = x.to(device, non_blocking=True)
            parts = [encode(x), encode(x.flip(3))] if flip else [encode(x)]
            yield torch.stack(parts, dim=1).to(getattr(torch, dtype))

    about = About(
        kind=kind,
        samples=len(images),
        flips=2 if flip else 1,
        shape=tuple(encode(images[0][0][None].to(device)).shape[1:]),
        dtype=dtype,
        shard_size=min(shard_size, len(images)),
        batch_size=batch_size,
        classes=images.num_classes,
        files=images.digest(),
        made={"image_size": images.shape[1], **made},
    )
    write_shards(folder, about, images.y, arrays, rank=rank, world=world, progress=progress and rank == 0)
    return about


def write_latents(
    images: ImageFolder, folder: str | Path, autoencoder: nn.Module, name: str = "", **options: Any
) -> About:
    """Write the posterior of every image to shards; see `write_arrays` for the options.

    Where the autoencoder's `config` has a scaling and a shift factor, training takes (latent - shift) * scaling.
    """
    config = getattr(autoencoder, "config", None)
    made = {
        "autoencoder": name,
        "scale": getattr(config, "scaling_factor", None) or 1.0,
        "shift": getattr(config, "shift_factor", None) or 0.0,
    }
    return write_arrays(images, folder, lambda x: posterior(autoencoder, x), "latents", made, **options)


@torch.no_grad()
def decode(autoencoder: nn.Module, latents: Tensor, batch_size: int = 16) -> Tensor:
    """Images (N, 3, H, W) in about [-1, 1] of scaled latents (N, c, h, w), on the CPU; for diffusers' AutoencoderKL."""
    weight = next(autoencoder.parameters())
    config = autoencoder.config
    parts = []
    for part in latents.split(batch_size):
        z = part.to(weight.device, weight.dtype) / (config.scaling_factor or 1.0) + (config.shift_factor or 0.0)
        parts.append(autoencoder.decode(z).sample.float().cpu())
    return torch.cat(parts)


class LatentData(Dataset):
    """Latents as `svel latents` wrote them, read from disk as they are visited.

    With flips, samples n to 2n - 1 are the mirror images of samples 0 to n - 1: an epoch visits both. The noise of a
    visit is a function of the indices in its batch alone, so that a resumed run sees what an undisturbed one does, with
    any number of workers.

    Args:
        folder: written by `svel latents`.
        labels: False to leave the classes out.
        flip: False to leave the mirror images out.
        noise: times the standard deviation; 0 for the posterior's mean.
        scale: of the samples, besides the autoencoder's own.

    Raises:
        ValueError: when the folder is not a finished one of latents.
    """

    kind = "latent"

    def __init__(
        self, folder: str | Path, *, labels: bool = True, flip: bool = True, noise: float = 1.0, scale: float = 1.0
    ):
        self.shards = Shards(folder)
        about = self.shards.about
        if about.kind != "latents":
            raise ValueError(f"data.source: expected latents, got {about.kind} in {folder}")
        self.n, self.flips, self.shape = about.samples, about.flips if flip else 1, about.shape[1:]
        self.y = self.shards.labels if labels else None
        self.num_classes = 0 if self.y is None else about.classes
        self.noise, self.scale, self.shift = noise, scale * about.made["scale"], about.made["shift"]

    def __len__(self) -> int:
        return self.n * self.flips

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        samples, index = [i % self.n for i in indices], torch.tensor(indices, dtype=torch.int64)
        mean, std = self.shards.rows(samples, [i // self.n for i in indices]).float().unbind(1)
        if self.noise:
            noise = np.random.default_rng(list(indices)).standard_normal(mean.shape, dtype=np.float32)
            mean = mean + self.noise * std * torch.from_numpy(noise)
        return (mean - self.shift) * self.scale, None if self.y is None else self.y[samples], index

    def __getitem__(self, i: int) -> Batch:
        x, y, index = self.__getitems__([i])
        return x[0], None if y is None else y[0], index[0]


def load_autoencoder(name: str) -> nn.Module:
    """An autoencoder by "module:function" (called without arguments), or diffusers' AutoencoderKL by path or name."""
    if ":" in name:
        return from_function(name)
    return importlib.import_module(".diffusers.autoencoder", __package__).load_autoencoder(name)


def from_function(name: str) -> nn.Module:
    """What a user's own function, named "module:function", returns."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"expected module:function, got {name!r}: {error}") from None

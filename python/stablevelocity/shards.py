"""One array per image in shards on disk: written by any number of processes, resumed after a kill, read memory-mapped.

    <folder>/about.json        what it holds and of which images: `About`
             labels.npy        (samples,) int64, where there are classes
             shard-00000.npy   (shard_size, flips, *shape); the last one may be shorter

Every file is written under another name, flushed to disk and renamed: what has its name is whole. Shards are cut by
image index alone and processes share them out, so no process needs another, and what is in them is the same however
many there were and however often they were killed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

ABOUT, LABELS = "about.json", "labels.npy"


@dataclass(frozen=True)
class About:
    """What a folder of shards holds; all of it must be the same for a run to be resumed."""

    kind: str  # "latents" or "features"
    samples: int
    flips: int  # arrays per image: 1, or 2 with the image flipped left to right
    shape: tuple[int, ...]  # of one array
    dtype: str
    shard_size: int  # images in a shard
    batch_size: int
    classes: int  # 0 without labels
    files: str  # digest of the images' names in order
    made: dict[str, Any] = field(default_factory=dict)  # image size, encoder, scale ...

    @property
    def shards(self) -> int:
        return math.ceil(self.samples / self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.samples))


def shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.npy"


def write_shards(
    folder: str | Path,
    about: About,
    labels: Tensor | None,
    batches: Callable[[list[list[int]]], Iterable[Tensor]],
    *,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> int:
    """Write the shards that are missing and fall to this process.

    Args:
        labels: (samples,) int64, or None.
        batches: takes lists of image indices and gives, for each in turn, their arrays (n, flips, *shape).
        rank, world: this process takes every world-th shard that is missing, from its own on.

    Returns:
        How many shards were written.

    Raises:
        ValueError: when the folder holds something else, naming what differs; RuntimeError for arrays of another shape.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, about, labels, rank)
    todo = [s for s in range(rank, about.shards, world) if not (folder / shard_name(s)).exists()]
    cuts = [
        [list(rows)[i : i + about.batch_size] for i in range(0, len(rows), about.batch_size)]
        for rows in map(about.rows, todo)
    ]
    arrays = iter(batches([batch for shard in cuts for batch in shard]) if todo else ())
    with tqdm(total=sum(len(about.rows(s)) for s in todo), unit="image", disable=not progress) as bar:
        for shard, parts in zip(todo, cuts, strict=True):
            writing, first = folder / f".writing-{shard_name(shard)}", about.rows(shard)[0]
            shape = (len(about.rows(shard)), about.flips, *about.shape)
            out = np.lib.format.open_memmap(writing, mode="w+", dtype=about.dtype, shape=shape)
            for part in parts:
                values = next(arrays)
                if tuple(values.shape) != (len(part), *shape[1:]):
                    raise RuntimeError(f"expected arrays {(len(part), *shape[1:])}, got {tuple(values.shape)}")
                out[part[0] - first : part[-1] + 1 - first] = values.cpu().numpy()
                bar.update(len(part))
            out.flush()
            del out
            _rename(writing, folder / shard_name(shard))
    return len(todo)


def _begin(folder: Path, about: About, labels: Tensor | None, rank: int) -> None:
    """Say what the folder is to hold, or check that it already says the same."""
    ours = json.loads(json.dumps(asdict(about)))
    # Looked for before ABOUT: another process that begins this folder writes its labels first, shards after.
    strange = [path for path in folder.glob("*.npy") if path.name != LABELS and not path.name.startswith(".writing-")]
    if (folder / ABOUT).exists():
        theirs = json.loads((folder / ABOUT).read_text())
        for key in ours:
            if ours[key] != theirs.get(key):
                raise ValueError(f"output: {folder} was begun with {key} = {theirs.get(key)}, got {ours[key]}")
        return
    if strange:
        raise ValueError(f"output: expected an empty folder or one of shards, got {folder} without {ABOUT}")
    if labels is not None:
        writing = folder / f".writing-{rank}-{LABELS}"
        np.save(writing, labels.numpy())
        _rename(writing, folder / LABELS)
    writing = folder / f".writing-{rank}-{ABOUT}"
    writing.write_text(json.dumps(ours, indent=1))
    _rename(writing, folder / ABOUT)


def _rename(writing: Path, path: Path) -> None:
    """Give a written file its name once it is on the disk."""
    _sync(writing)
    os.replace(writing, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=512)  # a map keeps a file open, and there may be more shards than a process may open files
def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


class Shards:
    """A finished folder of shards; holds no more in memory than what it is asked for.

    Raises:
        ValueError: when the folder is none, or shards are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / ABOUT).is_file():
            raise ValueError(f"expected a folder with {ABOUT}, as svel latents and svel features write, got {folder}")
        values = json.loads((self.folder / ABOUT).read_text())
        self.about = About(**{**values, "shape": tuple(values["shape"])})
        present = set(os.listdir(self.folder))
        missing = [s for s in range(self.about.shards) if shard_name(s) not in present]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of {self.about.shards} shards are missing (first {shard_name(missing[0])}): "
                f"run svel {self.about.kind} again with the same arguments"
            )
        self.labels = torch.from_numpy(np.load(self.folder / LABELS)) if LABELS in present else None

    def rows(self, samples: Sequence[int], flips: Sequence[int]) -> Tensor:
        """The arrays (len(samples), *shape) of images, each in its flip (0 as it is, 1 flipped)."""
        size = self.about.shard_size
        out = np.empty((len(samples), *self.about.shape), self.about.dtype)
        for row, (i, flip) in enumerate(zip(samples, flips, strict=True)):
            out[row] = _map(self.folder / shard_name(i // size))[i % size, flip]
        return torch.from_numpy(out)

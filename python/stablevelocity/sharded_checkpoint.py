"""Checkpoints of a `ShardedReferenceBank` with torch.distributed.checkpoint, for any number of processes on loading.

    <folder>/.metadata, __0_0.distcp, ...    one set of files, whole or not there

Every process writes its part in pieces of at most 256 MB whose names say which part of how many they are. Their slots
follow from that, so a process of any other number of them picks its own out of each piece, one piece at a time.
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import ReadItem

from .checkpoint import sync
from .sharded_bank import slots_of, split_key

if TYPE_CHECKING:
    from .sharded_bank import ShardedReferenceBank


def save(bank: ShardedReferenceBank, folder: str | os.PathLike) -> None:
    """See `ShardedReferenceBank.save`."""
    folder = Path(folder)
    writing = folder.with_name(f".writing-{folder.name}")
    try:
        _first_process(bank, lambda: _make_empty(writing, folder))
        _quietly(dcp.save, bank.pieces(), bank.group, checkpoint_id=writing)
        _first_process(bank, lambda: _commit(writing, folder))
    except (RuntimeError, dcp.CheckpointException) as error:
        raise RuntimeError(f"{bank.lost(f'saving {folder}')}; what was saved before is as it was") from error


def load(bank: ShardedReferenceBank, folder: str | os.PathLike) -> None:
    """See `ShardedReferenceBank.load`."""
    small, pieces = _describe(folder)
    common = math.gcd(next(split_key(key)[2] for key in pieces), bank.parts)
    wanted = {key: kind for key, kind in pieces.items() if (split_key(key)[1] - bank.part) % common == 0}
    try:
        _quietly(dcp.load, small, bank.group, checkpoint_id=folder)
        bank.check_saved(small["layout"].tolist(), pieces, str(folder))
        _read(folder, wanted, bank.place, bank.group)
    except (RuntimeError, dcp.CheckpointException) as error:
        raise RuntimeError(bank.lost(f"loading {folder}")) from error
    bank.take_counts(small["counts"], small["heads"])


def load_whole(folder: str | os.PathLike) -> dict[str, Tensor]:
    """The bank as the state dict of a `ReferenceBank`, on the CPU; for one process, whatever others do."""
    small, pieces = _describe(folder)
    _quietly(dcp.load, small, None, checkpoint_id=folder)
    capacity, groups, _ = small.pop("layout").tolist()
    whole = {split_key(key)[0]: (shape[1:], dtype) for key, (shape, dtype) in pieces.items()}
    state = {name: torch.zeros(groups, capacity, *shape, dtype=dtype) for name, (shape, dtype) in whole.items()}

    def take(key: str, piece: Tensor) -> None:
        y, slot = slots_of(key, len(piece), capacity)
        used = slot < capacity
        state[split_key(key)[0]][y[used], slot[used]] = piece[used]

    _read(folder, pieces, take, None)
    return state | small


def _describe(folder: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Tensors to load what is not in pieces, and shape and dtype of every piece."""
    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        about = {key: (tuple(saved[key].size), saved[key].properties.dtype) for key in saved}
        small = {key: torch.zeros(about[key][0], dtype=about[key][1]) for key in ("layout", "counts", "heads")}
    except (OSError, EOFError, KeyError) as error:
        raise ValueError(f"folder: expected a bank that was saved whole, got {str(folder)!r}") from error
    return small, {key: kind for key, kind in about.items() if split_key(key)}


def _read(folder, pieces, take: Callable[[str, Tensor], None], group: dist.ProcessGroup | None) -> None:
    """Read pieces one by one, and hand each to `take`."""
    # tensors without memory: shapes to be asked for
    wanted = {key: torch.empty(1, dtype=dtype).expand(shape) for key, (shape, dtype) in pieces.items()}
    _quietly(dcp.load, wanted, group, checkpoint_id=folder, planner=_Streamed(take))


class _Streamed(dcp.DefaultLoadPlanner):
    """Hands every tensor on as it is read, and keeps none."""

    def __init__(self, take: Callable[[str, Tensor], None]):
        super().__init__()
        self.take = take

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        return torch.empty(read_item.lengths, dtype=self.state_dict[read_item.dest_index.fqn].dtype)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.take(read_item.dest_index.fqn, tensor)


def _quietly(call: Callable[..., object], state: dict[str, Tensor], group: dist.ProcessGroup | None, **options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        call(state, process_group=group, no_dist=group is None, **options)


def _first_process(bank: ShardedReferenceBank, act: Callable[[], None]) -> None:
    """The first process of the group acts, and all raise what it raises: a ValueError naming the folder."""
    said: list[str | None] = [None]
    if bank.part == 0:
        try:
            act()
        except (OSError, ValueError) as error:
            said = [str(error)]
    if bank.group is not None:
        dist.broadcast_object_list(said, src=dist.get_global_rank(bank.group, 0), group=bank.group)
    if said[0] is not None:
        raise ValueError(f"folder: {said[0]}")


def _make_empty(writing: Path, folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"expected one that does not exist, got {str(folder)!r}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)


def _commit(writing: Path, folder: Path) -> None:
    sync(writing)
    os.rename(writing, folder)
    sync(folder.parent)

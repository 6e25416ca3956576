"""Checkpoints of a training run: folders of safetensors and one JSON, complete or absent, without pickle.

    <run>/checkpoints/step-00005000/   model.safetensors, ema.safetensors, bank.safetensors (or bank/), ..., state.json

A folder is written under another name, flushed to disk and then renamed, so that a run killed at any moment leaves
whole checkpoints and possibly a ".writing-..." folder, which the next save removes. Old ones leave by the same door.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE = "state.json"
_NAME, _WRITING = re.compile(r"step-(\d{8,})"), ".writing-"


def flatten(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state (dicts, lists, tuples, tensors, NumPy arrays, numbers, text, None) into JSON and tensors.

    Returns:
        What `json` writes, in which {"$tensor": name} stands for a tensor; and the tensors by name.

    Raises:
        TypeError: for a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    return _flatten(value, "", tensors), tensors


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, np.ndarray):
        tensors[path] = torch.from_numpy(value)
        return {"$array": path}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _flatten(v, f"{path}/{key}", tensors) for key, v in value.items()}
        return {"$items": [[key, _flatten(v, f"{path}/{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise TypeError(f"{path or 'state'}: cannot be saved: {type(value).__name__}")


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(plain, list):
        return [unflatten(v, tensors) for v in plain]
    if not isinstance(plain, dict):
        return plain
    if "$tensor" in plain:
        return tensors[plain["$tensor"]]
    if "$array" in plain:
        return tensors[plain["$array"]].numpy()
    if "$tuple" in plain:
        return tuple(unflatten(v, tensors) for v in plain["$tuple"])
    if "$items" in plain:
        return {key: unflatten(v, tensors) for key, v in plain["$items"]}
    return {key: unflatten(v, tensors) for key, v in plain.items()}


def save(
    root: str | Path, step: int, modules: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 0
) -> Path:
    """Write the checkpoint of a step, all or nothing.

    Args:
        root: folder of a run's checkpoints.
        step: training steps done.
        modules: state dicts by name, each to become <name>.safetensors.
        state: anything `flatten` takes; its tensors go into state.safetensors.
        keep: how many checkpoints stay, the oldest going first; 0 for all.

    Returns:
        The folder.
    """
    return finish(begin(root, step), step, modules, state, keep=keep)


def begin(root: str | Path, step: int) -> Path:
    """The folder that `finish` makes a checkpoint, empty: whatever is written into it before belongs to that."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{_WRITING}*"):
        shutil.rmtree(stale)
    writing = root / f"{_WRITING}{step:08d}-{os.getpid()}"
    writing.mkdir()
    return writing


def finish(
    writing: Path, step: int, modules: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int = 0
) -> Path:
    """The other half of `save`: the rest of a checkpoint into the folder from `begin`, which then gets its name."""
    root, folder = writing.parent, writing.with_name(f"step-{step:08d}")
    plain, tensors = flatten(state)
    for name, module in {**modules, "state": tensors}.items():
        path = writing / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in module.items()}, path)
        sync(path)
    files = {str(path.relative_to(writing)): path.stat().st_size for path in writing.rglob("*") if path.is_file()}
    with open(writing / STATE, "w") as file:
        json.dump({"step": step, "files": files, "state": plain}, file)
        file.flush()
        os.fsync(file.fileno())
    sync(writing)
    if folder.exists():
        _discard(folder)
    os.rename(writing, folder)
    sync(root)
    for old in complete(root)[:-keep] if keep else []:
        _discard(old)
    return folder


def _discard(folder: Path) -> None:
    """Remove a checkpoint, which stops being one at once."""
    doomed = folder.rename(folder.with_name(f"{_WRITING}{folder.name}"))
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_complete(folder: str | Path) -> bool:
    """Whether a folder holds a state.json and every file it lists, at its full size."""
    try:
        files = json.loads((Path(folder) / STATE).read_text())["files"]
        return all((Path(folder) / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def complete(root: str | Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first; nothing else that lies there counts."""
    found = [path for path in Path(root).glob("step-*") if _NAME.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest(root: str | Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None."""
    return (complete(root) or [None])[-1]


def find(path: str | Path) -> Path:
    """The checkpoint that a user means: a checkpoint folder, or the newest of a run or of its checkpoints folder.

    Raises:
        ValueError: when there is none.
    """
    path = Path(path)
    if is_complete(path):
        return path
    found = latest(path / "checkpoints") or latest(path)
    if found is None:
        raise ValueError(
            f"checkpoint: expected a run or checkpoint folder with a complete checkpoint, got {str(path)!r}"
        )
    return found


def load(folder: str | Path) -> tuple[int, Any]:
    """(step, state) of a checkpoint, as given to `save`; tensors on the CPU.

    Raises:
        ValueError: when the folder is not a complete checkpoint.
    """
    if not is_complete(folder):
        raise ValueError(f"checkpoint: expected a complete checkpoint folder, got {str(folder)!r}")
    record = json.loads((Path(folder) / STATE).read_text())
    return record["step"], unflatten(record["state"], load_file(Path(folder) / "state.safetensors"))


def load_module(folder: str | Path, name: str) -> dict[str, Tensor]:
    """A state dict of a checkpoint, on the CPU."""
    return load_file(Path(folder) / f"{name}.safetensors")


def load_bank(folder: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint's `ReferenceBank`, on the CPU, also where the run had it in parts.

    Raises:
        ValueError: when the checkpoint has no bank.
    """
    folder = Path(folder)
    if (folder / "bank").is_dir():
        from . import sharded_checkpoint

        return sharded_checkpoint.load_whole(folder / "bank")
    if not (folder / "bank.safetensors").is_file():
        raise ValueError(f"data: expected a checkpoint with a bank, got {str(folder)!r}")
    return load_module(folder, "bank")

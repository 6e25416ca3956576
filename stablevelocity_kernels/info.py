"""What this installation holds, and which CUDA launch a problem gets; both answer without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    from . import _C
except ImportError as error:
    _C, _why_no_extension = None, str(error)

_RECORD = Path(__file__).parent / "_build.json"  # left by setup.py


class Device(NamedTuple):
    """What the planner knows of a GPU."""

    sm_count: int
    smem_limit: int  # bytes of shared memory that one thread block may ask for
    cc: int  # compute capability times ten
    bandwidth: float  # of its memory, bytes per second as specified


DEVICES = {
    "a100": Device(108, 166912, 80, 2.0e12),
    "l40s": Device(142, 101376, 89, 0.86e12),
    "h100": Device(132, 232448, 90, 3.35e12),
    "h200": Device(132, 232448, 90, 4.8e12),
    "b200": Device(148, 232448, 100, 8.0e12),
}


def build_info() -> dict[str, Any]:
    """What was compiled, with what and for what.

    Always: "compiled" (bool) and "torch" (the version that runs). Compiled: version, compiler, flags, build_type,
    torch_headers, isa_variants, isa_in_use, cuda (nvcc's version or None), cuda_architectures, cuda_status. Otherwise:
    "reason", why there is no compiled extension.
    """
    if _C is not None:
        return {"compiled": True, "torch": torch.__version__, **_C.build_info()}
    recorded = json.loads(_RECORD.read_text())["reason"] if _RECORD.exists() else None
    reason = recorded or f"this tree was not built, or not for this Python ({_why_no_extension})"
    return {"compiled": False, "torch": torch.__version__, "reason": f"no compiled extension: {reason}"}


def _describe(device: str | torch.device | None) -> Device:
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    if device is None and not torch.cuda.is_available():
        return DEVICES["h100"]
    try:
        properties = torch.cuda.get_device_properties(device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"device: expected a CUDA device of this machine or one of {tuple(DEVICES)}, got {device!r}"
        ) from error
    return Device(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        10 * properties.major + properties.minor,
        2e3 * getattr(properties, "memory_clock_rate", 2_619_000) * getattr(properties, "memory_bus_width", 5120) / 8,
    )


def plan(
    n: int,
    m: int,
    d: int,
    k: int | None = None,
    *,
    source: bool = False,
    x_dtype: torch.dtype = torch.float32,
    refs_dtype: torch.dtype = torch.float16,
    precision: str = "exact",
    aligned: bool = True,
    null_rows: bool = False,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """The CUDA launch that `posterior_mean` and `stable_target` make for a problem.

    Args:
        n, m, d: rows, references per group, elements of a sample.
        k: groups of a class bank; None: one pool shared by all rows.
        source: whether each row brings a reference of its own.
        x_dtype, refs_dtype: float16, bfloat16, float32 or float64.
        aligned: whether every reference starts at a multiple of 16 bytes.
        null_rows: whether rows of label -1 are to be expected.
        device: a CUDA device of this machine, or a key of `DEVICES`; None: the current one, or "h100" without one.

    Returns:
        kernel, tiles (tile_rows, tile_refs, tile_d), threads, stages, blocks, slices (blocks that share a sample),
        slice (elements of it for each), group (threads that share a sample where one block holds it), products
        (whether class banks are on the matrix units), in_flight (tiles on their way at once), tile_weights (what a
        tile costs with one row, two and more, the end of a unit for each of its rows, and of any), own_list (whether
        each block builds the list of units), deal (whether units that share a class are dealt out, to be read
        together), splits, rows_per_pass, refs_per_pass, smem_bytes, workspace_bytes, aligned (16-byte loads), wide
        (float64 arithmetic), fast (weights of one half), null_passes (of 32 rows of label -1 each, for which the pool
        kernel is launched beside the bulk kernel; 0: it is not), null_at_once (of them, to a launch), the least bytes
        and flops, and the reason in words.

    Raises:
        ValueError: for a size below zero, an unknown precision or device.
        RuntimeError: without the compiled extension.
    """
    if _C is None:
        raise RuntimeError(f"plan: {build_info()['reason']}")
    return _C.plan(
        n=n,
        k=1 if k is None else k,
        m=m,
        d=d,
        has_labels=k is not None,
        has_source=source,
        x_size=x_dtype.itemsize,
        refs_size=refs_dtype.itemsize,
        refs_bf16=refs_dtype == torch.bfloat16,
        aligned=aligned,
        null_rows=null_rows,
        precision=precision,
        **_describe(device)._asdict(),
    )

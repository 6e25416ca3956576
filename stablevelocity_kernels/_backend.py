"""Which implementation of the ops serves which device, decided once, at import."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

from .ops._register import implement_in_python

CHOICES = ("native", "triton", "reference")
_FOLDER = Path(__file__).parent
_serving: dict[str, str] = {}


def backends() -> dict[str, str]:
    """The implementation that serves each device: {"CPU": "native" | "reference", "CUDA": "native" | "triton" | ...}.

    A device that this build of torch does not have is absent. SVEL_BACKEND=native|triton|reference, read at import,
    takes that one wherever it can run.
    """
    return dict(_serving)


def _load(library: str) -> bool:
    path = _FOLDER / library
    if not path.exists():
        return False
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(f"svel: {path} is there but does not load, going on without it: {error}", stacklevel=2)
        return False
    return True


def load_backends() -> None:
    """Load the compiled libraries where they exist and fill the gaps with Triton and the references."""
    wish = os.environ.get("SVEL_BACKEND", "native")
    if wish not in CHOICES:
        raise RuntimeError(f"SVEL_BACKEND: expected one of {CHOICES}, got {wish!r}")
    if wish == "native" and _load("libsvel_cpu.so"):
        _serving["CPU"] = "native"
    else:
        implement_in_python("CPU", "reference")
        _serving["CPU"] = "reference"
    if torch.version.cuda or torch.version.hip:
        if wish == "native" and torch.version.cuda and _load("libsvel_cuda.so"):
            _serving["CUDA"] = "native"
        else:
            backend = "reference" if wish == "reference" else "triton"
            implement_in_python("CUDA", backend)
            _serving["CUDA"] = backend

"""How an op's page declares itself: schema, fake implementation, and which implementation serves which device."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch._ops import OpOverload

NAMESPACE = "svel"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_REFERENCE: dict[str, Callable] = {}
_TRITON_MODULE: dict[str, str] = {}


def define(schema: str, *, fake: Callable, reference: Callable, module: str | None = None) -> OpOverload:
    """Declare one op: its schema, its fake, and its plain-torch reference.

    Returns the op as its page calls it: through torch.ops.svel.<name>, a small call takes a microsecond or two more.

    Its Triton version has the op's name and lives in stablevelocity_kernels/triton/<module>.py (module: by default the
    op's name), imported at its first use, since importing triton takes longer than importing this package may.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    _REFERENCE[name] = reference
    _TRITON_MODULE[name] = module or name
    return getattr(torch.ops.svel, name).default


def eager(op: OpOverload) -> Callable:
    """What a call of the op comes to in the end, for pages of ops that a sampler calls at every step.

    It saves a frame and a copy of the keywords, most of a microsecond. torch.compile traces the op itself alone.
    """
    return getattr(op, "_op", op)


def define_native(schema: str) -> None:
    """Declare an op that only a compiled library has, for memory that a reference could not reach."""
    LIBRARY.define(schema)


def op_names() -> tuple[str, ...]:
    """Names of every declared op, in the order of declaration."""
    return tuple(_REFERENCE)


def triton_implementation(name: str) -> Callable:
    """The Triton version of an op; imports triton."""
    return getattr(importlib.import_module(f"stablevelocity_kernels.triton.{_TRITON_MODULE[name]}"), name)


def _lazy_triton(name: str) -> Callable:
    def call(*args, **kwargs):
        return triton_implementation(name)(*args, **kwargs)

    return call


def implement_in_python(device: str, backend: str) -> None:
    """Serve every op on `device` ("CPU" or "CUDA") with its "triton" or its "reference" implementation."""
    for name, reference in _REFERENCE.items():
        LIBRARY.impl(name, _lazy_triton(name) if backend == "triton" else reference, device)


def refuse_gradient(name: str) -> None:
    """Give an op that has no gradient a backward that says so, instead of a silent constant."""

    def backward(ctx, *grads):
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no gradient: its output is a constant of the training step; detach its inputs"
        )

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=LIBRARY)

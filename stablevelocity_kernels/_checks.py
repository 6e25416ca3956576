"""Argument checks shared by the fakes, the references and the Triton implementations.

Every message names the op, the argument, what was expected and what came; csrc/common/checks.h words them alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def fail(op: str, arg: str, expected: str, got: object) -> None:
    raise RuntimeError(f"svel::{op}: {arg}: expected {expected}, got {got}")


def check_dtype(op: str, arg: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if t.dtype not in dtypes:
        fail(op, arg, _names(dtypes), _names((t.dtype,)))


def check_device(op: str, arg: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        fail(op, arg, f"a tensor on {like.device}", t.device)


def check_shape(op: str, arg: str, t: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if t.dim() != len(shape) or any(a != b for a, b in zip(t.shape, shape, strict=True)):
        fail(op, arg, f"shape {meaning} = {tuple(shape)}", tuple(t.shape))


def check_row_scalar(op: str, arg: str, t: Tensor, x: Tensor) -> None:
    """A per-row scalar: (N,) float32, or float64 beside a float64 x."""
    check_dtype(op, arg, t, (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,))
    check_shape(op, arg, t, (x.shape[0],), "(N,)")
    check_device(op, arg, t, x)


def check_reference_set(
    op: str,
    x: Tensor,
    refs: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    source: Tensor | None,
    precision: str,
) -> None:
    """x (N, *S); refs (M, *S) or, with labels, (K, M, *S); labels (N,) int64; counts (1,) or (K,); source (N, *S)."""
    if x.dim() < 1:
        fail(op, "x", "shape (N, *S)", tuple(x.shape))
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "refs", refs, FLOATS)
    check_device(op, "refs", refs, x)
    lead = 1 if labels is None else 2
    sample = tuple(x.shape[1:])
    if refs.dim() != x.dim() - 1 + lead or tuple(refs.shape[lead:]) != sample:
        form = "(M, *S)" if labels is None else "(K, M, *S) because labels are given"
        fail(op, "refs", f"shape {form} with S = {sample}", tuple(refs.shape))
    if labels is not None:
        check_dtype(op, "labels", labels, (torch.int64,))
        check_shape(op, "labels", labels, (x.shape[0],), "(N,)")
        check_device(op, "labels", labels, x)
    if counts is not None:
        check_dtype(op, "counts", counts, (torch.int32, torch.int64))
        groups = (1,) if labels is None else (refs.shape[0],)
        check_shape(op, "counts", counts, groups, "(1,)" if labels is None else "(K,)")
        check_device(op, "counts", counts, x)
    if source is not None:
        check_dtype(op, "source", source, (x.dtype, refs.dtype))
        check_shape(op, "source", source, tuple(x.shape), "of x, (N, *S)")
        check_device(op, "source", source, x)
    if precision not in ("exact", "fast"):
        fail(op, "precision", "'exact' or 'fast'", repr(precision))


def check_labels_in_range(op: str, labels: Tensor, groups: int, lowest: int) -> None:
    """Only where reading the labels costs no synchronisation, that is on CPU."""
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < lowest or high >= groups:
            fail(op, "labels", f"values in [{lowest}, {groups})", f"values in [{low}, {high}]")


def check_choice(op: str, arg: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        fail(op, arg, "one of " + ", ".join(map(repr, choices)), repr(value))


def check_step(op: str, sample: Tensor, others: dict[str, Tensor | None]) -> None:
    """A sampling step: sample (N, *S) floating point; velocity, velocity_uncond, noise alike."""
    if sample.dim() < 1:
        fail(op, "sample", "shape (N, *S)", tuple(sample.shape))
    check_dtype(op, "sample", sample, FLOATS)
    for arg, value in others.items():
        if value is not None:
            check_dtype(op, arg, value, FLOATS)
            check_shape(op, arg, value, tuple(sample.shape), "of sample, (N, *S)")
            check_device(op, arg, value, sample)


def check_step_scalar(op: str, arg: str, value: Tensor, sample: Tensor) -> None:
    """A coefficient or time of a step: (N,) or 0-d, float32 or float64."""
    check_dtype(op, arg, value, (torch.float32, torch.float64))
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != sample.shape[0]):
        fail(op, arg, f"shape (N,) = ({sample.shape[0]},) or 0-d", tuple(value.shape))
    check_device(op, arg, value, sample)

"""Argument checks shared by the fakes, the references and the Triton implementations.

Every message names the op, the argument, what was expected and what came; csrc/common/checks.h words them alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .paths import PATHS, PREDICTIONS

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


def check_posterior_mean(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    source: Tensor | None,
    precision: str,
) -> None:
    op = "posterior_mean"
    check_reference_set(op, x, refs, labels, counts, source, precision)
    check_row_scalar(op, "alpha", alpha, x)
    check_row_scalar(op, "sigma", sigma, x)


def check_posterior_part(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    precision: str,
) -> None:
    op = "posterior_part"
    check_reference_set(op, x, refs, labels, counts, None, precision)
    for arg, value in (("alpha", alpha), ("sigma", sigma)):
        check_dtype(op, arg, value, (torch.float32, torch.float64))
        check_shape(op, arg, value, (x.shape[0],), "(N,)")
        check_device(op, arg, value, x)


def check_stable_target(
    x: Tensor,
    refs: Tensor,
    t: Tensor,
    labels: Tensor | None,
    counts: Tensor | None,
    source: Tensor | None,
    path: str,
    prediction: str,
    precision: str,
) -> None:
    op = "stable_target"
    check_reference_set(op, x, refs, labels, counts, source, precision)
    check_row_scalar(op, "t", t, x)
    check_choice(op, "path", path, PATHS)
    check_choice(op, "prediction", prediction, PREDICTIONS)


def check_affine_step(
    sample: Tensor,
    velocity: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    velocity_uncond: Tensor | None,
    noise: Tensor | None,
) -> None:
    op = "affine_step"
    check_step(op, sample, {"velocity": velocity, "velocity_uncond": velocity_uncond, "noise": noise})
    for arg, value in {"a": a, "b": b, "c": c}.items():
        if value is not None:
            check_step_scalar(op, arg, value, sample)
    if (c is None) != (noise is None):
        missing = "c" if c is None else "noise"
        fail(op, missing, "c and noise to be given together", f"{missing}=None")


def check_stablevs_step(
    sample: Tensor,
    velocity: Tensor,
    t: Tensor,
    tau: Tensor,
    velocity_uncond: Tensor | None,
    noise: Tensor | None,
    noise_factor: float,
    path: str,
) -> None:
    op = "stablevs_step"
    check_step(op, sample, {"velocity": velocity, "velocity_uncond": velocity_uncond, "noise": noise})
    check_step_scalar(op, "t", t, sample)
    check_step_scalar(op, "tau", tau, sample)
    check_choice(op, "path", path, PATHS)
    if not 0.0 <= noise_factor <= 1.0:
        fail(op, "noise_factor", "a number in [0, 1]", noise_factor)
    if noise_factor > 0.0 and noise is None:
        fail(op, "noise", f"a tensor because noise_factor = {noise_factor}", None)


def check_va_repa(op: str, projected: Tensor, teacher: Tensor, weight: Tensor) -> None:
    check_dtype(op, "projected", projected, FLOATS)
    check_dtype(op, "teacher", teacher, FLOATS)
    if projected.dim() != 3:
        fail(op, "projected", "shape (B, T, C)", tuple(projected.shape))
    check_shape(op, "teacher", teacher, tuple(projected.shape), "of projected, (B, T, C)")
    check_device(op, "teacher", teacher, projected)
    check_row_scalar(op, "weight", weight, projected)


def check_bank_push(
    refs: Tensor, counts: Tensor, heads: Tensor, values: Tensor, labels: Tensor, all_to_last: bool
) -> None:
    op = "bank_push_"
    if refs.dim() < 2:
        fail(op, "refs", "shape (K, M, *S)", tuple(refs.shape))
    if all_to_last and refs.shape[0] == 0:
        fail(op, "all_to_last", "False because refs has no group", "True")
    for arg, value in {"refs": refs, "counts": counts, "heads": heads}.items():
        if not value.is_contiguous():
            fail(op, arg, "a contiguous tensor, because it is written in place", f"strides {value.stride()}")
    check_dtype(op, "refs", refs, (*FLOATS, torch.int64))
    check_dtype(op, "values", values, (torch.int64,) if refs.dtype == torch.int64 else FLOATS)
    for arg, value in {"counts": counts, "heads": heads}.items():
        check_dtype(op, arg, value, (torch.int32, torch.int64))
        check_shape(op, arg, value, (refs.shape[0],), "(K,)")
        check_device(op, arg, value, refs)
    if heads.dtype != counts.dtype:
        fail(op, "heads", f"the dtype of counts, {counts.dtype}", heads.dtype)
    check_dtype(op, "labels", labels, (torch.int64,))
    if labels.dim() != 1:
        fail(op, "labels", "shape (N,)", tuple(labels.shape))
    check_shape(op, "values", values, (labels.shape[0], *refs.shape[2:]), "(N, *S)")
    check_device(op, "values", values, refs)
    check_device(op, "labels", labels, refs)


def check_bank_draw(
    refs: Tensor,
    counts: Tensor,
    u: Tensor,
    labels: Tensor | None,
    fallback: Tensor | None,
    noise: Tensor | None,
    t: Tensor | None,
    path: str,
) -> None:
    op = "bank_draw"
    if refs.dim() < 2:
        fail(op, "refs", "shape (K, M, *S)", tuple(refs.shape))
    check_dtype(op, "refs", refs, FLOATS)
    check_dtype(op, "counts", counts, (torch.int32, torch.int64))
    check_shape(op, "counts", counts, (refs.shape[0],), "(K,)")
    check_device(op, "counts", counts, refs)
    check_dtype(op, "u", u, (torch.float32, torch.float64))
    if u.dim() != 1:
        fail(op, "u", "shape (N,)", tuple(u.shape))
    check_device(op, "u", u, refs)
    if labels is None:
        if refs.shape[0] != 1:
            fail(op, "labels", f"a tensor because refs has {refs.shape[0]} groups", None)
    else:
        check_dtype(op, "labels", labels, (torch.int64,))
        check_shape(op, "labels", labels, (u.shape[0],), "(N,)")
        check_device(op, "labels", labels, refs)
    if (noise is None) != (t is None):
        missing = "noise" if noise is None else "t"
        fail(op, missing, "noise and t to be given together", f"{missing}=None")
    for arg, value in {"fallback": fallback, "noise": noise}.items():
        if value is not None:
            check_dtype(op, arg, value, FLOATS)
            check_shape(op, arg, value, (u.shape[0], *refs.shape[2:]), "(N, *S)")
            check_device(op, arg, value, refs)
    if t is not None:
        check_dtype(op, "t", t, (torch.float32, torch.float64))
        check_shape(op, "t", t, (u.shape[0],), "(N,)")
        check_device(op, "t", t, refs)
    check_choice(op, "path", path, PATHS)


def check_conditional_target(
    target: Tensor, x0: Tensor, noise: Tensor, t: Tensor, t_set: Tensor, path: str, prediction: str
) -> None:
    op = "conditional_target_"
    if target.dim() < 1:
        fail(op, "target", "shape (N, *S)", tuple(target.shape))
    check_dtype(op, "target", target, FLOATS)
    if not target.is_contiguous():
        fail(op, "target", "a contiguous tensor, because it is written in place", f"strides {target.stride()}")
    for arg, value in {"x0": x0, "noise": noise}.items():
        check_dtype(op, arg, value, FLOATS)
        check_shape(op, arg, value, tuple(target.shape), "of target, (N, *S)")
        check_device(op, arg, value, target)
    for arg, value in {"t": t, "t_set": t_set}.items():
        check_dtype(op, arg, value, (torch.float32, torch.float64))
        check_shape(op, arg, value, (target.shape[0],), "(N,)")
        check_device(op, arg, value, target)
    check_choice(op, "path", path, PATHS)
    check_choice(op, "prediction", prediction, PREDICTIONS)

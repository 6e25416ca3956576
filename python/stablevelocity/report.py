"""What `svel demo` shows: curves as PNG, and a page of Markdown around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .optional import require
from .variance import Split, VarianceCurve

CFM_COLOUR, STABLE_COLOUR = "#b5542a", "#22577a"


def _axes(title: str, x: str, y: str):
    matplotlib = require("matplotlib", "demo")
    matplotlib.use("Agg")
    figure, axes = require("matplotlib.pyplot", "demo").subplots(figsize=(6.4, 4.0), dpi=130, layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure, path: str | Path) -> None:
    figure.savefig(path)
    require("matplotlib.pyplot", "demo").close(figure)


def plot_variance(curve: VarianceCurve, path: str | Path, *, t_min: float | None = None) -> None:
    """The variance of both targets over t on a log scale, with bands of two standard errors."""
    figure, axes = _axes("Variance of the velocity target", "t  (0: data, 1: noise)", "mean square per coordinate")
    curve = curve.per_dimension()
    t = curve.t.numpy()
    lines = [(curve.cfm, curve.cfm_error, "CFM", CFM_COLOUR)]
    if curve.stablevm is not None:
        label = f"StableVM, {curve.references} references"
        lines.append((curve.stablevm, curve.stablevm_error, label, STABLE_COLOUR))
    floor = float(curve.cfm.max()) * 1e-6  # below it a variance is rounding: not drawn
    for value, error, label, colour in lines:
        value = value.masked_fill(value < floor, float("nan"))
        axes.plot(t, value, color=colour, label=label)
        band = (value - 2 * error).clamp_min(floor), value + 2 * error
        axes.fill_between(t, *band, color=colour, alpha=0.2, linewidth=0)
    if t_min is not None:
        axes.axvline(t_min, color="0.5", linewidth=1, linestyle=":", label=f"below t = {t_min}: conditional target")
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(floor, None))
    axes.legend(frameon=False)
    _write(figure, path)


def plot_split(curves: Mapping[str, VarianceCurve], splits: Mapping[str, Split], path: str | Path) -> None:
    """V_CFM over the prior's variance, with its quantiles and the split; curves other than "all" are thin lines."""
    figure, axes = _axes("Variance of the velocity target", "t  (0: data, 1: noise)", "share of the prior's variance")
    for name, curve in curves.items():
        if name != "all":
            value = (curve.cfm / curve.prior).clamp_min(1e-6).numpy()
            axes.plot(
                curve.t.numpy(), value, linewidth=0.7, alpha=0.7, label=f"class {name}: split {splits[name].split:.2f}"
            )
    curve, split = curves["all"], splits["all"]
    t, (low, high) = curve.t.numpy(), (curve.cfm_quantiles.T / curve.prior).clamp_min(1e-6).numpy()
    axes.plot(t, (curve.cfm / curve.prior).clamp_min(1e-6).numpy(), color=CFM_COLOUR, label="CFM")
    axes.fill_between(t, low, high, color=CFM_COLOUR, alpha=0.15, linewidth=0, label="CFM, 15 % to 85 % of the samples")
    if curve.cfm_missing.any():
        bound = ((curve.cfm + curve.cfm_missing) / curve.prior).clamp_min(1e-6).numpy()
        axes.plot(t, bound, color=CFM_COLOUR, linestyle="--", label="CFM, at most with all data as the pool")
    if curve.stablevm is not None:
        value = (curve.stablevm / curve.prior).clamp_min(1e-6).numpy()
        axes.plot(t, value, color=STABLE_COLOUR, label=f"StableVM, {curve.references} references")
    axes.axvline(split.split, color="0.4", linewidth=1, linestyle=":", label=f"split {split.split:.3f}")
    axes.axvspan(split.low, split.high, color="0.4", alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(1e-6, None))
    axes.legend(frameon=False, fontsize=7)
    _write(figure, path)


def plot_loss(logs: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """The training loss over steps on a log scale."""
    figure, axes = _axes("Training loss", "step", "mean square error to the target")
    axes.plot([line["step"] for line in logs], [line["loss"] for line in logs], color=STABLE_COLOUR)
    axes.set_yscale("log")
    _write(figure, path)


def markdown_table(rows: Sequence[tuple[str, Any]]) -> str:
    """Two columns of facts."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])

"""VA-REPA: representation alignment, weighted towards the times where the target's variance is low."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stablevelocity_kernels import clamp_time, va_repa_loss

from .interpolants import Interpolant, get_interpolant
from .models.sit import projector_mlp
from .online import OnlineVariance
from .variance import Split, fixed_split

# (t (N,), split: a number or 0-d, interpolant) -> (N,), not negative
WeightFunction = Callable[[Tensor, "float | Tensor", Interpolant], Tensor]
DEFAULT_SPLIT = 0.7  # the paper's


def hard_weight(t: Tensor, split: float | Tensor, interpolant: Interpolant) -> Tensor:
    """1 below the split, 0 from it on."""
    return (t < split).to(t.dtype)


def hard_high_weight(t: Tensor, split: float | Tensor, interpolant: Interpolant) -> Tensor:
    """0 below the split, 1 from it on: the opposite of "hard", for comparison."""
    return (t >= split).to(t.dtype)


def sigmoid_weight(t: Tensor, split: float | Tensor, interpolant: Interpolant, sharpness: float = 20.0) -> Tensor:
    """sigmoid(sharpness (split - t))."""
    return torch.sigmoid(sharpness * (split - t))


def cosine_weight(t: Tensor, split: float | Tensor, interpolant: Interpolant) -> Tensor:
    """(1 + cos(pi t / split)) / 2 below the split, 0 from it on."""
    return 0.5 * (1.0 + torch.cos(math.pi * (t / split).clamp_max(1.0)))


def snr_weight(t: Tensor, split: float | Tensor, interpolant: Interpolant) -> Tensor:
    """SNR(t) / (SNR(t) + SNR(split)) with SNR = (alpha / sigma)^2, multiplied out: finite at t = 0."""
    split = split if isinstance(split, Tensor) else t.new_full((), split)
    at, there = interpolant.coefficients(clamp_time(t)), interpolant.coefficients(clamp_time(split.to(t.dtype)))
    signal = (at.alpha * there.sigma) ** 2
    return signal / (signal + (there.alpha * at.sigma) ** 2)


WEIGHTS: dict[str, WeightFunction] = {
    "hard": hard_weight,
    "hard_high": hard_high_weight,
    "sigmoid": sigmoid_weight,
    "cosine": cosine_weight,
    "snr": snr_weight,
}


class VAREPALoss:
    """L = sum_i w(t_i) l_i / sum_i w(t_i), l_i the mean negative cosine similarity of sample i's tokens, averaged over
    teachers (paper, VA-REPA). Zero, with zero gradient, when the weights sum to less than 1e-8.

    The coefficient (the paper's is 0.5) is the caller's: total = objective loss + 0.5 * alignment.

    Args:
        interpolant: "linear", "cosine" or an `Interpolant`; only "snr" looks at it.
        schedule: a name in `WEIGHTS`, or a function (t, split, interpolant) -> weights (N,).
        split: the time in (0, 1] that separates low variance (below) from high: a number, a `Split`, the path of a
            variance.json, or "auto": what `variance` has found so far, 0.7 until it has found something.
        variance: of the objective that is trained beside, `objective.variance`; with split="auto".
    """

    def __init__(
        self,
        interpolant: str | Interpolant = "linear",
        schedule: str | WeightFunction = "sigmoid",
        split: float | str | os.PathLike | Split = DEFAULT_SPLIT,
        *,
        variance: OnlineVariance | None = None,
    ):
        if not callable(schedule) and schedule not in WEIGHTS:
            raise ValueError(f"schedule: expected one of {tuple(WEIGHTS)} or a callable, got {schedule!r}")
        if (split == "auto") != (variance is not None):
            expected = "the OnlineVariance of an objective" if variance is None else "None"
            raise ValueError(f"variance: expected {expected} with split = {split!r}, got {type(variance).__name__}")
        self.interpolant, self.variance = get_interpolant(interpolant), variance
        self.split = split if variance is not None else fixed_split(split, "split")
        if variance is None and not 0.0 < self.split <= 1.0:
            raise ValueError(f"split: expected a number in (0, 1], got {self.split}")
        self.weight_function = schedule if callable(schedule) else WEIGHTS[schedule]

    def weights(self, t: Tensor) -> Tensor:
        """(N,) float32 weights of the times t (N,)."""
        split = self.split if self.variance is None else self.variance.split(before=DEFAULT_SPLIT)
        return self.weight_function(t.detach(), split, self.interpolant).float()

    def __call__(
        self,
        projected: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        t: Tensor,
        total: Tensor | None = None,
    ) -> Tensor:
        """The loss (0-d float32), differentiable in `projected`.

        Args:
            projected: (N, T, C) projected hidden states, or one such tensor for each teacher.
            teacher: (N, T, C) teacher features, or a sequence of them; T and C may differ between teachers.
            t: (N,) times, 0 at the data.
            total: 0-d, what to divide by in place of the sum of these rows' weights: where a batch comes in parts, or
                is shared by processes, the mean over parts of theirs. The mean of the losses is then that of the batch.

        Raises:
            ValueError: when the numbers of tensors differ. RuntimeError: from the op, naming the argument.
        """
        projected = [projected] if isinstance(projected, Tensor) else list(projected)
        teacher = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        if not teacher or len(projected) != len(teacher):
            raise ValueError(f"teacher: expected {len(projected)} tensors, as many as projected, got {len(teacher)}")
        weight = self.weights(t)
        losses = [va_repa_loss(p, z.detach(), weight) for p, z in zip(projected, teacher, strict=True)]
        loss = torch.stack(losses).mean()
        return loss if total is None else loss * (weight.sum() / total.clamp_min(1e-12))


class HiddenState:
    """The output of a named module inside any model, taken by a forward hook.

        hidden = HiddenState(model, "blocks.7")          # once, before torch.compile
        with hidden.watch():
            velocity = model(x, t, y)
        loss = align(project(hidden.tokens()), teacher, t)

    Only calls inside `watch` are kept: sampling, and blocks recomputed in a backward pass, leave nothing behind.

    Args:
        model: any module, such as our SiT or a transformer of diffusers. For DDP, the module inside.
        at: the module's name as in `model.named_modules()`. Where it returns several tensors, as the blocks of SD3 and
            Flux do, the name of one: "transformer_blocks.7[1]".

    Raises:
        ValueError: for a name that the model lacks, with the nearest ones that it has.
    """

    def __init__(self, model: nn.Module, at: str):
        match = re.fullmatch(r"(.+?)(?:\[(\d+)\])?", at)
        modules = {name: module for name, module in model.named_modules() if name}
        if match is None or match[1] not in modules:
            raise ValueError(f"align_at: expected the name of a module, got {at!r}; {_near(at, modules)}")
        self.at, self.output = at, None if match[2] is None else int(match[2])
        self._active, self._value = False, None
        self._hook = modules[match[1]].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._active:
            self._value = output

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """While inside, keep what the module returns."""
        self._active, self._value = True, None
        try:
            yield
        finally:
            self._active = False

    def tokens(self) -> Tensor:
        """The hidden state of the last `watch`, (N, T, D), given out once; (N, C, H, W) is flattened row by row.

        Raises:
            RuntimeError: when the module was not called, or returned something else than one such tensor.
        """
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError(f"align_at: the module {self.at!r} was not called inside `watch`")
        if isinstance(value, Mapping):
            value = tuple(value.values())
        if isinstance(value, (tuple, list)):
            value = self._choose(value)
        elif self.output:
            raise RuntimeError(f"align_at: {self.at!r}: expected a module with several outputs, got one")
        if not isinstance(value, Tensor) or value.dim() not in (3, 4):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise RuntimeError(f"align_at: {self.at!r}: expected a tensor (N, T, D) or (N, C, H, W), got {got}")
        return value if value.dim() == 3 else value.flatten(2).transpose(1, 2)

    def _choose(self, values: Sequence[Any]) -> Any:
        tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        chosen = tensors[0] if self.output is None and len(tensors) == 1 else self.output
        if chosen not in tensors:
            shapes = ", ".join(f"[{i}] {tuple(values[i].shape)}" for i in tensors)
            raise RuntimeError(f"align_at: {self.at!r}: expected a choice of its outputs: {shapes or 'no tensor'}")
        return values[chosen]

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()


def _near(at: str, names: Mapping[str, Any]) -> str:
    """What the user may have meant: the children of the longest known part of the name, and names that look alike."""
    parent = at
    while "." in parent and parent not in names:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent in names else ""
    children = [name for name in names if name.startswith(prefix) and "." not in name[len(prefix) :]]
    alike = difflib.get_close_matches(at, names, n=3)
    shown = list(dict.fromkeys([*alike, *children]))
    return f"there are {', '.join(shown[:8])}{', ...' if len(shown) > 8 else ''}"


class ConvProjector(nn.Module):
    """iREPA's projector: one 3x3 convolution over the grid of tokens, (N, T, D) -> (N, T, C)."""

    def __init__(self, hidden_size: int, z_dim: int, grid: tuple[int, int] | None = None):
        """`grid`: rows and columns of tokens; a square without it."""
        super().__init__()
        self.conv, self.grid = nn.Conv2d(hidden_size, z_dim, kernel_size=3, padding=1), grid

    def forward(self, tokens: Tensor) -> Tensor:
        rows, columns = self.grid or (math.isqrt(tokens.shape[1]),) * 2
        if rows * columns != tokens.shape[1]:
            raise ValueError(f"grid: expected one of {tokens.shape[1]} tokens, got {rows} x {columns}")
        image = tokens.transpose(1, 2).unflatten(2, (rows, columns))  # (N, D, rows, columns)
        return self.conv(image).flatten(2).transpose(1, 2)


def spatial_norm(z: Tensor, gamma: float = 0.6) -> Tensor:
    """iREPA's normalisation of teacher features (N, T, C) over tokens: less of what all share, then unit deviation."""
    z = z.float()
    z = z - gamma * z.mean(dim=1, keepdim=True)
    return z / (z.std(dim=1, keepdim=True) + 1e-6)


def projector(
    kind: str, hidden_size: int, z_dim: int, *, width: int = 2048, grid: tuple[int, int] | None = None
) -> nn.Module:
    """A projector (N, T, hidden_size) -> (N, T, z_dim): "mlp" (REPA's, of `width`) or "conv" (iREPA's, over `grid`)."""
    if kind not in ("mlp", "conv"):
        raise ValueError(f"projector: expected 'mlp' or 'conv', got {kind!r}")
    if kind == "mlp":
        return projector_mlp(hidden_size, width, z_dim)
    return ConvProjector(hidden_size, z_dim, grid)


class Projectors(nn.ModuleList):
    """One projector for each teacher, called on the same tokens: (N, T, D) -> a list of (N, T, C)."""

    def forward(self, tokens: Tensor) -> list[Tensor]:
        return [project(tokens) for project in self]

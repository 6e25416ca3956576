"""Training objectives: from a batch of clean samples to what the model sees and what it should answer.

    draw = objective.sample(x0, labels)
    loss = objective.loss(model(draw.x_t, draw.t, draw.labels), draw)

Each runs on the device of x0 without waiting for it, so a step captures in a CUDA graph and compiles with
torch.compile(fullgraph=True), both with generator=None (the device's default generator).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from stablevelocity_kernels import clamp_time, conditional_target_

from .bank import ReferenceBank
from .interpolants import Interpolant, check_prediction, expand_rows, get_interpolant
from .online import OnlineVariance
from .times import TimeSampler, get_time_sampler
from .variance import Split, fixed_split

_T_MIN_LEVEL = 0.01  # t_min="auto": the conditional target adds at most this share of the prior's variance
_ALWAYS = 16  # t_min="auto": every 16th row takes the target over the set at any time, so that the curve stays measured


@dataclass(frozen=True)
class TrainingSample:
    """One draw of an objective, all on the device of the batch."""

    x_t: Tensor  # (N, *S) float32, what the model sees
    t: Tensor  # (N,) float32 in [1e-5, 1 - 1e-5]
    labels: Tensor | None  # (N,) int64 model labels, some dropped to the null label
    target: Tensor  # (N, *S) float32, what the model is regressed on
    x0: Tensor  # (N, *S) float32 clean sample that x_t was made of
    noise: Tensor  # (N, *S) float32 noise that x_t was made of

    def split(self, parts: int) -> list[TrainingSample]:
        """The rows in equal parts, for a model that takes them one after the other; `parts` must divide N."""
        columns = (getattr(self, field.name) for field in fields(self))
        return [TrainingSample(*rows) for rows in zip(*(_chunks(column, parts) for column in columns), strict=True)]


def _chunks(column: Tensor | None, parts: int) -> Sequence[Tensor | None]:
    return [None] * parts if column is None else column.chunk(parts)


class CFMObjective:
    """Conditional flow matching: x_t from the batch's own samples, regressed on the conditional target.

    Args:
        interpolant: "linear", "cosine" or an `Interpolant`.
        prediction: what the model answers: "velocity", "x0", "noise" or "score".
        times: "uniform", "lognormal" or a `TimeSampler`.
        num_classes: 0 for a model without class labels; else the null label is num_classes.
        cfg_prob: probability with which a label is dropped to the null label, for classifier-free guidance.
    """

    def __init__(
        self,
        interpolant: str | Interpolant = "linear",
        *,
        prediction: str = "velocity",
        times: str | TimeSampler = "uniform",
        num_classes: int = 0,
        cfg_prob: float = 0.1,
    ):
        check_prediction(prediction)
        if not 0.0 <= cfg_prob <= 1.0:
            raise ValueError(f"cfg_prob: expected a number in [0, 1], got {cfg_prob}")
        self.interpolant, self.prediction = get_interpolant(interpolant), prediction
        self.times, self.num_classes, self.cfg_prob = get_time_sampler(times), num_classes, cfg_prob

    @torch.no_grad()
    def sample(
        self, x0: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> TrainingSample:
        """Draw labels, times and noise for a batch.

        Args:
            x0: (N, *S) clean samples of any floating dtype.
            labels: (N,) int64 in [0, num_classes), or None.
            generator: on the device of x0; None for the default one.
        """
        x0 = x0.float()
        labels = self._drop_labels(labels, generator)
        t, noise = self._times_and_noise(x0, generator)
        target = self.interpolant.conditional(x0, noise, t, self.prediction)
        return TrainingSample(self.interpolant.interpolate(x0, noise, t), t, labels, target, x0, noise)

    def ahead(self, batches: Iterable[Sequence[Tensor | None]]) -> Iterator[TrainingSample]:
        """The draws of batches (x0, labels), each made while the step on the one before runs.

        On CUDA a draw is on a stream of its own, beside the model's kernels: what it takes, and what a bank in parts
        communicates, is hidden by them. Draws come in the order of the batches; the bank is one batch ahead of the
        model, which no draw depends on. A bank in parts needs a process group of its own for that, since the
        collectives of one group wait for one another (`torch.distributed.new_group()`).

        Args:
            batches: x0 (N, *S) and labels (N,) or None, on the device, made on the current stream.
        """
        side, waiting = None, None
        for x0, labels in batches:
            if not x0.is_cuda:
                draw, ready = self.sample(x0, labels), None
            else:
                side = side or torch.cuda.Stream(x0.device)
                side.wait_stream(torch.cuda.current_stream(x0.device))
                with torch.cuda.stream(side):
                    draw = self.sample(x0, labels)
                    ready = side.record_event()
                for given in (x0, labels):
                    if given is not None:
                        given.record_stream(side)
            if waiting is not None:
                yield _arrived(*waiting)
            waiting = draw, ready
        if waiting is not None:
            yield _arrived(*waiting)

    def loss(self, output: Tensor, sample: TrainingSample) -> Tensor:
        """Mean squared error (0-d float32) of the model's output (N, *S) to the sample's target."""
        if output.shape != sample.target.shape:
            raise ValueError(f"output: expected shape {tuple(sample.target.shape)}, got {tuple(output.shape)}")
        return torch.nn.functional.mse_loss(output.float(), sample.target)

    def _drop_labels(self, labels: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
        if labels is None:
            return None
        if self.num_classes == 0:
            raise ValueError(f"labels: expected None because num_classes = 0, got shape {tuple(labels.shape)}")
        drop = torch.empty(labels.shape, dtype=torch.bool, device=labels.device)
        drop.bernoulli_(self.cfg_prob, generator=generator)
        return labels.masked_fill(drop, self.num_classes)

    def _times(self, x0: Tensor, generator: torch.Generator | None) -> Tensor:
        return clamp_time(self.times(x0.shape[0], x0.device, generator))

    def _times_and_noise(self, x0: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        t = self._times(x0, generator)
        return t, torch.randn(x0.shape, device=x0.device, generator=generator)


def _arrived(draw: TrainingSample, ready: torch.cuda.Event | None) -> TrainingSample:
    """A draw that the current stream may use."""
    if ready is not None:
        current = torch.cuda.current_stream(draw.x_t.device)
        current.wait_event(ready)
        for field in fields(draw):
            value = getattr(draw, field.name)
            if value is not None:
                value.record_stream(current)
    return draw


class StableVMObjective(CFMObjective):
    """Stable velocity matching (paper, StableVM): x_t from the mixture over a reference set, regressed on the
    self-normalised target over the same set.

    The set that forms a row's target must hold the sample that x_t was made of: then E[target | x_t] is the marginal
    velocity, and without it the target is biased. Two ways to have it so:

    * source="bank": the sample is drawn from the bank, from the ring of the row's label. The loader's batch only feeds
      the bank. A row whose ring is still empty keeps its own sample and takes the conditional target.
    * source="loader": x_t is made of the loader's sample, which joins its own row's set, and enters the bank after.
      The bank should hold samples drawn independently of the batch; on a data set so small that the bank holds much of
      it, the sample would be counted twice, so take "bank" there.

    Args:
        bank: a `ReferenceBank` on the device of the batches, or a `HostReferenceBank` or `ShardedReferenceBank` for it;
            it also says how many classes there are.
        interpolant, prediction, times, cfg_prob: as in `CFMObjective`.
        t_min: rows with t below it take the conditional target, which reads no references. A number, a `Split`, the
            path of a variance.json, or "auto": where `variance` finds that the conditional target would add 1 % of the
            prior's variance, 0 until it has seen enough. Every 16th row then takes the target over the set at any time.
        source: "bank" or "loader".
        precision: "exact" or "fast", of the target.
        update_bank: push each batch into the bank, before the draw ("bank") or after the target ("loader").
        online: keep `variance`, an `OnlineVariance` (else None), also when t_min is fixed: then from t_min on. Save its
            state_dict with the bank's.
    """

    def __init__(
        self,
        bank: ReferenceBank,
        interpolant: str | Interpolant = "linear",
        *,
        prediction: str = "velocity",
        times: str | TimeSampler = "uniform",
        cfg_prob: float = 0.1,
        t_min: float | str | os.PathLike | Split = 0.5,
        source: str = "bank",
        precision: str = "exact",
        update_bank: bool = True,
        online: bool = False,
    ):
        super().__init__(
            interpolant, prediction=prediction, times=times, num_classes=bank.num_classes, cfg_prob=cfg_prob
        )
        if source not in ("bank", "loader"):
            raise ValueError(f"source: expected 'bank' or 'loader', got {source!r}")
        if precision not in ("exact", "fast"):
            raise ValueError(f"precision: expected 'exact' or 'fast', got {precision!r}")
        self.t_min = t_min if t_min == "auto" else fixed_split(t_min, "t_min")
        if t_min != "auto" and not 0.0 <= self.t_min <= 1.0:
            raise ValueError(f"t_min: expected a number in [0, 1], got {t_min}")
        self.bank, self.source, self._side = bank, source, None
        self.precision, self.update_bank = precision, update_bank
        self.variance = None
        if online or t_min == "auto":
            device = getattr(bank, "device", bank.counts.device)  # of a bank on the host: where it serves
            self.variance = OnlineVariance(bank.shape, self.interpolant, prediction, device=device)

    @torch.no_grad()
    def sample(
        self,
        x0: Tensor,
        labels: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> TrainingSample:
        """Draw labels, references, times and noise for a batch, and update the bank.

        Args:
            x0: (N, *S) clean samples of any floating dtype; the target is float32.
            labels: (N,) int64 in [0, num_classes), None for an unconditional bank.
            indices: (N,) int64 dataset indices, for a bank that tracks them.
            generator: on the device of x0; None for the default one.
        """
        self.bank.use(labels)
        sides, pushes = self._fork(x0), self.source == "bank" and self.update_bank
        noise = numbers = None
        if sides:  # made by now, since a side writes them
            noise = torch.empty(x0.shape, device=x0.device)
            if self.source == "bank":
                numbers = torch.empty(x0.shape[:1], dtype=torch.float64, device=x0.device)
        if pushes:
            with torch.cuda.stream(sides[0]) if sides else contextlib.nullcontext():
                self.bank.push_ahead(x0, labels, indices)
        dropped = self._drop_labels(labels, generator)
        t = self._times(x0, generator)
        if sides:
            with torch.cuda.stream(sides[1]):
                noise.normal_(generator=generator)
                if numbers is not None:
                    numbers.uniform_(generator=generator)
        else:
            noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        for side in sides:
            torch.cuda.current_stream(x0.device).wait_stream(side)
        if self.source == "bank":
            t_min = 0.0 if self.t_min == "auto" else self.t_min
            how = {"interpolant": self.interpolant, "t_min": t_min, "generator": generator, "numbers": numbers}
            sends = self.t_min != "auto"  # the target is at the draw's times
            drawn = self.bank.mixture(t, noise, dropped, x0, **how, send=self.precision if sends else "", pushed=pushes)
            x0, x_t = drawn.x0.float(), drawn.x_t.float()
            t_set = self._for_set(t, drawn.t_set) if self.t_min == "auto" else drawn.t_set
            target = self._target(x_t, x0, noise, t, t_set, dropped, None, sent=sends)
        else:
            x0 = x0.float()
            x_t = self.interpolant.interpolate(x0, noise, t)
            target = self.attach(x_t, x0, noise, t, dropped, class_labels=labels, indices=indices)
        return TrainingSample(x_t, t, dropped, target, x0, noise)

    @torch.no_grad()
    def attach(
        self,
        x_t: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """The target for a trainer that has made x_t of x0, noise and t itself: x0 joins its row's set.

            target = noise - x0                                  # before, on the linear path
            target = objective.attach(x_t, x0, noise, t)         # after

        Args:
            x_t, x0, noise: (N, *S) of any floating dtype; t: (N,), 0 at the data.
            labels: (N,) int64 in [0, num_classes], what the model is given; None for an unconditional bank.
            class_labels: (N,) the labels before any was dropped to the null label, under which x0 enters the bank.
                Needed when `labels` may hold the null label; by default `labels`.
            indices: (N,) int64 dataset indices, for a bank that tracks them.

        Returns:
            (N, *S) float32.
        """
        class_labels = labels if class_labels is None else class_labels
        self.bank.use(class_labels)
        x_t, x0, noise, t = x_t.float(), x0.float(), noise.float(), t.float()
        target = self._target(x_t, x0, noise, t, self._for_set(t, t), labels, x0)
        if self.update_bank:
            self.bank.push(x0, class_labels, indices)
        return target

    def _fork(self, x0: Tensor) -> Sequence[torch.cuda.Stream]:
        """On CUDA two streams beside the current one, from where that is: for the push and for random numbers."""
        if torch.compiler.is_compiling() or not x0.is_cuda or not self.bank.pushes_beside:
            return ()
        if self._side is None:
            self._side = torch.cuda.Stream(x0.device), torch.cuda.Stream(x0.device)
        for stream in self._side:
            stream.wait_stream(torch.cuda.current_stream(x0.device))
        return self._side

    def _for_set(self, t: Tensor, t_set: Tensor) -> Tensor:
        """t_set (N,) with NaN also in the rows whose t is below t_min."""
        if self.t_min != "auto":
            return t_set.masked_fill(t < self.t_min, math.nan)
        chosen = torch.arange(t.shape[0], device=t.device) % _ALWAYS != 0
        return t_set.masked_fill(chosen & (t < self.variance.split(_T_MIN_LEVEL, before=0.0)), math.nan)

    def _target(self, x_t, x0, noise, t, t_set, labels, source, sent=False) -> Tensor:
        """Over the set at the times t_set; rows where t_set is NaN, which the op skips, take the conditional target."""
        target = self.bank.target(
            x_t,
            t_set,
            labels,
            source,
            interpolant=self.interpolant,
            prediction=self.prediction,
            precision=self.precision,
            sent=sent,
        )
        if self.interpolant.name is not None:
            conditional_target_(target, x0, noise, t, t_set, path=self.interpolant.name, prediction=self.prediction)
        else:
            conditional = self.interpolant.conditional(x0, noise, t, self.prediction)
            target = torch.where(expand_rows(t_set.isnan(), target), conditional, target)
        if self.variance is not None:
            self.variance.update(x0, noise, t, target, ~t_set.isnan())
        return target


class STFObjective(CFMObjective):
    """Stable target field (Xu, Tong, Jaakkola 2023), for comparison: the loader's batch is the reference set.

    Row i's x_t is made of sample i of the batch, so its source is in the set, and its target is the self-normalised
    average over the whole batch. Only the first `rows` are trained on; the others are references alone. Against
    StableVM: the references last one step, and the source has a fixed place in the set where StableVM draws it
    uniformly. The Stable Velocity paper calls that biased; for samples drawn independently an exchangeability argument
    says it is not. tests/test_objectives.py measures it and finds no bias, where it would find half the bias of a set
    without its source.

    Args:
        interpolant, prediction, times: as in `CFMObjective`. There are no class labels.
        rows: how many rows of each batch are trained on; None for all.
        precision: "exact" or "fast", of the target.
    """

    def __init__(
        self,
        interpolant: str | Interpolant = "linear",
        *,
        prediction: str = "velocity",
        times: str | TimeSampler = "uniform",
        rows: int | None = None,
        precision: str = "exact",
    ):
        super().__init__(interpolant, prediction=prediction, times=times)
        if rows is not None and rows < 1:
            raise ValueError(f"rows: expected at least 1 or None, got {rows}")
        self.rows, self.precision = rows, precision

    @torch.no_grad()
    def sample(self, x0: Tensor, labels: None = None, *, generator: torch.Generator | None = None) -> TrainingSample:
        """Draw times and noise for the first `rows` of x0 (M, *S), any floating dtype; all M are references."""
        self._drop_labels(labels, generator)
        refs = x0.float()
        x0 = refs[: self.rows]
        t, noise = self._times_and_noise(x0, generator)
        x_t = self.interpolant.interpolate(x0, noise, t)
        target = self.interpolant.target(x_t, refs, t, prediction=self.prediction, precision=self.precision)
        return TrainingSample(x_t, t, None, target, x0, noise)

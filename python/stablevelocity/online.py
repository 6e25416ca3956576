"""The variance of the target over time, and the split, as training goes on: from the targets that it forms anyway."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stablevelocity_kernels import T_EPS, clamp_time, prediction_coefficients

from .interpolants import Interpolant, check_prediction, get_interpolant
from .variance import LEVELS, crossing

_READY = 2048  # measured rows before a split is believed
_MOMENT_ROWS = 65_536  # the mean and variance of the data are those of about so many rows
_MOMENT_BATCH = 32  # rows of each batch that they are taken from
_MOST = float(1 << 23)  # up to here float32 counts exactly


class OnlineVariance(nn.Module):
    """What a target over a set of M references saves against the conditional one, by time, and where that begins.

    The source of x_t is one of the set, each as likely, so given x_t and the set it is a draw from the very weights
    that the target averages over. The parts of conditional - marginal = (conditional - target) + (target - marginal)
    are therefore orthogonal, and

        E |conditional - target|^2 = V_CFM(t) - V_StableVM(t; M).

    Both vectors of a training step are known, so this is measured without a further pass over references. It is kept
    in bins of time as a share of the prior's variance, the newest `horizon` rows of a bin counting most; mean and
    variance of the data, classes ignored, come from 32 rows of each batch. `update` waits for nothing on the host: it
    captures in a CUDA graph and compiles with fullgraph=True. The buffers are all there is to save. Beside a draw ahead
    (`objective.ahead`) a split that is read may hold half of that draw's rows.

    The curve is that of sets of M. Over more data x_t has more sources, and V_CFM leaves zero earlier: the split of
    all data, which `variance_curve` measures, is at most this one. For the `t_min` of the set that is trained with it
    is the exact quantity.

    Args:
        shape: S of a sample.
        interpolant, prediction: of the objective.
        bins: of time, evenly from 0 to 1.
        horizon: rows of a bin after which an old one counts 1/e.
        device: of the buffers.

    Buffers, all float32: rows (bins,), how many count; total (bins,), their sum; seen (), all measured rows up to 2^23;
    mean (*S) and variance () of the data; moments (), the rows behind these, up to 65,536.
    """

    def __init__(
        self,
        shape: Sequence[int],
        interpolant: str | Interpolant = "linear",
        prediction: str = "velocity",
        *,
        bins: int = 64,
        horizon: int = 2048,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_prediction(prediction)
        for name, value in (("bins", bins), ("horizon", horizon)):
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        self.interpolant, self.prediction = get_interpolant(interpolant), prediction
        self.bins, self.horizon = bins, horizon
        at_noise = self.interpolant.coefficients(torch.tensor([1.0 - T_EPS], dtype=torch.float64))
        self.at_noise = float(at_noise.x0_factor) ** 2
        self.reduce: Callable[[Tensor], Tensor] | None = None  # sum over processes, where several train one model
        options = {"dtype": torch.float32, "device": device}
        self.register_buffer("rows", torch.zeros(bins, **options))
        self.register_buffer("total", torch.zeros(bins, **options))
        self.register_buffer("seen", torch.zeros((), **options))  # torch.compile drops what is added to float64 here
        self.register_buffer("mean", torch.zeros(tuple(shape), **options))
        self.register_buffer("variance", torch.zeros((), **options))
        self.register_buffer("moments", torch.zeros((), **options))

    @torch.no_grad()
    def update(self, x0: Tensor, noise: Tensor, t: Tensor, target: Tensor, measured: Tensor) -> None:
        """Take in a batch.

        Args:
            x0, noise: (N, *S) that x_t was made of; target: (N, *S), over a set that holds x0; t: (N,).
            measured: (N,) bool, False where the target is the conditional one. Rows that are not finite are left out.
        """
        at = self.interpolant.coefficients(clamp_time(t.double()))
        apart = torch.linalg.vector_norm(
            (target - self.interpolant.conditional(x0, noise, t, self.prediction)).flatten(1), dim=1
        )
        to_velocity = at.x0_factor / prediction_coefficients(self.prediction, at)[1]
        value = (to_velocity**2 / self.at_noise * apart.double() ** 2).float()
        measured = measured & value.isfinite()
        place = (t * self.bins).long().clamp(0, self.bins - 1)
        member = (place[:, None] == torch.arange(self.bins, device=t.device)) & measured[:, None]  # (N, bins)
        off = (x0[:_MOMENT_BATCH] - self.mean).flatten(1)
        whole = off.isfinite().all(1)
        off = torch.where(whole[:, None], off, 0.0)
        sums = torch.cat(
            [
                member.sum(0).float(),
                torch.where(member, value[:, None], 0.0).sum(0),
                whole.sum()[None].float(),
                off.square().sum()[None],
                off.sum(0),
            ]
        )
        if self.reduce is not None:
            sums = self.reduce(sums)
        new, total, n, square, off = sums.split([self.bins, self.bins, 1, 1, off.shape[1]])
        keep = torch.exp(-new / self.horizon)
        self.rows.mul_(keep).add_(new)
        self.total.mul_(keep).add_(total)
        self.seen.add_(new.sum()).clamp_(max=_MOST)
        n = n[0]
        share = n / (self.moments + n).clamp_min(1.0)
        step = share * off / n.clamp_min(1.0)
        self.variance.mul_(1 - share).add_(share * square[0] / n.clamp_min(1.0) - step.square().sum()).clamp_(min=0.0)
        self.mean.add_(step.reshape(self.mean.shape))
        self.moments.add_(n).clamp_(max=_MOMENT_ROWS)

    def curve(self) -> tuple[Tensor, Tensor, Tensor]:
        """Times (bins,), (V_CFM - V_StableVM) / V_CFM(1) there, NaN in bins without rows, and the rows that count."""
        t = (torch.arange(self.bins, device=self.rows.device) + 0.5) / self.bins
        return t, self.total / self.rows / self.variance, self.rows

    def split(self, level: float = LEVELS["variance"], *, before: float = 0.5) -> Tensor:
        """Where the curve first rises to a level (0-d float32, on the device): in (0, 1).

        Bins without rows count as the ones below them. `before`: the value until 2,048 rows have been measured.
        """
        t, share, rows = self.curve()
        last = torch.where(rows > 0, torch.arange(self.bins, device=t.device), -1).cummax(0)[0]
        share = torch.where(last >= 0, share[last.clamp_min(0)], 0.0)
        found = crossing(t, share, level).clamp_min(0.5 / self.bins)
        return torch.where(self.seen >= _READY, found, before)

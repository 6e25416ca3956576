"""svel::posterior_part — the posterior mean over one part of a reference set, with an lse precise enough to merge."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from ._register import define, refuse_gradient

SCHEMA = (
    "posterior_part(Tensor x, Tensor refs, Tensor alpha, Tensor sigma, Tensor? labels=None, Tensor? counts=None, *, "
    "str precision='exact') -> (Tensor mean, Tensor lse)"
)


def _fake(x, refs, alpha, sigma, labels=None, counts=None, *, precision="exact"):
    _checks.check_posterior_part(x, refs, alpha, sigma, labels, counts, precision)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:1], dtype=torch.float64)


define(SCHEMA, fake=_fake, reference=reference.posterior_part)
refuse_gradient("posterior_part")


def posterior_part(
    x: Tensor,
    refs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    labels: Tensor | None = None,
    counts: Tensor | None = None,
    *,
    precision: str = "exact",
) -> tuple[Tensor, Tensor]:
    """`posterior_mean` over one of several parts of a reference set, as when devices hold a part each.

    A float32 lse is rounded relative to itself, which moves the shares of the parts by more than the contract allows
    where D is large. Here it is float64, and the parts merge to 2e-6:

        mean, lse = zip(*(posterior_part(x, part, alpha, sigma) for part in parts))
        whole = (torch.softmax(torch.stack(lse), 0)[:, :, None] * torch.stack(mean)).sum(0)

    Args:
        x, refs, labels, counts, precision: as in `posterior_mean`.
        alpha, sigma: (N,) float32 or float64, the same for every part.

    Returns:
        mean (N, *S), float32 (float64 for float64 x), and lse (N,) float64, both NaN in a row whose set is empty.

    Raises:
        RuntimeError: as `posterior_mean`.
    """
    return torch.ops.svel.posterior_part(x, refs, alpha, sigma, labels, counts, precision=precision)
